package helper

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// maxRequest bounds the request line in bytes.
const maxRequest = 128 << 10

// streamFD is the descriptor of file contents.
const streamFD = 3

// Run is the helper role: one operation, asked on stdin, answered on stdout. Errors of the
// operation are answers; Run's own error means that there was nobody to answer to.
func Run(ctx context.Context, stdin io.Reader, stdout io.Writer, args []string) error {
	if len(args) > 0 {
		return fmt.Errorf("helper: unexpected argument %q", args[0])
	}
	in := bufio.NewReaderSize(stdin, 4096)
	line, err := readLine(in)
	if err != nil {
		return fmt.Errorf("helper: request: %w", err)
	}
	h := &job{in: in, out: json.NewEncoder(stdout)}
	if err := json.Unmarshal(line, &h.req); err != nil {
		return fmt.Errorf("helper: request: %w", err)
	}
	resp, err := h.do(ctx)
	if err != nil {
		resp = Response{Err: toWire(err)}
	}
	resp.Warnings = h.warnings
	return h.out.Encode(resp)
}

func readLine(in *bufio.Reader) ([]byte, error) {
	var line []byte
	for {
		part, err := in.ReadSlice('\n')
		line = append(line, part...)
		if len(line) > maxRequest {
			return nil, fmt.Errorf("longer than %d bytes", maxRequest)
		}
		if errors.Is(err, bufio.ErrBufferFull) {
			continue
		}
		return line, err
	}
}

// A job is one operation under way.
type job struct {
	req      Request
	in       *bufio.Reader // after the request: a line or the end means "stop"
	out      *json.Encoder
	mounts   []string // what is mounted, in order
	scratch  bool     // a tmpfs is mounted on req.Dir
	record   *os.File // of a freeze, locked until the end
	warnings []string
}

// warn keeps the first few warnings.
func (h *job) warn(name, what string) {
	if len(h.warnings) < 20 {
		h.warnings = append(h.warnings, name+": "+what)
	}
}

func (h *job) do(ctx context.Context) (resp Response, err error) {
	switch h.req.Op {
	case opMount:
		return resp, h.hostMount()
	case opUmount:
		return resp, hostUnmount(h.req.Target)
	}
	if err := enterNamespace(h.req.Dir); err != nil {
		return resp, err
	}
	defer func() {
		if e := h.unmountAll(); err == nil {
			err = e
		}
	}()
	switch h.req.Op {
	case opMkfs:
		return resp, h.mkfs(ctx)
	case opApply:
		return h.apply(ctx)
	case opDiff:
		return h.diff(ctx)
	case opFreeze:
		return h.freeze()
	case opThaw:
		return h.thaw()
	case opReplay:
		return h.replay()
	case opGrow:
		return resp, h.grow(ctx)
	case opTrim:
		return h.trim()
	case opProbe:
		resp.State, err = probe(h.req.Node)
		return resp, err
	}
	return resp, fmt.Errorf("unknown operation %q", h.req.Op)
}

// enterNamespace makes sure that this process has a mount namespace of its own, and that its
// mounts stay in it. The namespace comes from whoever started it (Client clones it): all threads
// of a process must be in the same one, which a running Go program cannot arrange.
func enterNamespace(dir string) error {
	mine, err := os.Readlink("/proc/self/ns/mnt")
	if err != nil {
		return err
	}
	if theirs, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/mnt", os.Getppid())); err == nil && mine == theirs {
		return errors.New("helper was started in the mount namespace of its parent")
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	dropMounts(dir)
	return nil
}

// dropMounts takes the mounts of exported devices out of this namespace: where the host's mounts
// are private, what it unmounts would live on here. Not those that lead to dir or to the tools.
func dropMounts(dir string) {
	keep := []string{dir, "/usr/sbin", "/usr/bin", "/usr/lib", "/lib", "/lib64", "/bin", "/sbin", "/etc", "/dev", "/proc"}
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return
	}
	for line := range strings.Lines(string(text)) {
		before, after, ok := strings.Cut(line, " - ")
		f, g := strings.Fields(before), strings.Fields(after)
		if !ok || len(f) < 5 || len(g) < 2 {
			continue
		}
		at := unescape(f[4])
		if slices.ContainsFunc(keep, func(k string) bool { return at == "/" || k == at || strings.HasPrefix(k, at+"/") }) {
			continue
		}
		for _, p := range []string{"/dev/loop", "/dev/mica/", "/dev/nbd", "/dev/ublkb"} {
			if strings.HasPrefix(g[1], p) {
				unix.Unmount(at, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
			}
		}
	}
}

// unescape undoes the octal escapes of mountinfo.
func unescape(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// stream is the descriptor for file contents.
func stream() (*os.File, error) {
	var st unix.Stat_t
	if err := unix.Fstat(streamFD, &st); err != nil || st.Mode&syscall.S_IFMT != syscall.S_IFIFO {
		return nil, fmt.Errorf("descriptor %d is not a pipe", streamFD)
	}
	unix.CloseOnExec(streamFD)
	return os.NewFile(streamFD, "stream"), nil
}
