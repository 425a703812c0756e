package bench

import (
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// program builds the mica program once for all tests.
var program = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "mica-bench-test-")
	if err != nil {
		return "", err
	}
	exe := filepath.Join(dir, "mica")
	out, err := exec.Command("go", "build", "-o", exe, "mica/cmd/mica").CombinedOutput()
	if err != nil {
		return "", &buildError{err, string(out)}
	}
	return exe, nil
})

type buildError struct {
	err error
	out string
}

func (e *buildError) Error() string { return e.err.Error() + ": " + e.out }

func TestMain(m *testing.M) {
	code := m.Run()
	if exe, err := program(); err == nil {
		os.RemoveAll(filepath.Dir(exe))
	}
	os.Exit(code)
}

// TestQuickRun runs every part as `mica bench --quick --only PART` does: the command works, each
// cell of each table is measured, and nothing is left behind.
func TestQuickRun(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("SKIPPED: needs root, for mounts and loop devices")
	}
	for _, name := range []string{"fio", "nbdkit", "qemu-nbd", "qemu-storage-daemon"} {
		if _, err := exec.LookPath(name); err != nil {
			t.Skipf("SKIPPED: needs %s (scripts/setup.sh bench)", name)
		}
	}
	exe, err := program()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range parts {
		t.Run(p.id, func(t *testing.T) {
			t.Parallel()
			dir, err := os.MkdirTemp("/dev/shm", "mica-bench-smoke-")
			if err != nil {
				t.Fatal(err)
			}
			defer os.RemoveAll(dir)
			out := t.TempDir()
			ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
			defer cancel()
			c := exec.CommandContext(ctx, exe, "bench", "--quick", "--only", p.id, "--memory", dir, "--dir", t.TempDir(), "--out", out)
			c.Cancel = func() error { return c.Process.Signal(os.Interrupt) }
			c.WaitDelay = 30 * time.Second
			text, err := c.CombinedOutput()
			if err != nil {
				t.Fatalf("%v\n%s", err, text)
			}
			b, err := os.ReadFile(filepath.Join(out, "performance", "results.json"))
			if err != nil {
				t.Fatal(err)
			}
			var res Result
			if err := json.Unmarshal(b, &res); err != nil {
				t.Fatal(err)
			}
			if len(res.Parts) != 1 || len(res.Parts[0].Tables) == 0 {
				t.Fatalf("%d parts: %s", len(res.Parts), text)
			}
			checkTables(t, &res.Parts[0])
			page, err := os.ReadFile(filepath.Join(out, "performance.md"))
			if err != nil || !strings.Contains(string(page), "quick run") {
				t.Errorf("performance.md: %v", err)
			}
			if left, _ := filepath.Glob(filepath.Join(dir, "*")); len(left) > 0 {
				t.Errorf("left behind: %v", left)
			}
			if mounts, err := os.ReadFile("/proc/self/mountinfo"); err != nil || strings.Contains(string(mounts), dir) {
				t.Errorf("a mount below %s is left (%v)", dir, err)
			}
		})
	}
}

// checkTables: each row was measured by mica, and each target names what is there.
func checkTables(t *testing.T, p *Part) {
	for i := range p.Tables {
		tab := &p.Tables[i]
		for k := range tab.Rows {
			r := &tab.Rows[k]
			if len(r.Cells) != len(tab.Columns) {
				t.Errorf("%s, %s: %d cells for %d columns", tab.Title, r.Name, len(r.Cells), len(tab.Columns))
				continue
			}
			measured := false
			for c, name := range tab.Columns {
				if cell := r.Cells[c]; isOwn(name) && len(cell.Samples) > 0 {
					measured = true
				}
			}
			if !measured {
				t.Errorf("%s, %s: mica was not measured", tab.Title, r.Name)
			}
		}
		for _, g := range tab.Targets {
			if _, _, got, _ := tab.verdict(g); got == "not measured" {
				t.Errorf("%s: target %+v was not measured", tab.Title, g)
			}
		}
	}
}
