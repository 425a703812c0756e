package user

import (
	"errors"
	"fmt"

	"mica/dev"
	"mica/thin"
)

// maxRun bounds the blocks that one step provisions.
const maxRun = 128

// A payload is what a request writes: bytes, or n zeros.
type payload struct {
	p []byte
	n int64
}

func bytesOf(p []byte) payload { return payload{p, int64(len(p))} }

// zeroBuf is the source of zeros. It is never written to.
var zeroBuf [1 << 20]byte

// slice returns bytes [i, j) of a payload; of zeros at most len(zeroBuf).
func (s payload) slice(i, j int64) []byte {
	if s.p == nil {
		return zeroBuf[:j-i]
	}
	return s.p[i:j]
}

// part returns bytes [i, j) as a payload.
func (s payload) part(i, j int64) payload {
	if s.p == nil {
		return payload{nil, j - i}
	}
	return payload{s.p[i:j], j - i}
}

// WriteAt overwrites mapped blocks that are the device's own in place, each contiguous run with
// one write, and gives the others new blocks first. When there is no space it waits or fails
// with dev.ErrNoSpace, as the pool's options say.
func (t *Thin) WriteAt(p []byte, off int64) (int, error) { return t.writeAt(p, off, false) }

// WriteAtNoWait is WriteAt for a caller whose requests may not all wait for space: where WriteAt
// would wait it fails with dev.ErrNoSpace. It may still wait for a commit.
func (t *Thin) WriteAtNoWait(p []byte, off int64) (int, error) { return t.writeAt(p, off, true) }

func (t *Thin) writeAt(p []byte, off int64, noWait bool) (int, error) {
	if err := dev.CheckRange(off, int64(len(p)), t.size.Load()); err != nil {
		return 0, t.wrap("write", err)
	}
	if t.readOnly {
		return 0, t.wrap("write", dev.ErrReadOnly)
	}
	n, err := t.write(bytesOf(p), off, t.writeStep, noWait)
	if err != nil {
		err = fmt.Errorf("thin %d: write %d bytes at %d: %w", t.d.id, len(p), off, err)
	}
	return int(n), err
}

// A step does a part of a request, with a token held, and returns how many bytes it did. An
// error that means waiting makes write wait, without a token, and call it again.
type step func(s payload, off int64) (int64, error)

// write runs steps until all of s is done. With noWait it fails where it would wait for space.
func (t *Thin) write(s payload, off int64, do step, noWait bool) (done int64, err error) {
	if s.n == 0 && t.closed.Load() {
		return 0, dev.ErrClosed
	}
	hostFull := false // it has waited for the host
	for done < s.n {
		seq, before := t.p.space.now(), done
		token, err := t.enterWrite()
		if err != nil {
			return done, err
		}
		for done < s.n && err == nil {
			var n int64
			n, err = do(s.part(done, s.n), off+done)
			done += n
		}
		t.d.w.exit(token)
		if errors.Is(err, errWantReserve) {
			var n int64
			n, err = t.tightStep(s.part(done, s.n), off+done, do)
			done += n
		}
		if hostFull && done > before && err == nil {
			t.p.hostSpaceAgain()
			hostFull = false
		}
		if err == nil {
			continue
		}
		if isHostFull(err) {
			hostFull = true
			err = fmt.Errorf("%w: %w", errWantHost, err)
		}
		if !mustWait(err) {
			return done, err
		}
		if err := t.p.waitFor(t, err, seq, noWait); err != nil {
			return done, err
		}
	}
	return done, nil
}

// tightStep is one step of a discard for which metadata is too short.
func (t *Thin) tightStep(s payload, off int64, do step) (n int64, err error) {
	err = t.p.tightly(func() error {
		token, err := t.enterWrite()
		if err != nil {
			return err
		}
		defer t.d.w.exit(token)
		if n, err = do(s, off); errors.Is(err, errWantReserve) && n == 0 {
			return t.p.noMetaError()
		}
		if errors.Is(err, errWantReserve) {
			return nil // some of it is done
		}
		return err
	})
	return n, err
}

func mustWait(err error) bool {
	for _, w := range []error{errWantData, errWantMeta, errWantHost, errWantPending, errWantTurn, errWantJournal} {
		if errors.Is(err, w) {
			return true
		}
	}
	return false
}

// writeStep writes the first run in place if it can, else gives the first blocks a place.
func (t *Thin) writeStep(s payload, off int64) (int64, error) {
	n, err := t.writeMapped(s, off)
	if n == 0 && err == nil {
		n, err = t.writeBlocks(s, off)
	}
	return n, err
}

// writeMapped overwrites the first run, if it begins with a mapped block that is not shared;
// else it does nothing and returns 0.
func (t *Thin) writeMapped(s payload, off int64) (int64, error) {
	l, err := t.d.leafOf(thin.VBlock(off / t.bs))
	if err != nil {
		return 0, err
	}
	z := l.zero.Load()
	if z != nil {
		if !z.enter() {
			return 0, nil
		}
		defer z.exit()
	}
	n, pos := t.ownRun(l, off, s.n)
	if n == 0 {
		return 0, nil
	}
	if z != nil {
		t.clearParts(z, off, n)
	}
	if _, err := t.p.data.WriteAt(s.slice(0, n), pos); err != nil {
		return 0, err
	}
	return n, nil
}

// ownRun is runIn for writes: the run ends before a block that is shared. 0 if the first block
// is not mapped or is shared.
func (t *Thin) ownRun(l *leaf, off, want int64) (n, pos int64) {
	vb := uint64(off / t.bs)
	in := off - int64(vb)*t.bs
	i := vb % leafBlocks
	e := l.entries[i].Load()
	if e == absent || t.d.shared(e) {
		return 0, -1
	}
	b := e / thin.MaxTime
	next := b + 1
	n = t.bs - in
	for i++; n < want && i < leafBlocks; i++ {
		f := l.entries[i].Load()
		if f == absent || f/thin.MaxTime != next || t.d.shared(f) {
			break
		}
		n += t.bs
		next++
	}
	return min(n, want), int64(b)*t.bs + in
}

// TryWriteAt writes if every block is mapped and the device's own.
func (t *Thin) TryWriteAt(p []byte, off int64) error {
	if t.readOnly || dev.CheckRange(off, int64(len(p)), t.size.Load()) != nil {
		return dev.ErrWouldBlock // WriteAt says what is wrong
	}
	token, ok := t.d.w.tryEnter()
	if !ok {
		return dev.ErrWouldBlock
	}
	defer t.d.w.exit(token)
	if t.mayWrite() != nil {
		return dev.ErrWouldBlock
	}
	// All of it first, so that nothing is done if a part must wait.
	want := int64(len(p))
	for at := int64(0); at < want; {
		l := t.d.table.at(thin.VBlock((off + at) / t.bs))
		if l == nil {
			return dev.ErrWouldBlock
		}
		n, _ := t.ownRun(l, off+at, want-at)
		if n == 0 {
			return dev.ErrWouldBlock
		}
		at += n
	}
	for at := int64(0); at < want; {
		l := t.d.table.at(thin.VBlock((off + at) / t.bs))
		if l == nil {
			return dev.ErrWouldBlock
		}
		n, err := t.tryRun(l, p[at:], off+at)
		if n == 0 || err != nil {
			return dev.ErrWouldBlock // repeated as a whole by WriteAt
		}
		at += n
	}
	return nil
}

// tryRun writes one run of a leaf in place.
func (t *Thin) tryRun(l *leaf, p []byte, off int64) (int64, error) {
	z := l.zero.Load()
	if z != nil {
		if !z.enter() {
			return 0, nil
		}
		defer z.exit()
	}
	n, pos := t.ownRun(l, off, int64(len(p)))
	if n == 0 {
		return 0, nil
	}
	if z != nil {
		t.clearParts(z, off, n)
	}
	_, err := t.p.data.WriteAt(p[:n], pos)
	return n, err
}
