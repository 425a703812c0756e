package user

import (
	"context"
	"errors"
	"fmt"
	"os"

	"mica/engine"
	"mica/journal"
	"mica/thin"
)

// A run of mappings lies in one leaf, so one entry of the journal holds it.
var _ [journal.GroupBlocks]struct{} = [leafBlocks]struct{}{}

// taken is what became of the journals that an earlier opener of the pool has left.
type taken struct {
	entries uint64 // changes, or runs of them, that were taken, or that wait in a pool opened read-only
	changed uint64 // mappings that were set or removed
	waiting string // path of the journal, if it waits
	problem string // what was lost, or why there is no journal
}

// at is a place at which a test may end the process.
func (p *Pool) at(step string) {
	if p.opts.step != nil {
		p.opts.step(step)
	}
}

// openJournal takes over what an opener that was killed has left, and begins a journal. No loop of
// the pool runs yet. A pool that is opened read-only takes nothing and only says what waits.
func (p *Pool) openJournal(id journal.Identity) error {
	v := p.meta.Pin()
	p.committed = journal.StateOf(v.Superblock())
	v.Unpin()
	o := journal.Options{Bytes: p.opts.JournalBytes, Dirs: p.opts.JournalDirs}
	left, err := journal.Find(id, o, !p.readOnly)
	if err != nil {
		if p.readOnly {
			p.taken.problem = err.Error()
			return nil
		}
		return err
	}
	for i, l := range left {
		if err := p.takeOver(l); err != nil {
			for _, l := range left[i:] {
				l.Close()
			}
			return fmt.Errorf("take over %s, which holds what was written before the last opener was killed: %w", l.Path(), err)
		}
	}
	if p.readOnly || p.opts.NoJournal {
		return nil
	}
	p.journal, err = journal.Create(id, o, p.committed, p.journalHalf)
	switch {
	case err == nil:
		if why := p.journal.Unlocked(); why != nil {
			p.log.Warn("the journal is not locked in memory", "path", p.journal.Path(), "err", why)
		}
	case p.opts.JournalOptional && errors.Is(err, journal.ErrNoPlace):
		p.taken.problem = err.Error()
		p.log.Warn("no journal: what is not flushed is lost if this process is killed", "err", err)
	default:
		return err
	}
	return nil
}

// takeOver brings the changes of one journal into the pool, makes them durable and takes the
// journal away.
func (p *Pool) takeOver(l *journal.Left) error {
	entries, why := l.Entries(p.committed)
	if why != "" {
		p.taken.problem = fmt.Sprintf("journal %s was left behind: %s", l.Path(), why)
		p.log.Error("a journal cannot be taken over", "path", l.Path(), "why", why)
		p.events.Keep(engine.EventJournal, p.taken.problem)
	}
	p.taken.entries += uint64(len(entries))
	if p.readOnly {
		if len(entries) > 0 {
			p.taken.waiting = l.Path()
			p.log.Warn("a journal waits for the pool to be opened for writing: what was written last does not show", "path", l.Path(), "entries", len(entries))
		}
		return l.Close()
	}
	p.at("found")
	if len(entries) > 0 {
		r := replay{p: p}
		if err := r.run(entries); err != nil {
			return err
		}
		if err := p.commitReplay(l); err != nil {
			return err
		}
		p.taken.changed += r.set + r.removed
		detail := fmt.Sprintf("taken over after a kill: %d mappings set, %d removed, %d known already", r.set, r.removed, r.known)
		if r.refused > 0 {
			p.taken.problem = fmt.Sprintf("%d of the mappings in journal %s contradict the pool and were left out: %s", r.refused, l.Path(), r.why)
			p.log.Error("mappings in the journal contradict the pool", "path", l.Path(), "refused", r.refused, "first", r.why)
			detail += fmt.Sprintf(", %d refused: %s", r.refused, r.why)
		}
		p.log.Info("journal taken over", "path", l.Path(), "set", r.set, "removed", r.removed, "known", r.known, "no_device", r.noDevice)
		p.events.Keep(engine.EventJournal, detail)
	}
	p.at("taken")
	return l.Remove()
}

// commitReplay makes what was replayed durable. The journal gets to know the superblock first: if
// this process is killed too, the next one finds either the old superblock, and does it again, or
// this one, and has nothing to do.
func (p *Pool) commitReplay(l *journal.Left) error {
	if !p.meta.Changed() {
		return nil
	}
	c, err := p.meta.Prepare()
	if err != nil {
		return err
	}
	// The contents of the blocks first, as in every commit.
	if err := p.data.sync(); err != nil {
		// Nobody will hear of it again: the contents may be lost, so the mappings are.
		c.Cancel(err)
		l.Fail()
		return errors.Join(err, p.meta.SetNeedsCheck())
	}
	if err := c.WriteBlocks(); err != nil {
		return err
	}
	next := journal.StateOf(c.Superblock())
	l.Done(next)
	p.at("done noted")
	if err := c.WriteSuperblock(); err != nil {
		return err
	}
	p.metaFlushes.Add(2)
	p.commits.writes.Add(1)
	p.committed = next
	p.at("replayed")
	p.release.add(c.Freed(), nil)
	return nil
}

// A replay brings changes into the trees of a pool that nobody uses yet.
type replay struct {
	p            *Pool
	set, removed uint64 // mappings
	known        uint64 // changes that the pool has already
	noDevice     uint64 // changes of devices that were never acknowledged
	refused      uint64
	why          string // of the first one refused
	batch        []thin.Entry
}

func (r *replay) run(entries []journal.Entry) error {
	// Growth is acknowledged after its commit; a write to the new blocks may have been before.
	last := thin.DataBlock(0)
	for _, e := range entries {
		if !e.Removed {
			last = max(last, e.Block+thin.DataBlock(e.Len)-1)
		}
	}
	m := r.p.meta
	if n := uint64(last) + 1; n > m.DataBlocks() && n <= uint64(r.p.data.Size()/r.p.bs) {
		if err := m.GrowData(n); err != nil {
			return err
		}
	}
	return journal.Fold(entries, r.group)
}

// group brings in the changes of one group of blocks: those that the pool has not.
func (r *replay) group(id thin.DevID, changes []journal.Change) error {
	m := r.p.meta
	if _, err := m.Details(id); errors.Is(err, thin.ErrNotFound) {
		r.noDevice += uint64(len(changes))
		return nil
	}
	var have [journal.GroupBlocks]uint64
	for i := range have {
		have[i] = absent
	}
	begin := changes[0].VBlock / journal.GroupBlocks * journal.GroupBlocks
	err := m.LookupRange(id, begin, begin+journal.GroupBlocks, func(e thin.Entry) bool {
		have[e.VBlock%journal.GroupBlocks] = e.Pack()
		return true
	})
	if err != nil {
		return err
	}
	r.batch = r.batch[:0]
	for _, c := range changes {
		old := have[c.VBlock%journal.GroupBlocks]
		switch {
		case c.Removed && old == absent, !c.Removed && old != absent && thin.UnpackMapping(old).Block == c.Block:
			r.known++
		case c.Removed:
			if _, _, _, err := m.Remove(id, c.VBlock, c.VBlock+1, 0); err != nil {
				return err
			}
			r.removed++
		case !m.TakeData(c.Block):
			// Somebody else's, or beyond the end of the pool.
			if r.refused++; r.why == "" {
				r.why = fmt.Sprintf("thin %d: block %d in data block %d of %d, which is not free", id, c.VBlock, c.Block, m.DataBlocks())
			}
		default:
			r.batch = append(r.batch, thin.Entry{VBlock: c.VBlock, Mapping: thin.Mapping{Block: c.Block, Time: m.Time()}})
		}
	}
	r.set += uint64(len(r.batch))
	return m.Insert(id, r.batch)
}

// journalHalf is called when the journal is half full, in the middle of a record.
func (p *Pool) journalHalf() {
	p.at("half")
	p.kickCommit()
}

// kickCommit makes the commit loop commit now.
func (p *Pool) kickCommit() {
	select {
	case p.commits.kick <- struct{}{}:
	default:
	}
}

// closeJournal ends the journal: everything is committed, or it stays for the next opener.
func (p *Pool) closeJournal(committed bool) error {
	switch {
	case p.journal == nil:
		return nil
	case committed && p.failed() == nil:
		return p.journal.Remove()
	}
	return p.journal.Close()
}

func (p *Pool) journalStatus() engine.Journal {
	s := engine.Journal{State: "off", TakenOver: p.taken.changed, Problem: p.taken.problem}
	switch j := p.journal; {
	case j != nil:
		s.State, s.Path, s.Bytes, s.Entries = "on", j.Path(), j.Bytes(), j.Entries()
	case p.taken.waiting != "":
		s.State, s.Path, s.Entries = "waiting", p.taken.waiting, p.taken.entries
	}
	return s
}

// ErrNoJournal: there is no tmpfs with room for a journal.
var ErrNoJournal = journal.ErrNoPlace

// JournalWaiting looks whether an opener of the pool was killed and left changes that the pool
// lacks; nil if not. For whoever is about to look at the metadata itself, or to let something
// else than this engine write to the pool: under the pool's lock, for the journal of a pool that
// somebody has open looks the same. The metadata device alone names the pool.
func JournalWaiting(l Location) (*journal.Waiting, error) {
	return journal.WaitingFor(l.MetadataPath(), journal.Options{})
}

// TakeOver brings what an opener that was killed has left into the pool, and closes it again.
func TakeOver(ctx context.Context, l Location, o Options) error {
	p, err := Open(ctx, l, o)
	if err != nil {
		return err
	}
	return p.Close()
}

// DiscardJournal takes away what was left for a pool whose metadata have been written anew.
func DiscardJournal(l Location) error {
	id, err := journal.Identify(l.MetadataPath())
	if err != nil {
		if errors.Is(err, os.ErrNotExist) {
			return nil
		}
		return err
	}
	return journal.Discard(id, journal.Options{})
}
