package vm

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"mica/internal/vm/wire"
)

func TestMachine(t *testing.T) {
	disk := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(disk, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	m := Start(t, Config{
		Disks:   []Disk{{Path: disk}},
		Modules: []string{"dm-thin-pool", "dm-flakey", "dm-log-writes", "nbd", "ublk_drv", "loop", "brd"},
		CPUs:    2,
		Trace:   func(line string) { t.Log("console:", line) },
	})

	t.Run("streams and status", func(t *testing.T) {
		res, err := m.Run(context.Background(), wire.Command{
			Args: []string{"sh", "-c", "cat; echo err >&2; exit 7"}, Stdin: []byte("in")})
		if err != nil {
			t.Fatal(err)
		}
		if res.Code != 7 || string(res.Stdout) != "in" || string(res.Stderr) != "err\n" {
			t.Errorf("got status %d, stdout %q, stderr %q", res.Code, res.Stdout, res.Stderr)
		}
	})
	t.Run("signal", func(t *testing.T) {
		res, err := m.Run(context.Background(), wire.Command{Args: []string{"sh", "-c", "kill -9 $$"}})
		if err != nil || res.Code != 128+9 {
			t.Errorf("got status %d, error %v; want 137", res.Code, err)
		}
	})
	t.Run("no such program", func(t *testing.T) {
		_, err := m.Run(context.Background(), wire.Command{Args: []string{"/bin/nothing"}})
		if err == nil || !strings.Contains(err.Error(), "/bin/nothing") {
			t.Errorf("got error %v", err)
		}
	})
	t.Run("modules", func(t *testing.T) {
		out := string(m.MustRun(t, "cat", "/proc/modules"))
		for _, want := range []string{"dm_thin_pool ", "dm_flakey ", "dm_log_writes ", "nbd ", "ublk_drv ", "loop "} {
			if !strings.Contains(out, want) {
				t.Errorf("module %sis not loaded", want)
			}
		}
	})
	t.Run("disk", func(t *testing.T) {
		m.MustRun(t, "sh", "-c", "printf hello | dd of=/dev/vda bs=512 seek=3 conv=sync,fsync 2>/dev/null")
		got, err := os.ReadFile(disk)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.HasPrefix(got[3*512:], []byte("hello\x00")) {
			t.Errorf("sector 3 holds %q", got[3*512:][:8])
		}
	})
	t.Run("resize", func(t *testing.T) {
		for _, size := range []int64{3 << 20, 1 << 19} {
			if err := m.Resize(context.Background(), 0, size); err != nil {
				t.Fatal(err)
			}
			if st, err := os.Stat(disk); err != nil || st.Size() != size {
				t.Errorf("the file has %v (%v), want %d bytes", st, err, size)
			}
		}
		if err := m.Resize(context.Background(), 7, 1<<20); err == nil {
			t.Error("a disk that does not exist was resized")
		}
	})
	t.Run("large output", func(t *testing.T) {
		out := m.MustRun(t, "dd", "if=/dev/zero", "bs=1M", "count=8")
		if len(out) != 8<<20 {
			t.Errorf("got %d bytes, want 8 MiB", len(out))
		}
	})
}

func TestDeadlineKillsTheMachine(t *testing.T) {
	m := Start(t, Config{})
	ctx, cancel := context.WithTimeout(context.Background(), 200*time.Millisecond)
	defer cancel()
	if _, err := m.Run(ctx, wire.Command{Args: []string{"sleep", "100"}}); err == nil {
		t.Error("a command of 100 s ended well within 200 ms")
	}
	if _, err := m.Run(context.Background(), wire.Command{Args: []string{"true"}}); err == nil {
		t.Error("a killed machine ran a command")
	}
}
