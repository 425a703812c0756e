// Package peer starts what is measured: servers of block devices, mica's among them, each a
// process of its own with a socket or a block device to work on.
package peer

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"time"
)

// A Server is one running server of one block device.
type Server struct {
	URI  string   // for NBD clients; "" if it serves a node
	Node string   // block device; "" if it serves a URI
	More []string // further block devices
	Self int      // a process that was not started here and serves it; 0: see Pid
	proc *process
	undo []func() error // last first
}

// Pid is the serving process, 0 if the kernel serves.
func (s *Server) Pid() int {
	if s.proc == nil {
		return s.Self
	}
	return s.proc.cmd.Process.Pid
}

// Stop takes everything away that starting has put up, and waits for it.
func (s *Server) Stop() error {
	var errs []error
	for len(s.undo) > 0 {
		last := len(s.undo) - 1
		errs = append(errs, s.undo[last]())
		s.undo = s.undo[:last]
	}
	return errors.Join(errs...)
}

func (s *Server) onStop(f func() error) { s.undo = append(s.undo, f) }

// readyWait bounds the wait for a server's first sign of life, stopWait that for its end.
const (
	readyWait = 20 * time.Second
	stopWait  = 20 * time.Second
)

// A process is a server's process with what it has printed.
type process struct {
	cmd    *exec.Cmd
	stdin  io.Closer
	mu     sync.Mutex
	out    bytes.Buffer // guarded by mu; stdout and stderr
	exited chan struct{}
	err    error // valid after exited
}

func (p *process) Write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.out.Write(b)
}

func (p *process) printed() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.out.String()
}

// start starts a command. Its standard input is a pipe that stays open as long as this process
// lives: a role of mica's ends when it is closed.
func start(name string, args ...string) (*process, error) {
	p := &process{cmd: exec.Command(name, args...), exited: make(chan struct{})}
	p.cmd.Stdout, p.cmd.Stderr = p, p
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // Ctrl-C comes through stop, in order
	var err error
	if p.stdin, err = p.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	go func() {
		p.err = p.cmd.Wait()
		close(p.exited)
	}()
	return p, nil
}

// until waits until ready holds.
func (p *process) until(ctx context.Context, ready func() bool) error {
	ctx, cancel := context.WithTimeout(ctx, readyWait)
	defer cancel()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !ready() {
		select {
		case <-tick.C:
		case <-p.exited:
			return fmt.Errorf("%s ended: %v: %s", p.cmd.Path, p.err, strings.TrimSpace(p.printed()))
		case <-ctx.Done():
			return fmt.Errorf("%s is not ready: %w: %s", p.cmd.Path, ctx.Err(), strings.TrimSpace(p.printed()))
		}
	}
	return nil
}

// stop interrupts the process, and kills it when it does not end.
func (p *process) stop() error {
	p.stdin.Close()
	p.cmd.Process.Signal(os.Interrupt)
	select {
	case <-p.exited:
		return nil
	case <-time.After(stopWait):
		p.cmd.Process.Kill()
		<-p.exited
		return fmt.Errorf("%s did not end within %v and was killed: %s", p.cmd.Path, stopWait, strings.TrimSpace(p.printed()))
	}
}
