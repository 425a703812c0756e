package holder

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// DefaultIdle is how long a holder lives without descriptors and connections.
const DefaultIdle = 30 * time.Second

// maxEntries bounds what one holder keeps.
const maxEntries = 1 << 16

// Run is the whole life of a holder process: it listens on socket, holds, and returns when there
// has been nothing to do for DefaultIdle, on request, or when ctx ends. It changes the process:
// directory, standard descriptors, inherited descriptors. Another holder on the same socket makes
// it return nil at once.
func Run(ctx context.Context, socket string) error {
	return run(ctx, socket, DefaultIdle, true)
}

type holder struct {
	idle time.Duration

	mu      sync.Mutex
	entries map[string]entry                // guarded by mu
	conns   map[*net.UnixConn]chan struct{} // guarded by mu; closed when its last message is done
	timer   *time.Timer                     // guarded by mu; runs while there is nothing to do
	stopped bool                            // guarded by mu
	quit    chan struct{}                   // closed by stop
	wg      sync.WaitGroup                  // connections
}

type entry struct {
	fd   int
	blob json.RawMessage
}

func run(ctx context.Context, socket string, idle time.Duration, process bool) error {
	socket, err := filepath.Abs(socket)
	if err != nil {
		return err
	}
	lock, err := os.OpenFile(socket+".lock", os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return fmt.Errorf("holder: %w", err)
	}
	defer lock.Close()
	if mine, err := lockOrFind(ctx, lock, socket); !mine {
		return err
	}
	// The lock is ours, so a socket that is there belongs to nobody.
	if err := os.Remove(socket); err != nil && !os.IsNotExist(err) {
		return fmt.Errorf("holder: %w", err)
	}
	old := unix.Umask(0o177)
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: socket, Net: "unixpacket"})
	unix.Umask(old)
	if err != nil {
		return fmt.Errorf("holder: %w", err)
	}
	defer l.Close() // removes the socket
	if process {
		if err := detach(); err != nil {
			return err
		}
	}

	h := &holder{idle: idle, entries: make(map[string]entry), conns: make(map[*net.UnixConn]chan struct{}), quit: make(chan struct{})}
	h.timer = time.AfterFunc(idle, h.expire)
	h.wg.Add(1)
	go h.accept(l)
	select {
	case <-ctx.Done():
		h.stop()
	case <-h.quit:
	}
	l.Close()
	h.wg.Wait()
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, e := range h.entries {
		unix.Close(e.fd)
	}
	return nil
}

// lockOrFind takes the lock, or finds that another holder answers on the socket. One that has the
// lock and does not answer is starting or ending: it is waited for.
func lockOrFind(ctx context.Context, lock *os.File, socket string) (mine bool, err error) {
	deadline := time.Now().Add(answerTime / 2)
	for {
		err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return true, nil
		}
		if err != unix.EWOULDBLOCK && err != unix.EINTR {
			return false, fmt.Errorf("holder: lock %s: %w", lock.Name(), err)
		}
		if c, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: socket, Net: "unixpacket"}); err == nil {
			c.Close()
			return false, nil
		}
		if time.Now().After(deadline) {
			return false, fmt.Errorf("holder: %s is locked by a process that does not answer", lock.Name())
		}
		select {
		case <-ctx.Done():
			return false, ctx.Err()
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// detach lets go of everything that this process got from its parent. Closing the inherited
// descriptors tells Start that the socket is there.
func detach() error {
	if err := unix.Chdir("/"); err != nil {
		return fmt.Errorf("holder: %w", err)
	}
	// The kernel must not choose the process that all I/O of the host's containers hangs on.
	os.WriteFile("/proc/self/oom_score_adj", []byte("-900"), 0)
	null, err := unix.Open("/dev/null", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("holder: %w", err)
	}
	for fd := range 3 {
		if err := unix.Dup3(null, fd, 0); err != nil && err != unix.EINVAL {
			return fmt.Errorf("holder: %w", err)
		}
	}
	if null > 2 {
		unix.Close(null)
	}
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return fmt.Errorf("holder: %w", err)
	}
	var inherited []int
	for _, f := range fds {
		fd, err := strconv.Atoi(f.Name())
		if err != nil || fd < 3 {
			continue
		}
		// Everything opened in this process is close-on-exec; what is not was inherited.
		if flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err == nil && flags&unix.FD_CLOEXEC == 0 {
			inherited = append(inherited, fd)
		}
	}
	slices.Sort(inherited)
	for _, fd := range slices.Backward(inherited) { // the starter's pipe, 3, last
		unix.Close(fd)
	}
	return nil
}

func (h *holder) accept(l *net.UnixListener) {
	defer h.wg.Done()
	for {
		c, err := l.AcceptUnix()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			// Out of descriptors, or a peer that went away. Try again a little later.
			select {
			case <-h.quit:
				return
			case <-time.After(50 * time.Millisecond):
			}
			continue
		}
		if checkPeer(c) != nil {
			c.Close()
			continue
		}
		h.mu.Lock()
		if h.stopped {
			h.mu.Unlock()
			c.Close()
			continue
		}
		h.conns[c] = make(chan struct{})
		h.touchLocked()
		h.wg.Add(1)
		h.mu.Unlock()
		go h.serve(c)
	}
}

// touchLocked starts or stops the clock of an idle holder.
func (h *holder) touchLocked() {
	if len(h.conns) == 0 && len(h.entries) == 0 {
		h.timer.Reset(h.idle)
	} else {
		h.timer.Stop()
	}
}

func (h *holder) expire() {
	h.mu.Lock()
	idle := len(h.conns) == 0 && len(h.entries) == 0
	h.mu.Unlock()
	if idle {
		h.stop()
	}
}

// stop ends all connections and run. Idempotent.
func (h *holder) stop() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.stopped {
		return
	}
	h.stopped = true
	h.timer.Stop()
	for c := range h.conns {
		c.Close()
	}
	close(h.quit)
}

func (h *holder) serve(c *net.UnixConn) {
	defer h.wg.Done()
	defer func() {
		c.Close()
		h.mu.Lock()
		defer h.mu.Unlock()
		close(h.conns[c])
		delete(h.conns, c)
		if !h.stopped {
			h.touchLocked()
		}
	}()
	buf := make([]byte, maxPacket)
	for {
		var m message
		fd, err := receive(c, buf, &m)
		var bad *badMessage
		if errors.As(err, &bad) {
			if send(c, failed(err), -1) != nil {
				return
			}
			continue
		}
		if err != nil {
			return
		}
		if m.Op == "list" || m.Op == "get" {
			h.drain(c)
		}
		a, out := h.handle(m, fd)
		err = send(c, a, out)
		if err != nil {
			return
		}
		if m.Op == "quit" && a.Code == "" {
			h.stop()
			return
		}
	}
}

// drain waits until the last messages of peers that are gone are done, so that whoever asks what
// is held sees what a dead process had put.
func (h *holder) drain(self *net.UnixConn) {
	h.mu.Lock()
	var wait []chan struct{}
	for c, done := range h.conns {
		if c != self && hungUp(c) {
			wait = append(wait, done)
		}
	}
	h.mu.Unlock()
	for _, done := range wait {
		select {
		case <-done:
		case <-time.After(answerTime / 4):
			return
		}
	}
}

// hungUp reports whether the other end of c is closed, whatever is still to be read.
func hungUp(c *net.UnixConn) bool {
	raw, err := c.SyscallConn()
	if err != nil {
		return false
	}
	hup := false
	raw.Control(func(fd uintptr) {
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}}
		n, err := unix.Poll(p, 0)
		hup = err == nil && n == 1 && p[0].Revents&(unix.POLLRDHUP|unix.POLLHUP|unix.POLLERR) != 0
	})
	return hup
}

// handle does one message. It owns fd. out is the descriptor to send back, still ours.
func (h *holder) handle(m message, fd int) (a answer, out int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	defer func() {
		if fd >= 0 {
			unix.Close(fd)
		}
		if !h.stopped {
			h.touchLocked()
		}
	}()
	if m.Op != "list" && m.Op != "quit" && m.Op != "ping" && (m.Name == "" || len(m.Name) > maxName) {
		return failed(fmt.Errorf("name of %d bytes: want 1 to %d", len(m.Name), maxName)), -1
	}
	if len(m.Blob) > maxBlob {
		return failed(fmt.Errorf("blob of %d bytes: at most %d", len(m.Blob), maxBlob)), -1
	}
	e, found := h.entries[m.Name]
	switch m.Op {
	case "put":
		if fd < 0 {
			return failed(fmt.Errorf("put %q: no descriptor", m.Name)), -1
		}
		if !found && len(h.entries) >= maxEntries {
			return failed(fmt.Errorf("put %q: %d descriptors held already", m.Name, len(h.entries))), -1
		}
		if found {
			unix.Close(e.fd)
		}
		h.entries[m.Name] = entry{fd: fd, blob: m.Blob}
		fd = -1
	case "blob":
		if !found {
			return failed(ErrNotFound), -1
		}
		e.blob = m.Blob
		h.entries[m.Name] = e
	case "get":
		if !found {
			return failed(ErrNotFound), -1
		}
		return answer{Blob: e.blob}, e.fd
	case "drop":
		if !found {
			return failed(ErrNotFound), -1
		}
		delete(h.entries, m.Name)
		unix.Close(e.fd)
	case "ping":
	case "list":
		return h.listLocked(m.Name), -1
	case "quit":
		if len(h.entries) > 0 && !m.Force {
			return failed(ErrHolding), -1
		}
	default:
		return failed(fmt.Errorf("unknown operation %q", m.Op)), -1
	}
	return answer{}, -1
}

// listLocked lists the entries after a name, as many as fit a packet.
func (h *holder) listLocked(after string) answer {
	var a answer
	bytes := 0
	for _, name := range slices.Sorted(maps.Keys(h.entries)) {
		if name <= after {
			continue
		}
		if bytes > listBytes {
			a.More = true
			break
		}
		e := Entry{Name: name, Blob: h.entries[name].blob}
		bytes += 6*len(name) + len(e.Blob) + 32
		a.Entries = append(a.Entries, e)
	}
	return a
}
