package daemon

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"mica/daemon/config"
)

// BecomeIOFlusher makes this process one that memory reclaim must not wait for: its own I/O is
// what frees memory (PR_SET_IO_FLUSHER). The state belongs to a thread and goes on to its
// children, so it is set here and the program begins again as exe; the second time there is
// nothing to do. It returns an error, and the program goes on without, where the kernel or
// the user does not allow it.
func BecomeIOFlusher(exe string, argv, env []string) error {
	if isIOFlusher() {
		return nil
	}
	if os.Getenv(flusherMark) != "" {
		return errors.New("PR_SET_IO_FLUSHER did not last over exec")
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := unix.Prctl(unix.PR_SET_IO_FLUSHER, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("PR_SET_IO_FLUSHER: %w", err)
	}
	return fmt.Errorf("exec %s: %w", exe, unix.Exec(exe, argv, append(env, flusherMark+"=1")))
}

// flusherMark in the environment says that the program has begun again.
const flusherMark = "MICA_IO_FLUSHER"

func isIOFlusher() bool {
	n, err := unix.PrctlRetInt(unix.PR_GET_IO_FLUSHER, 0, 0, 0, 0)
	return err == nil && n == 1
}

// SetName gives the process the name that ps and pgrep show.
func SetName(name string) { _ = os.WriteFile("/proc/self/comm", []byte(name), 0) }

// limitMemory bounds the daemon's heap: the budget of the design, or the configured one. It
// returns the limit in bytes. It is a soft limit: over it the garbage collector works
// harder.
func limitMemory(c config.Limits, dataBlocks uint64) int64 {
	limit := int64(c.Memory)
	if limit == 0 {
		limit = 192<<20 + 2*int64(c.TableCache) + 2*int64(dataBlocks)
	}
	debug.SetMemoryLimit(limit)
	debug.SetGCPercent(75)
	return limit
}

// anonymousMemory is RssAnon of this process in bytes, 0 if unknown.
func anonymousMemory() int64 {
	f, err := os.Open("/proc/self/status")
	if err != nil {
		return 0
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		if v, ok := strings.CutPrefix(s.Text(), "RssAnon:"); ok {
			n, _ := strconv.ParseInt(strings.Fields(v)[0], 10, 64)
			return n << 10
		}
	}
	return 0
}

// initialPIDNamespace is the number of the host's PID namespace (PROC_PID_INIT_INO of the kernel).
const initialPIDNamespace = "pid:[4026531836]"

// hostNamespaces says whether this process sees the host's processes and mounts: "yes", "no" with
// the reason, or "unknown". In the host's PID namespace the mounts of process 1 are the host's;
// in another one nothing can be told about the host, except that this is not it.
func hostNamespaces() (state, why string) {
	pid, err := os.Readlink("/proc/self/ns/pid")
	if err != nil {
		return "unknown", err.Error()
	}
	if pid != initialPIDNamespace {
		return "unknown", "the daemon runs in a PID namespace of its own: it can name mounts and processes that hold a device only inside it"
	}
	mine, err1 := os.Readlink("/proc/self/ns/mnt")
	host, err2 := os.Readlink("/proc/1/ns/mnt")
	if err := errors.Join(err1, err2); err != nil {
		return "unknown", "it cannot be told whether the daemon is in the host's mount namespace: " + err.Error()
	}
	if mine != host {
		return "no", fmt.Sprintf("the daemon runs in a mount namespace of its own (%s, process 1 is in %s): start it as a host service", mine, host)
	}
	return "yes", ""
}
