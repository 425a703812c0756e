package journal

import (
	"bytes"
	"slices"
	"testing"

	"mica/thin"
)

// fuzzJournal is a journal in the middle of a commit, and what is in it.
func fuzzJournal(t testing.TB) []byte {
	f := newFixture(t, small)
	j := f.create(t, state(1))
	appendAll(t, j, entries(0, 20))
	j.Switch(state(1))
	appendAll(t, j, entries(20, 30))
	j.Expect(state(2))
	f.left(t).Done(state(9))
	return bytes.Clone(j.m.mem)
}

// FuzzRead reads a file with any header, records and slots as a journal: an error, or entries that
// can be stored. The parts come one by one, so that inputs stay short.
func FuzzRead(f *testing.F) {
	whole := fuzzJournal(f)
	f.Add(whole[:140], whole[doneAt:][:recordBytes], whole[generationAt+pageBytes:][:256], whole[slotsAt:][:96], uint16(len(whole)))
	f.Add([]byte(magic), []byte{}, []byte{}, []byte{}, uint16(100))
	f.Fuzz(func(t *testing.T, head, done, records, slots []byte, size uint16) {
		b := make([]byte, size)
		put := func(at int, p []byte) {
			if at < len(b) {
				copy(b[at:], p)
			}
		}
		put(0, head)
		put(doneAt, done)
		for area := range 2 {
			put(generationAt+area*pageBytes, records)
			put(slotsAt+area*(len(b)-slotsAt)/2/slotBytes*slotBytes, slots)
		}
		if len(b) >= pageBytes { // else few get past the header
			order.PutUint64(b[16:], uint64(len(b)))
			reseal(b)
		}
		c, err := read(b)
		if err != nil {
			return
		}
		states := []State{state(1), state(2), state(9)}
		for _, g := range c.gens {
			states = append(states, g.follows)
		}
		for _, s := range states {
			list, _, _ := c.choose(s)
			for _, e := range list {
				if !e.valid() {
					t.Fatalf("entry %+v", e)
				}
			}
			if err := Fold(list, func(thin.DevID, []Change) error { return nil }); err != nil {
				t.Fatal(err)
			}
		}
	})
}

// FuzzFlip changes a journal at some places: what is read then is some of what was in it, in the
// same order, and nothing else.
func FuzzFlip(f *testing.F) {
	whole := fuzzJournal(f)
	known := entries(0, 30)
	f.Add([]byte{0, 0, 0, 1})
	f.Add([]byte{0x40, 0, 7, 0xFF, 0x60, 1, 2, 3})
	f.Add([]byte{0x20, 0, 0, 1, 0x30, 0, 0, 1})
	f.Fuzz(func(t *testing.T, flips []byte) {
		b := bytes.Clone(whole)
		for ; len(flips) >= 4; flips = flips[4:] {
			at := int(flips[0])<<8 | int(flips[1])
			b[(at*len(b)>>16+int(flips[2]))%len(b)] ^= flips[3]
		}
		c, err := read(b)
		if err != nil {
			return
		}
		for _, s := range []State{state(1), state(2), state(9)} {
			list, _, _ := c.choose(s)
			rest := known
			for _, e := range list {
				i := slices.Index(rest, e)
				if i < 0 {
					t.Fatalf("read %+v, which was not in it or not there", e)
				}
				rest = rest[i+1:]
			}
		}
	})
}
