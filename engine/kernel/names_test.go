package kernel

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"mica/dev"
	"mica/thin"
)

func TestNames(t *testing.T) {
	const id = "0123456789"
	for _, c := range []struct {
		name     string
		dev      thin.DevID
		readOnly bool
		ok       bool
	}{
		{thinName(id, 0), 0, false, true},
		{thinName(id, 1<<24-1), 1<<24 - 1, false, true},
		{viewName(id, 65537, 12), 65537, true, true},
		{poolName(id), 0, false, false},
		{thinName("another", 7), 0, false, false},
		{"mica-0123456789-16777216", 0, false, false},
		{"mica-0123456789--1", 0, false, false},
		{"mica-0123456789-", 0, false, false},
		{"vg-pool", 0, false, false},
	} {
		dev, ro, ok := parseThinName(id, c.name)
		if ok != c.ok || ok && (dev != c.dev || ro != c.readOnly) {
			t.Errorf("%s: device %d, read-only %v, %v", c.name, dev, ro, ok)
		}
	}
	for _, name := range []string{thinName(id, 1<<24-1), viewName(id, 1<<24-1, 1<<64-1), poolName(id)} {
		if len(name) > 127 {
			t.Errorf("%s is too long for device-mapper", name)
		}
	}
}

// TestIdentity: that of a file stays when it is moved, and differs from another's.
func TestIdentity(t *testing.T) {
	dir := t.TempDir()
	a, b := filepath.Join(dir, "a"), filepath.Join(dir, "b")
	for _, f := range []string{a, b} {
		if err := os.WriteFile(f, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	ia, err := identityOf(a)
	if err != nil {
		t.Fatal(err)
	}
	if ib, err := identityOf(b); err != nil || ib == ia {
		t.Errorf("two files are %s and %s, %v", ia, ib, err)
	}
	moved := filepath.Join(dir, "moved")
	if err := os.Rename(a, moved); err != nil {
		t.Fatal(err)
	}
	if im, err := identityOf(moved); err != nil || im != ia {
		t.Errorf("the moved file is %s, was %s, %v", im, ia, err)
	}
	if _, err := identityOf(a); err == nil {
		t.Error("a file that is gone has an identity")
	}
}

func TestSources(t *testing.T) {
	for _, s := range []Source{{}, {Dir: "d", Pool: "p"}, {Dir: "d", Data: "x", Metadata: "y"}, {Data: "x"}, {Metadata: "y"}, {Pool: "p", Data: "x"}} {
		if err := s.check(); err == nil {
			t.Errorf("%+v is taken for a pool", s)
		}
	}
	for _, s := range []Source{{Dir: "d"}, {Data: "x", Metadata: "y"}, {Pool: "p"}} {
		if err := s.check(); err != nil || s.String() == "" {
			t.Errorf("%+v: %v", s, err)
		}
	}
}

// TestNameLocks: several ids are taken without a deadlock, whatever their order.
func TestNameLocks(t *testing.T) {
	var n names
	var wg sync.WaitGroup
	var inside [4]int
	for i := range 50 {
		wg.Go(func() {
			a, b := thin.DevID(i%4), thin.DevID(i/4%4)
			unlock := n.lock(a, b, a)
			inside[a]++
			if b != a {
				inside[b]++
			}
			unlock()
		})
	}
	wg.Wait()
	if len(n.held) != 0 {
		t.Errorf("%d locks are left", len(n.held))
	}
}

func TestExtentsOfMappings(t *testing.T) {
	const bs = 64 << 10
	x := extents{t: &Thin{p: &Pool{bs: bs}}, at: 1000, end: 10*bs + 5}
	for _, vb := range []thin.VBlock{0, 1, 4, 10} {
		x.mapped(thin.Entry{VBlock: vb})
	}
	want := []dev.Extent{{Off: 1000, Len: 2*bs - 1000}, {Off: 2 * bs, Len: 2 * bs, Hole: true, Zero: true},
		{Off: 4 * bs, Len: bs}, {Off: 5 * bs, Len: 5 * bs, Hole: true, Zero: true}, {Off: 10 * bs, Len: 5}}
	got := x.finish()
	if len(got) != len(want) {
		t.Fatalf("%+v, want %+v", got, want)
	}
	for i := range got {
		if got[i] != want[i] {
			t.Errorf("extent %d: %+v, want %+v", i, got[i], want[i])
		}
	}
	if x.mapped(thin.Entry{VBlock: 11}) {
		t.Error("it goes on behind its end")
	}
}

// TestDying: this process is not; a file that is not there is nobody's.
func TestDying(t *testing.T) {
	if dying(os.Getpid()) {
		t.Error("this process is dying")
	}
	if dying(1 << 30) {
		t.Error("a process that is not there is dying")
	}
	if err := Rescue(Source{Dir: "/no/such/dir"}, os.Getpid()); err != nil {
		t.Error(err)
	}
}

// TestWithoutDeviceMapper: where there is none, the error says what to do, and nothing is active.
func TestWithoutDeviceMapper(t *testing.T) {
	err := Available()
	if err == nil {
		t.Skip("this host has device-mapper")
	}
	if !strings.Contains(err.Error(), "use the user engine") {
		t.Errorf("%v", err)
	}
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "metadata"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if active, err := Active(Source{Dir: dir}); active || err != nil {
		t.Errorf("active: %v, %v", active, err)
	}
	if err := Deactivate(context.Background(), Source{Dir: dir}, 1); err != nil {
		t.Error(err)
	}
}
