//go:build guest

package kernel

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"mica/dev"
	"mica/engine"
	"mica/export/loop"
	"mica/internal/dmioctl"
	"mica/thin"
)

// childDir is set in the environment of a process that is to be killed: the directory of its pool.
const (
	childDir     = "MICA_TEST_POOL"
	userChildDir = "MICA_TEST_USER_POOL"
)

// TestMain runs the child in place of the tests.
func TestMain(m *testing.M) {
	if dir := os.Getenv(childDir); dir != "" {
		if err := child(dir); err != nil {
			fmt.Fprintln(os.Stderr, "child:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	if dir := os.Getenv(userChildDir); dir != "" {
		fmt.Fprintln(os.Stderr, "child:", userChild(dir))
		os.Exit(1)
	}
	os.Exit(m.Run())
}

const (
	childSlots  = 32
	childStride = 20 << 10
	childBytes  = childSlots * childStride
)

// child does all that an engine does, for ever, and says which writes were acknowledged.
func child(dir string) error {
	p, err := Open(ctx, Source{Dir: dir}, Options{})
	if err != nil {
		return err
	}
	if err := p.CreateThin(ctx, 1); err != nil && !errors.Is(err, thin.ErrExists) {
		return err
	}
	d, err := p.Open(ctx, 1, engine.OpenOptions{SizeBytes: childBytes})
	if err != nil {
		return err
	}
	first, _ := strconv.ParseUint(os.Getenv("MICA_TEST_FIRST"), 10, 64)
	failed := make(chan error, 3)
	each := func(fn func(i uint64) error) {
		go func() {
			for i := uint64(0); ; i++ {
				if err := fn(i); err != nil {
					failed <- err
				}
			}
		}()
	}
	each(func(i uint64) error {
		rec := make([]byte, 4096)
		n := first + i
		binary.LittleEndian.PutUint64(rec, n)
		if _, err := d.WriteAt(rec, int64(n%childSlots)*childStride); err != nil {
			return err
		}
		_, err := fmt.Println(n)
		return err
	})
	each(func(i uint64) error { // snapshots, which suspend the device
		id := thin.DevID(100 + i%5)
		if err := p.CreateSnap(ctx, id, 1); err != nil && !errors.Is(err, thin.ErrExists) {
			return err
		}
		v, err := p.Open(ctx, id, engine.OpenOptions{SizeBytes: childBytes, ReadOnly: true})
		if err != nil {
			return err
		}
		_, err = v.ReadAt(make([]byte, 4096), 0)
		return errors.Join(err, v.Close(), p.Delete(ctx, id))
	})
	each(func(i uint64) error { // trims, which suspend the pool, and the metadata snapshot
		_, err := p.Usage(ctx)
		if i%3 == 0 {
			_, terr := p.Trim(ctx)
			err = errors.Join(err, terr)
		}
		return err
	})
	return <-failed
}

// TestKilled kills a process in the middle of everything, again and again. The next one takes over
// what it left: nothing acknowledged is lost, nothing stays suspended, and in the end nothing is
// left in the kernel.
func TestKilled(t *testing.T) {
	dir := newDir(t, 64<<20, 4<<20, 64<<10)
	last := uint64(0)
	for round := range 9 {
		cmd := exec.Command("/proc/self/exe")
		cmd.Env = append(os.Environ(), childDir+"="+dir, fmt.Sprintf("MICA_TEST_FIRST=%d", last+1))
		var stderr strings.Builder
		cmd.Stderr = &stderr
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewScanner(out)
		if !lines.Scan() {
			t.Fatalf("round %d: the child did nothing: %s", round, stderr.String())
		}
		ended := make(chan error, 1)
		go func() {
			for more := true; more; more = lines.Scan() {
				n, err := strconv.ParseUint(lines.Text(), 10, 64)
				if err != nil {
					ended <- fmt.Errorf("the child said %q", lines.Text())
					return
				}
				last = n
			}
			cmd.Wait()
			ended <- nil
		}()
		time.Sleep(time.Duration(100+round*53) * time.Millisecond)
		cmd.Process.Kill()
		_, err = dev.Open(dir+"/metadata", dev.OpenOptions{Lock: true})
		if !errors.Is(err, dev.ErrLocked) {
			t.Errorf("round %d: a pool that is active in the kernel can be locked: %v", round, err)
		}
		// This also helps a child to die that waits for what it has suspended itself.
		p, err := Open(ctx, Source{Dir: dir}, Options{})
		if err != nil {
			t.Fatalf("round %d: take over: %v\n%s", round, err, stacks(cmd.Process.Pid))
		}
		select {
		case err := <-ended:
			if err != nil {
				t.Fatalf("round %d: %v", round, err)
			}
		case <-time.After(20 * time.Second):
			t.Fatalf("round %d: the child does not end:\n%s", round, stacks(cmd.Process.Pid))
		}
		if s := stderr.String(); strings.Contains(s, "child:") {
			t.Errorf("round %d: the child said %s", round, s)
		}
		if st, err := p.Status(ctx); err != nil || st.Mode != "rw" || st.HeldRoot != 0 {
			t.Errorf("round %d: status %+v, %v", round, st, err)
		}
		d, err := p.Open(ctx, 1, engine.OpenOptions{SizeBytes: childBytes})
		if err != nil {
			t.Fatal(err)
		}
		newest, rec := uint64(0), make([]byte, 8)
		for i := range int64(childSlots) {
			if _, err := d.ReadAt(rec, i*childStride); err != nil {
				t.Fatal(err)
			}
			newest = max(newest, binary.LittleEndian.Uint64(rec))
		}
		if newest != last && newest != last+1 {
			t.Errorf("round %d: record %d is the newest, %d was the last that was acknowledged", round, newest, last)
		}
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
		if round%2 == 1 { // the next one has the nodes to take over
			p.mu.Lock()
			p.kept++
			p.mu.Unlock()
			if err := p.Close(); err != nil {
				t.Fatal(err)
			}
			continue
		}
		if busy := p.Sweep(); len(busy) > 0 {
			t.Errorf("round %d: in use by nobody: %v", round, busy)
		}
		if err := p.Close(); err != nil {
			t.Fatal(err)
		}
		if left := leftOver(t); len(left) > 0 {
			t.Fatalf("round %d: left in the kernel: %v", round, left)
		}
		m := openDevice(t, dir+"/metadata")
		if rep, err := thin.Check(m, thin.CheckOptions{}); err != nil || rep.Fatals > 0 {
			t.Errorf("round %d: %v %v", round, rep.Findings, err)
		}
		m.Close()
	}
	t.Logf("%d records", last)
}

// TestTakeOver puts the kernel into each state that a process can leave behind.
func TestTakeOver(t *testing.T) {
	dm, err := dmioctl.Open()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { dm.Close() })
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	src := func(dir string) Source { return Source{Dir: dir} }
	// active leaves a pool with device 1 active, as a killed process does, and returns the node.
	active := func(dir string) (*Pool, string) {
		p, err := Open(ctx, src(dir), Options{})
		must(err)
		must(p.CreateThin(ctx, 1))
		d, err := p.Open(ctx, 1, engine.OpenOptions{SizeBytes: 1 << 20})
		must(err)
		_, err = d.WriteAt([]byte("hello"), 4096)
		must(err)
		node := d.(*Thin).Node()
		d.(*Thin).KeepNode(true)
		must(d.Close())
		must(p.Close())
		return p, node
	}
	for _, c := range []struct {
		name  string
		leave func(dir string)
	}{
		{"loop devices only", func(dir string) {
			for _, f := range []string{"/data", "/metadata"} {
				_, err := loop.Attach(ctx, loop.Config{Backing: dir + f})
				must(err)
			}
		}},
		{"a pool without a table", func(dir string) {
			id, err := identityOf(dir + "/metadata")
			must(err)
			_, err = dm.Create(poolName(id), poolName(id))
			must(err)
		}},
		{"everything active", func(dir string) { active(dir) }},
		{"a thin device suspended", func(dir string) {
			p, _ := active(dir)
			must(dm.Suspend(thinName(p.id, 1), true, true))
		}},
		{"the pool suspended, with another table loaded", func(dir string) {
			p, _ := active(dir)
			table, err := dm.Table(p.name)
			must(err)
			must(dm.Load(p.name, false, table...))
			must(dm.Suspend(p.name, true, true))
		}},
		{"the metadata snapshot held", func(dir string) {
			p, _ := active(dir)
			must(dm.ReserveMetadataSnap(p.name))
		}},
		{"a thin device without a table", func(dir string) {
			p, _ := active(dir)
			_, err := dm.Create(viewName(p.id, 1, 9), viewName(p.id, 1, 9))
			must(err)
		}},
		{"a thin device that is to go with its last user", func(dir string) {
			p, node := active(dir)
			f, err := os.Open(node)
			must(err)
			must(dm.Remove(thinName(p.id, 1), true))
			t.Cleanup(func() { f.Close() })
			time.AfterFunc(200*time.Millisecond, func() { f.Close() })
		}},
		{"a name of ours that is somebody else's", func(dir string) {
			p, _ := active(dir)
			name := viewName(p.id, 7, 1)
			_, err := dm.Activate(name, "", false, dmioctl.Target{Length: 8, Type: "error"})
			must(err)
			t.Cleanup(func() { must(dm.Remove(name, false)) })
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := newDir(t, 16<<20, 2<<20, 64<<10)
			c.leave(dir)
			p, err := Open(ctx, src(dir), Options{})
			must(err)
			for id := thin.DevID(1); id < 3; id++ {
				if err := p.CreateThin(ctx, id); err != nil && !errors.Is(err, thin.ErrExists) {
					t.Fatal(err)
				}
			}
			must(p.CreateSnap(ctx, 9, 1))
			d, err := p.Open(ctx, 1, engine.OpenOptions{SizeBytes: 2 << 20})
			must(err)
			b := make([]byte, 5)
			if _, err := d.ReadAt(b, 4096); err != nil || string(b) != "hello" && string(b) != "\x00\x00\x00\x00\x00" {
				t.Errorf("device 1 holds %q, %v", b, err)
			}
			_, err = d.WriteAt(b, 2<<20-100)
			must(err)
			must(p.Delta(ctx, 1, 9, func(thin.DeltaRange) error { return nil }))
			must(d.Close())
			must(p.Delete(ctx, 1))
			must(p.Close())
			for _, l := range leftOver(t) {
				if !strings.Contains(l, "-7-r1") {
					t.Errorf("left in the kernel: %s", l)
				}
			}
		})
	}
}

// TestKeptNode: a node that is kept works without any process, and the next one finds it under its
// path; a read-only one too.
func TestKeptNode(t *testing.T) {
	dir := newDir(t, 16<<20, 2<<20, 64<<10)
	p, err := Open(ctx, Source{Dir: dir}, Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := p.CreateThin(ctx, 1); err != nil {
		t.Fatal(err)
	}
	if err := p.CreateSnap(ctx, 2, 1); err != nil {
		t.Fatal(err)
	}
	w, err := p.Open(ctx, 1, engine.OpenOptions{SizeBytes: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	r, err := p.Open(ctx, 2, engine.OpenOptions{SizeBytes: 1 << 20, ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	user, err := os.OpenFile(w.(*Thin).Node(), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer user.Close()
	nodes := []string{w.(*Thin).Node(), r.(*Thin).Node()}
	for _, d := range []engine.Thin{w, r} {
		d.(*Thin).KeepNode(true)
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := user.WriteAt([]byte("alone"), 0); err != nil {
		t.Fatal(err)
	}
	if err := user.Sync(); err != nil {
		t.Fatal(err)
	}
	if p, err = Open(ctx, Source{Dir: dir}, Options{}); err != nil {
		t.Fatal(err)
	}
	if w, err = p.Open(ctx, 1, engine.OpenOptions{SizeBytes: 1 << 20}); err != nil {
		t.Fatal(err)
	}
	if r, err = p.Open(ctx, 2, engine.OpenOptions{SizeBytes: 1 << 20, ReadOnly: true}); err != nil {
		t.Fatal(err)
	}
	if err := r.(*Thin).AdoptNode(nodes[0]); err == nil {
		t.Error("a node of another device was adopted")
	}
	for i, d := range []engine.Thin{w, r} {
		if err := d.(*Thin).AdoptNode(nodes[i]); err != nil {
			t.Fatal(err)
		}
		if got := d.(*Thin).Node(); got != nodes[i] {
			t.Errorf("node %s, want %s", got, nodes[i])
		}
	}
	b := make([]byte, 5)
	if _, err := w.ReadAt(b, 0); err != nil || string(b) != "alone" {
		t.Errorf("read %q, %v", b, err)
	}
	// Somebody has it open: it cannot be deleted, and goes with its last user.
	if err := w.Close(); !errors.Is(err, engine.ErrInUse) {
		t.Errorf("close a device whose node is open: %v, want ErrInUse", err)
	}
	if err := p.Delete(ctx, 1); !errors.Is(err, engine.ErrInUse) {
		t.Errorf("delete a device whose node is open: %v, want ErrInUse", err)
	}
	user.Close()
	deadline := time.Now().Add(10 * time.Second)
	for err = p.Delete(ctx, 1); err != nil && time.Now().Before(deadline); err = p.Delete(ctx, 1) {
		time.Sleep(10 * time.Millisecond)
	}
	if err != nil {
		t.Error(err)
	}
	if err := errors.Join(r.Close(), p.Close()); err != nil {
		t.Fatal(err)
	}
	if left := leftOver(t); len(left) > 0 {
		t.Errorf("left in the kernel: %v", left)
	}
}

// stacks tells what the threads of a process wait for in the kernel.
func stacks(pid int) string {
	var out strings.Builder
	tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stack", pid))
	for _, f := range tasks {
		b, _ := os.ReadFile(f)
		fmt.Fprintf(&out, "%s\n%s\n", f, b)
	}
	return out.String()
}
