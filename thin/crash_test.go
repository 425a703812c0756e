package thin

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"math/rand"
	randv2 "math/rand/v2"
	"slices"
	"strings"
	"testing"

	"mica/dev"
)

var crashCommits = flag.Int("crash.commits", 25, "commits of each crash test")

// TestCrash cuts the power at every flush and between, with unflushed writes kept, lost or torn:
// the pool is as of the commit before or the one under way, clean, and nothing else.
func TestCrash(t *testing.T) {
	for seed := int64(1); seed <= 3; seed++ {
		t.Run(fmt.Sprint("seed=", seed), func(t *testing.T) {
			t.Parallel()
			mem := dev.NewMem(512 * 4096)
			if err := Format(mem, FormatOptions{DataBlockSize: testBlockSize, DataBlocks: 5000}); err != nil {
				t.Fatal(err)
			}
			log := dev.NewCrashLog()
			rec, err := log.Wrap(mem)
			if err != nil {
				t.Fatal(err)
			}
			p := &testPool{t: t, rng: rand.New(rand.NewSource(seed)), d: rec, mem: mem,
				committed: &testState{devs: map[DevID]*testDev{}, data: 5000}}
			p.reopen()
			// committedAt[i] is when commit i began and ended.
			type commit struct {
				begin, end int
				state      *testState
				held       bool
			}
			commits := []commit{{0, 0, p.committed.clone(), false}}
			for i := range *crashCommits {
				if i%9 == 5 { // alone in its transaction
					if p.held == nil {
						p.must(p.m.ReserveMetadataSnap())
						p.held = p.now
					} else {
						p.must(p.m.ReleaseMetadataSnap())
						p.held = nil
					}
				} else {
					for range 1 + p.rng.Intn(4) {
						p.step()
					}
				}
				if i%7 == 3 {
					// The next transaction goes on while this one is on its way.
					begin := log.Now()
					c, err := p.m.Prepare()
					p.must(err)
					closed := p.now.clone()
					p.step()
					p.must(c.WriteBlocks())
					p.step()
					p.must(c.WriteSuperblock())
					for _, r := range RunsOf(c.Freed()) {
						p.m.ReleaseData(r)
					}
					commits = append(commits, commit{begin, log.Now(), closed, p.held != nil})
				}
				begin := log.Now()
				p.commit()
				commits = append(commits, commit{begin, log.Now(), p.committed, p.held != nil})
			}
			cuts := log.FlushEnds()
			rng := randv2.New(randv2.NewPCG(uint64(seed), 1))
			end := log.Now()
			for range 60 {
				cuts = append(cuts, rng.IntN(end))
			}
			slices.Sort(cuts)
			old, fresh := 0, 0
			for _, cut := range cuts {
				for _, mode := range []dev.CrashMode{dev.CrashKeep, dev.CrashLose, dev.CrashRandom, dev.CrashTorn} {
					gran := int64(4096)
					if rng.IntN(2) == 0 {
						gran = 512
					}
					img := log.Image(rec, cut, mode, gran, rng)
					r, err := Check(img, CheckOptions{})
					if err != nil {
						t.Fatal(err)
					}
					if !r.Clean() || r.Warnings > 0 {
						var b bytes.Buffer
						r.WriteText(&b)
						t.Fatalf("cut at %d, unflushed writes: %v:\n%s", cut, mode, b.String())
					}
					i := 0
					for i+1 < len(commits) && commits[i+1].end <= cut {
						i++
					}
					switch {
					case sameState(t, img, commits[i].state):
						old++
					case i+1 < len(commits) && commits[i+1].begin <= cut && sameState(t, img, commits[i+1].state):
						fresh++
					default:
						t.Fatalf("cut at %d, unflushed writes: %v: the pool is neither as of commit %d nor of the next", cut, mode, i)
					}
				}
			}
			t.Logf("%d images as of the commit before the cut, %d as of the one under way", old, fresh)
			if old == 0 || fresh == 0 {
				t.Error("both must occur")
			}
		})
	}
}

// sameState reports whether the pool on d holds just what s says.
func sameState(t testing.TB, d dev.Device, s *testState) bool {
	t.Helper()
	m, err := Open(d, OpenOptions{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	devs, err := m.Devices()
	if err != nil {
		t.Fatal(err)
	}
	if len(devs) != len(s.devs) || m.Time() != s.time || m.TransactionID() != s.txID {
		return false
	}
	for _, i := range devs {
		d := s.devs[i.ID]
		if d == nil || d.info != i.Details {
			return false
		}
		n, same := 0, true
		if err := m.LookupRange(i.ID, 0, 1<<63, func(e Entry) bool {
			same = same && d.maps[e.VBlock] == e.Mapping
			n++
			return same
		}); err != nil {
			t.Fatal(err)
		}
		if !same || n != len(d.maps) {
			return false
		}
	}
	return true
}

// faultRun does a fixed sequence of changes and commits; it returns the state on the medium
// after each commit, as XML, and the error that ended it.
func faultRun(d dev.Device, medium *dev.Mem, seed int64) (states []string, m *Metadata, err error) {
	dump := func() string {
		var b strings.Builder
		if err := Dump(medium, &b, DumpOptions{}); err != nil {
			return "unreadable: " + err.Error()
		}
		return b.String()
	}
	if m, err = Open(d, OpenOptions{CacheBytes: 1}); err != nil {
		return nil, nil, err
	}
	rng := rand.New(rand.NewSource(seed))
	for i := range 30 {
		if i%2 == 1 { // with a cold cache
			if m, err = Open(d, OpenOptions{CacheBytes: 1}); err != nil {
				return states, nil, err
			}
		}
		id := DevID(rng.Intn(4))
		devs, err := m.Devices()
		if err != nil {
			return states, m, err
		}
		has := slices.ContainsFunc(devs, func(d DeviceInfo) bool { return d.ID == id })
		switch {
		case !has && len(devs) > 0 && rng.Intn(2) == 0:
			err = m.CreateSnap(id, devs[rng.Intn(len(devs))].ID)
		case !has:
			err = m.CreateThin(id)
		case i%5 == 4:
			for done := false; !done && err == nil; {
				done, err = m.DeleteStep(id)
			}
		case i%3 == 0:
			_, _, _, err = m.Remove(id, VBlock(rng.Intn(2000)), 4000, 0)
		default:
			var es []Entry
			vb := VBlock(rng.Intn(3000))
			for range 300 {
				r, ok := m.AllocData(DataBlock(rng.Intn(20000)), 1)
				if !ok {
					break
				}
				es = append(es, Entry{vb, Mapping{r.Begin, m.Time()}})
				vb += VBlock(1 + rng.Intn(5))
			}
			err = m.Insert(id, es)
		}
		if err != nil {
			return states, m, err
		}
		freed, err := m.Commit(nil)
		if err != nil {
			return states, m, err
		}
		for _, r := range freed {
			m.ReleaseData(r)
		}
		states = append(states, dump())
	}
	return states, m, nil
}

// TestEveryFault fails the n-th read, write and flush, for every n: a clean error, no change
// is accepted afterwards, the medium holds the last committed state, and the pool opens again.
func TestEveryFault(t *testing.T) {
	const seed = 4
	base := dev.NewMem(600 * 4096)
	if err := Format(base, FormatOptions{DataBlockSize: testBlockSize, DataBlocks: 20000}); err != nil {
		t.Fatal(err)
	}
	var empty strings.Builder
	if err := Dump(base, &empty, DumpOptions{}); err != nil {
		t.Fatal(err)
	}
	mem := base.Clone()
	count := dev.NewFault(mem)
	want, _, err := faultRun(count, mem, seed)
	if err != nil {
		t.Fatal(err)
	}
	want = append([]string{empty.String()}, want...)
	total := count.Counts()
	t.Logf("%+v", total)
	for _, c := range []struct {
		op dev.Op
		n  int64
	}{{dev.OpRead, total.Reads}, {dev.OpWrite, total.Writes}, {dev.OpFlush, total.Flushes}} {
		if c.n < 10 {
			t.Errorf("only %d %vs in the run", c.n, c.op)
		}
		step := max(1, int(c.n)/150)
		for n := 0; n < int(c.n); n += step {
			mem := base.Clone()
			f := dev.NewFault(mem)
			f.Add(dev.Rule{Ops: c.op, Skip: n, Times: 1})
			states, m, err := faultRun(f, mem, seed)
			where := fmt.Sprintf("%v %d fails", c.op, n)
			if !errors.Is(err, dev.ErrInjected) {
				t.Fatalf("%s: %v, want the device's error", where, err)
			}
			if errors.Is(err, ErrCorrupt) {
				t.Fatalf("%s: %v: a failing device is taken for corruption", where, err)
			}
			var got strings.Builder
			if err := Dump(mem, &got, DumpOptions{}); err != nil {
				t.Fatalf("%s: %v", where, err)
			}
			i := len(states)
			switch {
			case got.String() == want[i]:
			case c.op == dev.OpFlush && i+1 < len(want) && got.String() == want[i+1]: // the superblock was written, its flush failed
			default:
				t.Fatalf("%s: the medium is not as of commit %d", where, i)
			}
			r, cerr := Check(mem, CheckOptions{})
			if cerr != nil || !r.Clean() {
				t.Fatalf("%s: %v %v", where, cerr, r.Err())
			}
			if m == nil {
				continue // Open has failed
			}
			if m.Failed() == nil {
				t.Fatalf("%s: %v: changes are still accepted", where, err)
			}
			if err := m.CreateThin(99); !errors.Is(err, ErrReadOnly) {
				t.Fatalf("%s: later change: %v, want ErrReadOnly", where, err)
			}
			if _, err := m.Commit(nil); !errors.Is(err, ErrReadOnly) {
				t.Fatalf("%s: later commit: %v, want ErrReadOnly", where, err)
			}
			if err := m.SetNeedsCheck(); err != nil {
				t.Fatalf("%s: set needs_check: %v", where, err)
			}
			again, err := Open(mem, OpenOptions{})
			if err != nil || !again.NeedsCheck() {
				t.Fatalf("%s: reopen: %v, needs_check must be set", where, err)
			}
		}
	}
}

// TestDataSyncFails: a commit whose data sync fails never becomes real.
func TestDataSyncFails(t *testing.T) {
	p := newTestPool(t, 1, 512, 1000)
	p.create(1)
	p.commit()
	p.insert(1, 0, 10, 1)
	boom := errors.New("sync")
	if _, err := p.m.Commit(func() error { return boom }); !errors.Is(err, boom) {
		t.Fatalf("%v, want the sync's error", err)
	}
	if _, err := p.m.Commit(nil); !errors.Is(err, ErrReadOnly) || !errors.Is(err, boom) {
		t.Errorf("a later commit: %v, want ErrReadOnly and why", err)
	}
	p.reopen()
	p.compare()
}

// TestRestoreFaults: whatever write or flush of a restore fails, no pool is there afterwards.
func TestRestoreFaults(t *testing.T) {
	p := newTestPool(t, 6, 1024, 20000)
	for range 40 {
		p.step()
	}
	p.commit()
	var xml strings.Builder
	p.must(Dump(p.mem, &xml, DumpOptions{}))
	run := func(d dev.Device) error {
		return Restore(strings.NewReader(xml.String()), d, RestoreOptions{Force: true, step: 3000})
	}
	count := dev.NewFault(p.mem.Clone())
	p.must(run(count))
	total := count.Counts()
	t.Logf("%+v", total)
	for _, c := range []struct {
		op dev.Op
		n  int64
	}{{dev.OpRead, total.Reads}, {dev.OpWrite, total.Writes}, {dev.OpFlush, total.Flushes}} {
		for n := range int(c.n) {
			mem := p.mem.Clone()
			f := dev.NewFault(mem)
			f.Add(dev.Rule{Ops: c.op, Skip: n, Times: 1})
			if err := run(f); !errors.Is(err, dev.ErrInjected) {
				t.Fatalf("%v %d fails: %v, want the device's error", c.op, n, err)
			}
			switch first := readBlock(t, mem, 0); {
			case allZero(first):
			case n == 0 && c.op != dev.OpFlush: // the old pool was not touched yet
				sameDump(t, mem, []byte(xml.String()))
			default:
				t.Fatalf("%v %d fails: block 0 is not zero", c.op, n)
			}
		}
	}
}
