package fuse

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// A roll is a file with the processes that have helped the exporters of a run directory. A helper that
// waits for a device may outlive its exporter for a moment, and put a loop device on a file that the
// next exporter is clearing away: that one waits for the helpers in the roll.
type roll struct {
	path string

	mu   sync.Mutex
	last int // guarded by mu; the process that was entered last
}

func rollOf(runDir string) *roll { return &roll{path: filepath.Join(runDir, "fuse-helpers")} }

// enter adds a process, before its first call.
func (r *roll) enter(pid int) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if pid == 0 || pid == r.last {
		return nil
	}
	f, err := os.OpenFile(r.path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintln(f, pid)
	if err = errors.Join(err, f.Close()); err == nil {
		r.last = pid
	}
	return err
}

// read returns the processes.
func (r *roll) read() (pids []int, err error) {
	f, err := os.Open(r.path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	s := bufio.NewScanner(f)
	for s.Scan() {
		if pid, err := strconv.Atoi(s.Text()); err == nil && pid > 0 {
			pids = append(pids, pid)
		}
	}
	return pids, s.Err()
}

// clear empties the roll: nothing of a predecessor is left.
func (r *roll) clear() error {
	err := os.Remove(r.path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return err
}

// helperWait is how long clean waits for the helper of a predecessor, which is dying too.
const helperWait = 3 * time.Second

// waitGone waits until no thread of a helper makes the call of that tag any more.
func waitGone(pid int, tag string, limit time.Duration) {
	for deadline := time.Now().Add(limit); time.Now().Before(deadline) && tagged(pid, tag); {
		<-time.After(time.Millisecond)
	}
}

// tagged reports whether a thread of a process has that name and has not ended.
func tagged(pid int, tag string) bool {
	task := fmt.Sprintf("/proc/%d/task", pid)
	threads, _ := os.ReadDir(task)
	return slices.ContainsFunc(threads, func(t os.DirEntry) bool {
		b, err := os.ReadFile(filepath.Join(task, t.Name(), "stat"))
		// "tid (name) S ...", Z or X when it has ended
		_, rest, found := strings.Cut(string(b), "("+tag+") ")
		return err == nil && found && !strings.HasPrefix(rest, "Z") && !strings.HasPrefix(rest, "X")
	})
}
