package user

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"encoding/json"
	"flag"
	"fmt"
	"math/rand"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"mica/dev"
	"mica/engine"
	"mica/thin"
)

var (
	kills    = flag.Int("kills", 20, "how many processes TestKilledWriters kills")
	killSeed = flag.Int64("killseed", 0, "seed of the kill tests, 0: a new one")
)

// A killBox is a pool that processes are killed over.
type killBox struct {
	t    *testing.T
	dir  string
	rng  *rand.Rand
	seed int64
	loc  Location
}

func newKillBox(t *testing.T) *killBox {
	t.Helper()
	k := &killBox{t: t, dir: shm(t), seed: *killSeed}
	if k.seed == 0 {
		k.seed = time.Now().UnixNano()
	}
	t.Logf("-killseed %d", k.seed)
	k.rng = rand.New(rand.NewSource(k.seed))
	k.loc = Location{Dir: filepath.Join(k.dir, "pool")}
	must(t, Format(ctx, k.loc, FormatOptions{DataBytes: 160 << 20}))
	t.Cleanup(func() { must(t, DiscardJournal(k.loc)) })
	p, err := Open(ctx, k.loc, Options{})
	must(t, err)
	for d := range killDevices {
		must(t, p.CreateThin(ctx, thin.DevID(d+1)))
	}
	must(t, p.Close())
	return k
}

// plan is a random one.
func (k *killBox) plan() killPlan {
	return killPlan{Dir: k.dir, Seed: k.rng.Int63n(1 << 40), Writes: 200 + k.rng.Intn(2000),
		Bytes:    []int64{1 << 20, 1 << 20, 32 << 10, 20 << 10}[k.rng.Intn(4)],
		Interval: []time.Duration{time.Second, 20 * time.Millisecond, time.Millisecond}[k.rng.Intn(3)],
		Pending:  []int{0, 0, 50}[k.rng.Intn(3)]}
}

// run starts a process and kills it, unless it does so itself, a while after it has begun.
func (k *killBox) run(p killPlan, while time.Duration) {
	k.t.Helper()
	text, err := json.Marshal(p)
	must(k.t, err)
	c := exec.Command(os.Args[0], "-test.run=^$")
	c.Env = append(os.Environ(), killEnv+"="+string(text))
	var stderr bytes.Buffer
	c.Stderr = &stderr
	out, err := c.StdoutPipe()
	must(k.t, err)
	must(k.t, c.Start())
	line, _ := bufio.NewReader(out).ReadString('\n')
	if line == "go\n" && p.At == "" {
		time.Sleep(while)
		c.Process.Kill()
	}
	limit := time.AfterFunc(30*time.Second, func() { c.Process.Kill() })
	defer limit.Stop()
	err = c.Wait()
	if ws, ok := c.ProcessState.Sys().(syscall.WaitStatus); !ok || !ws.Signaled() || ws.Signal() != syscall.SIGKILL {
		k.t.Fatalf("plan %s: the process ended by itself: %v, %q\n%s", text, err, line, stderr.Bytes())
	}
}

// verify opens the pool, compares all of it with what was acknowledged, closes and checks it.
func (k *killBox) verify(o Options) engine.Journal {
	k.t.Helper()
	o.Logger = quiet
	p, err := Open(ctx, k.loc, o)
	if err != nil {
		k.t.Fatal(err)
	}
	a, err := openAcks(k.dir)
	must(k.t, err)
	defer a.f.Close()
	for d := range killDevices {
		least, most := a.column(d, acked), a.column(d, begun)
		k.compare(p, thin.DevID(d+1), d, func(c int64, got value) bool {
			l, m := value(binary.LittleEndian.Uint64(least[c*8:])), value(binary.LittleEndian.Uint64(most[c*8:]))
			ok := got == l || got == m || got == 0 && (l.zero() || m.zero())
			if got == 0 && m.zero() {
				got = m
			} else if got == 0 {
				got = l
			}
			a.note(d, c, 1, begun, got)
			a.note(d, c, 1, acked, got)
			return ok
		})
	}
	devs, err := p.Devices(ctx)
	must(k.t, err)
	is := map[thin.DevID]bool{}
	for _, i := range devs {
		is[i.ID] = true
	}
	for id := thin.DevID(firstSnap); id < firstSnap+killSnaps*killDevices; id++ {
		os.Remove(snapFile(k.dir, "going", id))
		b, err := os.ReadFile(snapFile(k.dir, "done", id))
		if err != nil {
			continue
		}
		if !is[id] {
			k.t.Fatalf("snapshot %d was acknowledged and is not there", id)
		}
		d := int(id) % killDevices
		k.compare(p, id, d, func(c int64, got value) bool {
			l, m := value(binary.LittleEndian.Uint64(b[c*8:])), value(binary.LittleEndian.Uint64(b[(killCells+c)*8:]))
			if got == 0 {
				return l.zero() || m.zero() || m.number() > l.number()+1
			}
			return got.number() >= l.number() && got <= m
		})
	}
	s, err := p.Status(ctx)
	must(k.t, err)
	if s.Journal.Problem != "" {
		k.t.Errorf("journal: %s", s.Journal.Problem)
	}
	must(k.t, p.Close())
	checkFile(k.t, k.loc.MetadataPath())
	if left, err := filepath.Glob("/dev/shm/mica-journal/*" + fmt.Sprint(inode(k.t, k.loc.MetadataPath()))); err != nil || len(left) > 0 {
		k.t.Fatalf("journals after a clean close: %v %v", left, err)
	}
	return s.Journal
}

// compare reads every cell of a device that is, or is a snapshot of, number d.
func (k *killBox) compare(p *Pool, id thin.DevID, d int, ok func(c int64, got value) bool) {
	k.t.Helper()
	h, err := p.Open(ctx, id, engine.OpenOptions{SizeBytes: killBlocks << 16, ReadOnly: true})
	must(k.t, err)
	defer h.Close()
	want := make([]byte, cellBytes)
	bad := 0
	for at := int64(0); at < killCells; at += 256 {
		b := read(k.t, h, 256*cellBytes, at*cellBytes)
		for c := at; c < at+256; c++ {
			got := b[(c-at)*cellBytes:][:cellBytes]
			v := value(binary.LittleEndian.Uint64(got))
			cellContent(want, thin.DevID(d+1), c, v)
			if (v.zero() && v != 0 || !bytes.Equal(got, want) || !ok(c, v)) && bad < 10 {
				bad++
				k.t.Errorf("thin %d cell %d holds value %d (% x...)", id, c, v, got[:16])
			}
		}
	}
	if bad > 0 {
		k.t.FailNow()
	}
}

func inode(t *testing.T, path string) uint64 {
	t.Helper()
	st, err := os.Stat(path)
	must(t, err)
	return st.Sys().(*syscall.Stat_t).Ino
}

// checkFile runs our check and thin_check on the metadata of a closed pool.
func checkFile(t *testing.T, path string) {
	t.Helper()
	d, err := dev.OpenFile(path, dev.OpenOptions{ReadOnly: true})
	must(t, err)
	defer d.Close()
	rep, err := thin.Check(d, thin.CheckOptions{})
	must(t, err)
	for _, f := range rep.Findings {
		t.Errorf("check: %s: %s", f.Severity, f.String())
	}
	if tool, err := exec.LookPath("thin_check"); err == nil {
		if out, err := exec.Command(tool, "-q", path).CombinedOutput(); err != nil {
			t.Errorf("thin_check: %v\n%s", err, out)
		}
	}
	if t.Failed() {
		t.FailNow()
	}
}

// TestKilledWriters kills processes that write, zero, discard, snapshot and delete, at any moment.
// Every acknowledged write is there afterwards, flushed or not.
func TestKilledWriters(t *testing.T) {
	t.Parallel()
	k := newKillBox(t)
	taken := 0
	for i := range *kills {
		k.run(k.plan(), time.Duration(k.rng.Intn(40))*time.Millisecond)
		if i%3 == 2 { // the next process takes over itself
			continue
		}
		if k.verify(Options{}).TakenOver > 0 {
			taken++
		}
	}
	k.verify(Options{})
	t.Logf("%d kills, changes taken over after %d", *kills, taken)
	if taken < *kills/4 {
		t.Errorf("changes were taken over after %d of %d kills only: the test tests little", taken, *kills)
	}
}

// TestKilledAtSteps kills at every step of a commit, and at every step of taking over a journal.
func TestKilledAtSteps(t *testing.T) {
	t.Parallel()
	k := newKillBox(t)
	for _, step := range []string{"switched", "written", "expected", "superblock", "committed"} {
		for _, count := range []int{1, 5} {
			p := k.plan()
			p.At, p.Count, p.Interval = step, count, time.Millisecond
			k.run(p, 0)
			k.verify(Options{})
		}
	}
	for _, step := range []string{"found", "done noted", "replayed", "taken"} {
		p := k.plan()
		p.Interval = time.Second // most of it is in the journal
		k.run(p, 5*time.Millisecond)
		p.At, p.Count = step, 1
		k.run(p, 0)
		if step == "found" || step == "done noted" {
			k.run(p, 0) // it is all there again
		}
		k.verify(Options{})
	}
}
