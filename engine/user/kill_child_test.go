package user

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"math/rand"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"mica/engine"
	"mica/thin"
)

// The process that is killed: 16 goroutines write, zero and discard numbered cells of two devices,
// one takes and deletes snapshots. Before an operation begins, and when it is acknowledged, its
// number is noted in a file in memory, which outlives the process as the pool does.

const (
	killEnv     = "MICA_TEST_KILL"
	cellBytes   = 4096
	killBlocks  = 128 // of a device
	killCells   = killBlocks * 16
	killDevices = 2
	killWriters = 16
	groupCells  = 64 // 4 blocks in a row belong to one writer
	firstSnap   = 100
	killSnaps   = 3 // of a device at a time
)

// A killPlan is what the process is told.
type killPlan struct {
	Dir      string // with pool/, acks and snap-* in it
	Seed     int64
	Bytes    int64         // of the journal
	Interval time.Duration // between commits
	Pending  int
	At       string // name of a step at which it kills itself, "" for none
	Count    int    // the how manieth time
	Writes   int    // how many operations before it says "go"
}

func (k killPlan) options() Options {
	return Options{JournalBytes: k.Bytes, CommitInterval: k.Interval, MaxPending: k.Pending, Logger: quiet}
}

// A value is what an operation leaves in a cell: a number, and whether it is zeros.
type value uint64

func (v value) zero() bool     { return v == 0 || v&1 != 0 }
func (v value) number() uint64 { return uint64(v >> 1) }

// cellContent is what a cell holds after a write.
func cellContent(p []byte, id thin.DevID, cell int64, v value) {
	if v.zero() {
		clear(p)
		return
	}
	for i := 0; i < len(p); i += 32 {
		binary.LittleEndian.PutUint64(p[i:], uint64(v))
		binary.LittleEndian.PutUint64(p[i+8:], uint64(id)<<32|uint64(cell))
		binary.LittleEndian.PutUint64(p[i+16:], uint64(v)*0x9E3779B97F4A7C15)
		binary.LittleEndian.PutUint64(p[i+24:], uint64(i))
	}
}

// acks notes values: two words a cell, the one begun and the one acknowledged.
type acks struct {
	f    *os.File
	vals [killDevices][killCells][2]atomic.Uint64
}

func openAcks(dir string) (*acks, error) {
	f, err := os.OpenFile(filepath.Join(dir, "acks"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	a := &acks{f: f}
	b := make([]byte, killDevices*killCells*16)
	if _, err := f.ReadAt(b, 0); err == nil {
		for d := range a.vals {
			for c := range a.vals[d] {
				for k := range 2 {
					a.vals[d][c][k].Store(binary.LittleEndian.Uint64(b[((d*killCells+c)*2+k)*8:]))
				}
			}
		}
	} else if _, err := f.WriteAt(b, 0); err != nil {
		return nil, err
	}
	return a, nil
}

const (
	begun = 0
	acked = 1
)

// note stores the values of n cells from c on.
func (a *acks) note(d int, c, n int64, which int, v value) {
	b := make([]byte, n*16)
	for i := range n {
		a.vals[d][c+i][which].Store(uint64(v))
		for k := range 2 {
			binary.LittleEndian.PutUint64(b[i*16+int64(k)*8:], a.vals[d][c+i][k].Load())
		}
	}
	if _, err := a.f.WriteAt(b, (int64(d)*killCells+c)*16); err != nil {
		panic(err)
	}
}

// column copies one word of every cell of a device.
func (a *acks) column(d, which int) []byte {
	b := make([]byte, killCells*8)
	for c := range killCells {
		binary.LittleEndian.PutUint64(b[c*8:], a.vals[d][c][which].Load())
	}
	return b
}

// runKilled is the process. It does not return but on an error.
func runKilled(text string) error {
	var k killPlan
	if err := json.Unmarshal([]byte(text), &k); err != nil {
		return err
	}
	o := k.options()
	var steps atomic.Int64
	o.step = func(name string) {
		if name == k.At && steps.Add(1) == int64(k.Count) {
			syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {}
		}
	}
	p, err := Open(ctx, Location{Dir: filepath.Join(k.Dir, "pool")}, o)
	if err != nil {
		return err
	}
	a, err := openAcks(k.Dir)
	if err != nil {
		return err
	}
	var devs [killDevices]engine.Thin
	for d := range devs {
		if devs[d], err = p.Open(ctx, thin.DevID(d+1), engine.OpenOptions{SizeBytes: killBlocks << 16}); err != nil {
			return err
		}
	}
	var done atomic.Int64
	errs := make(chan error, killWriters+1)
	var wg sync.WaitGroup
	for w := range int64(killWriters) {
		wg.Go(func() {
			rng := rand.New(rand.NewSource(k.Seed*killWriters + w))
			for {
				if err := killOp(rng, w, &devs, a); err != nil {
					errs <- err
					return
				}
				if int(done.Add(1)) == k.Writes {
					fmt.Println("go")
				}
			}
		})
	}
	go func() {
		rng := rand.New(rand.NewSource(^k.Seed))
		for {
			time.Sleep(time.Duration(rng.Intn(5)) * time.Millisecond)
			if err := killSnap(rng, k.Dir, p, a); err != nil {
				errs <- err
				return
			}
		}
	}()
	return <-errs
}

// killOp does one operation of a writer.
func killOp(rng *rand.Rand, w int64, devs *[killDevices]engine.Thin, a *acks) error {
	d := rng.Intn(killDevices)
	first := (rng.Int63n(killCells/groupCells/killWriters)*killWriters + w) * groupCells
	c, n := first+rng.Int63n(groupCells), int64(1)
	if rng.Intn(3) == 0 {
		n = 1 + rng.Int63n(first+groupCells-c)
	}
	kind := rng.Intn(20)
	if kind < 3 { // whole blocks
		c, n = first+rng.Int63n(4)*16, 16
	}
	v := value(a.vals[d][c][begun].Load() >> 1)
	for i := c; i < c+n; i++ {
		if a.vals[d][i][begun].Load() != a.vals[d][i][acked].Load() {
			return nil // under way when an earlier process was killed: it may be there or not
		}
		v = max(v, value(a.vals[d][i][begun].Load()>>1))
	}
	v = (v + 1) << 1
	if kind < 6 {
		v |= 1
	}
	a.note(d, c, n, begun, v)
	var err error
	switch {
	case kind < 2:
		err = devs[d].Discard(c*cellBytes, n*cellBytes)
	case kind < 6:
		err = devs[d].WriteZeroes(c*cellBytes, n*cellBytes, false)
	default:
		p := make([]byte, n*cellBytes)
		for i := range n {
			cellContent(p[i*cellBytes:][:cellBytes], thin.DevID(d+1), c+i, v)
		}
		_, err = devs[d].WriteAt(p, c*cellBytes)
	}
	if err == nil {
		a.note(d, c, n, acked, v)
		if rng.Intn(200) == 0 {
			err = devs[d].Flush()
		}
	}
	return err
}

// snapFile names the file that says what is known about a snapshot.
func snapFile(dir, state string, id thin.DevID) string {
	return filepath.Join(dir, fmt.Sprintf("snap-%d.%s", id, state))
}

// killSnap takes a snapshot, or deletes one. Its file holds what was acknowledged when it began, and
// what had begun when it was done.
func killSnap(rng *rand.Rand, dir string, p *Pool, a *acks) error {
	if rng.Intn(3) == 0 {
		return p.Commit(ctx)
	}
	d := rng.Intn(killDevices)
	id := thin.DevID(firstSnap + rng.Intn(killSnaps)*killDevices + d)
	if _, err := p.Device(ctx, id); err == nil {
		if err := os.Rename(snapFile(dir, "done", id), snapFile(dir, "going", id)); err != nil && !os.IsNotExist(err) {
			return err
		}
		if err := p.Delete(ctx, id); err != nil {
			return err
		}
		return os.RemoveAll(snapFile(dir, "going", id))
	}
	least := a.column(d, acked)
	if err := p.CreateSnap(ctx, id, thin.DevID(d+1)); err != nil {
		return err
	}
	tmp := snapFile(dir, "tmp", id)
	if err := os.WriteFile(tmp, bytes.Join([][]byte{least, a.column(d, begun)}, nil), 0o600); err != nil {
		return err
	}
	return os.Rename(tmp, snapFile(dir, "done", id))
}
