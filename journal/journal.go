package journal

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// A Journal is the journal of a pool that is open for writing. The pool's lock is what keeps
// others away; the file has none.
//
// Append may be called by any number of goroutines at a time; two changes of one block, and the
// switches around them, are kept in order by the caller. Switch, Expect, Written, Fail
// and Remove are called by one goroutine at a time. Nothing is called after Remove or Close.
type Journal struct {
	m      *mapping
	open   atomic.Pointer[generation]
	locked error  // why it is not locked in memory, or nil
	half   func() // called once a generation, when it is half full; may be nil
}

// A generation is one that takes entries.
type generation struct {
	number uint64
	page   []byte // its records
	slots  []byte
	n      uint64 // slots
	next   atomic.Uint64
}

// Create makes the journal of a pool that is as the superblock named by follows says, in the
// first place that is good for it. Whoever had one there has lost it. onHalf, if not nil, is called
// when a generation has become half full; it must not wait.
func Create(id Identity, o Options, follows State, onHalf func()) (*Journal, error) {
	if o.Bytes == 0 {
		o.Bytes = defaultBytes
	}
	if o.Bytes < slotsAt+4*slotBytes || o.Bytes > maxBytes {
		return nil, fmt.Errorf("journal of %d bytes: at least %d and at most %d", o.Bytes, slotsAt+4*slotBytes, int64(maxBytes))
	}
	o.Bytes = (o.Bytes + pageBytes - 1) / pageBytes * pageBytes
	boot, err := bootID()
	if err != nil {
		return nil, err
	}
	var why []error
	for _, dir := range o.dirs(id.UID) {
		for size := o.Bytes; ; size /= 4 {
			j, err := create(dir, id, header{size: size, boot: boot, id: id, pid: os.Getpid(), handle: handleOf(id)}, follows)
			if err == nil {
				j.half = onHalf
				return j, nil
			}
			if (errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) || errors.Is(err, unix.ENOMEM)) && size/4 >= leastBytes {
				continue
			}
			why = append(why, err)
			break
		}
	}
	return nil, fmt.Errorf("%w: %w", ErrNoPlace, errors.Join(why...))
}

func create(dir string, id Identity, h header, follows State) (_ *Journal, err error) {
	fd, err := openDir(dir, id.UID, true)
	if err != nil {
		return nil, err
	}
	sweep(fd, id.UID, h.boot)
	m, err := newFile(fd, filepath.Join(dir, id.name()), id.UID, h.size)
	if err != nil {
		unix.Close(fd)
		return nil, err
	}
	defer func() {
		if err != nil {
			m.unlink()
			m.unmap()
		}
	}()
	j := &Journal{m: m}
	// Without it the pages could be swapped out, no more: they would come back slowly.
	j.locked = unix.Mlock(m.mem)
	h.encode(m.mem)
	j.begin(1, follows)
	return j, m.publish()
}

// begin opens a generation in the area that is its turn. What the area held before is of another
// number, and so not valid any more.
func (j *Journal) begin(number uint64, follows State) {
	area := number % 2
	n := slotsPer(int64(len(j.m.mem)))
	at := slotsAt + area*n*slotBytes
	page := j.m.mem[generationAt+area*pageBytes:][:pageBytes]
	word(page[toComeAt:], 0).Store(0)
	putRecord(page, markFollows, number, follows)
	j.open.Store(&generation{number: number, page: page, slots: j.m.mem[at:][:n*slotBytes], n: n})
}

// Append notes a change whose block contents are complete. It must return before the change is
// acknowledged, and before anybody else can see it. ErrFull: nothing is noted. It takes no lock
// and allocates nothing.
//
// Preconditions: e.Len > 0, and the blocks do not cross a multiple of GroupBlocks.
func (j *Journal) Append(e Entry) error {
	if !e.valid() {
		panic(fmt.Sprintf("journal: entry %+v cannot be stored", e))
	}
	g := j.open.Load()
	i := g.next.Add(1) - 1
	if i >= g.n {
		return ErrFull
	}
	putSlot(g.slots[i*slotBytes:][:slotBytes], g.number, i, e)
	if i == g.n/2 && j.half != nil {
		j.half()
	}
	return nil
}

// Switch closes the open generation and opens the next one, on a pool whose superblock on the
// medium is the one named by follows. The caller makes sure that the commit that has begun holds
// every change whose Append came before; what the area held that is taken now belongs to the
// commit before, which is done.
func (j *Journal) Switch(follows State) { j.begin(j.open.Load().number+1, follows) }

// Expect notes the superblock that the commit under way is about to write.
func (j *Journal) Expect(next State) {
	g := j.open.Load()
	putRecord(g.page[toComeAt:], markToCome, g.number, next)
}

// Written notes that the expected superblock is on the medium: whoever finds the one before it has
// been given an older copy of the pool.
func (j *Journal) Written() {
	g := j.open.Load()
	word(g.page, writtenAt).Store(g.number)
}

// Fail makes the journal worthless: the pool has failed, and what it acknowledged since its last
// commit is as after power loss.
func (j *Journal) Fail() { word(j.m.mem, failedAt).Store(1) }

// Full reports whether the next Append would fail.
func (j *Journal) Full() bool {
	g := j.open.Load()
	return g.next.Load() >= g.n
}

// Entries is how many entries the open generation has.
func (j *Journal) Entries() uint64 {
	g := j.open.Load()
	return min(g.next.Load(), g.n)
}

// Bytes is the length of the file.
func (j *Journal) Bytes() int64 { return int64(len(j.m.mem)) }

// Path is where the file is.
func (j *Journal) Path() string { return j.m.path }

// Unlocked says why the journal is not locked in memory, or nil.
func (j *Journal) Unlocked() error { return j.locked }

// Remove ends the journal of a pool that has committed everything.
func (j *Journal) Remove() error { return errors.Join(j.m.unlink(), j.m.unmap()) }

// Close leaves the journal to the next opener of the pool.
func (j *Journal) Close() error { return j.m.unmap() }
