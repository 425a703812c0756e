package user

import (
	"mica/journal"
)

// Exports say who gives out devices of a pool, and leaves them to its successor.
type Exports = journal.Exports

// ErrExported: devices of the pool are given out by a process that is gone, and wait for its
// successor, which alone may write to the pool.
var ErrExported = journal.ErrExported

// mayWriteTo refuses a pool of which somebody else's devices wait. The caller has its locks.
func mayWriteTo(id journal.Identity, o Options) error {
	if o.ReadOnly {
		return nil
	}
	run := ""
	if o.Exports != nil {
		run = o.Exports.Run
	}
	return journal.RefuseExported(id, journal.Options{Dirs: o.JournalDirs}, run)
}

// noteExports says whose devices those of the pool are from now on.
func (p *Pool) noteExports(id journal.Identity) {
	if p.opts.ReadOnly {
		return
	}
	o := journal.Options{Dirs: p.opts.JournalDirs}
	var err error
	if p.opts.Exports == nil {
		err = journal.ForgetExports(id, o) // nothing is left: mayWriteTo has looked
	} else if err = journal.NoteExports(id, o, *p.opts.Exports); err == nil {
		p.forget = func() error { return journal.ForgetExports(id, o) }
	}
	if err != nil {
		p.log.Warn("no note of who gives out devices of the pool: whoever opens it next cannot tell", "err", err)
	}
}

// RefuseExported returns ErrExported if devices of a pool wait for the successor of a process that
// is gone. For whoever is about to write to the metadata without Open: under the pool's lock. The
// metadata device alone names the pool.
func RefuseExported(l Location) error {
	id, err := journal.Identify(l.MetadataPath())
	if err != nil {
		return err
	}
	return journal.RefuseExported(id, journal.Options{}, "")
}
