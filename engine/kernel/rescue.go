package kernel

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"mica/internal/dmioctl"
)

// Rescue lets go on what a process held back when it was killed: a snapshot and a trim suspend
// devices for a moment, and a process that is killed in that moment leaves them so. If it has
// requests of its own to them under way, it cannot die, and keeps its locks, until somebody
// resumes them; so whoever waits for its locks calls this. It does nothing while the process lives,
// and nothing while one of its threads is still in a call to device-mapper.
func Rescue(src Source, pid int) error {
	if pid <= 0 || !dying(pid) {
		return nil
	}
	dm, err := dmioctl.Open()
	if err != nil {
		return nil // nothing can be suspended here
	}
	defer dm.Close()
	var id string
	if src.Pool == "" {
		id, err = identityOf(src.metadataPath())
	} else {
		_, id, err = identityOfActive(dm, src.Pool)
	}
	if err != nil {
		return err
	}
	list, err := dm.List()
	if err != nil {
		return err
	}
	var errs []error
	for name := range list {
		if !strings.HasPrefix(name, prefix+id+"-") {
			continue
		}
		info, err := dm.Info(name)
		if err != nil || !info.Suspended() || info.UUID != name || !info.Live() {
			continue
		}
		if err := dm.Resume(name); err != nil && !errors.Is(err, unix.ENXIO) {
			errs = append(errs, fmt.Errorf("resume %s, which a dying process has left suspended: %w", name, err))
		}
	}
	return errors.Join(errs...)
}

// dying reports whether a process has been killed and waits for nothing but I/O: SIGKILL is
// pending or its first thread is gone, and no thread is in an ioctl.
func dying(pid int) bool {
	proc := filepath.Join("/proc", strconv.Itoa(pid))
	status, err := os.ReadFile(filepath.Join(proc, "status"))
	if err != nil {
		return false
	}
	killed := false
	for line := range strings.Lines(string(status)) {
		key, value, _ := strings.Cut(line, ":")
		value = strings.TrimSpace(value)
		switch key {
		case "State":
			killed = killed || strings.HasPrefix(value, "Z")
		case "SigPnd", "ShdPnd":
			mask, err := strconv.ParseUint(value, 16, 64)
			killed = killed || err == nil && mask&(1<<(unix.SIGKILL-1)) != 0
		}
	}
	if !killed {
		return false
	}
	calls, _ := filepath.Glob(filepath.Join(proc, "task/*/syscall"))
	for _, f := range calls {
		b, err := os.ReadFile(f)
		if err != nil {
			continue // it is gone
		}
		nr, _, _ := strings.Cut(strings.TrimSpace(string(b)), " ")
		if nr == "running" || nr == strconv.Itoa(unix.SYS_IOCTL) {
			return false
		}
	}
	return true
}
