// Package vm boots a small machine with a real kernel for tests: QEMU in software emulation, a
// Debian cloud kernel unpacked by scripts/setup.sh, an initramfs made here with a static busybox,
// the kernel's modules and the test's own programs, and raw files as virtio disks.
//
// A machine boots in about ten seconds and then runs any number of commands, so a test file
// starts one and shares it. Disks are ordinary files: between commands the host may read and
// change them, as long as the guest holds no device on them and does not read them through its
// page cache (device-mapper does not; cat /dev/vda does).
//
//	m := vm.Start(t, vm.Config{
//		Disks:   []vm.Disk{{Path: data}, {Path: meta}},
//		Modules: []string{"dm-thin-pool"},
//		Files:   map[string]string{"/bin/prog": vm.Build(t, "mica/internal/cmd/prog")},
//	})
//	out := m.MustRun(t, "/bin/prog", "/dev/vda", "/dev/vdb")
package vm

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"mica/internal/vm/wire"
)

// A Disk is a raw file (or block device) that the guest sees as /dev/vda, /dev/vdb, ... in order.
type Disk struct {
	Path     string
	ReadOnly bool
	// Cache is QEMU's cache mode. Empty means "unsafe": writes reach the file at once, the
	// guest's flushes do not force it to the medium. That is right for everything but tests of
	// the host's power loss.
	Cache string
}

// Config describes a machine.
type Config struct {
	Disks    []Disk
	Modules  []string          // kernel modules beside those the machine needs, dependencies are found
	Files    map[string]string // guest path -> host path, mode 0755
	MemoryMB int               // default 768
	CPUs     int               // default 1
	CPU      string            // QEMU's name of the processor; default "max"
	Cmdline  string            // appended to the kernel's
	// BootTimeout is the limit for Start; default 2 minutes (a boot takes 5 to 15 seconds).
	BootTimeout time.Duration
	// Trace, if not nil, is called with every line of the guest's console.
	Trace func(line string)
}

// A Machine is a running guest. Safe for concurrent use.
//
// Goroutines: the keeper (starts QEMU, waits for its end), the reader (frames from the agent),
// the console reader. All end when QEMU ends; Close waits for them.
type Machine struct {
	Release string // of the guest's kernel

	proc    *os.Process
	out     *wire.Writer
	sock    *os.File
	qmp     *monitor
	disks   int
	done    chan struct{} // closed when QEMU has ended and all readers are done
	console consoleLog

	mu     sync.Mutex
	nextID uint32              // guarded by mu
	calls  map[uint32]*pending // guarded by mu; nil when the machine has ended
}

// A Result is what a command printed and how it ended.
type Result struct {
	Code   int // exit status; 128+n if signal n ended it
	Stdout []byte
	Stderr []byte
}

type pending struct {
	res  Result
	err  error
	done chan struct{}
}

// Boot starts a machine and waits until its agent answers. Close it.
func Boot(ctx context.Context, c Config) (*Machine, error) {
	kit, err := findKit()
	if err != nil {
		return nil, err
	}
	if c.BootTimeout == 0 {
		c.BootTimeout = 2 * time.Minute
	}
	ctx, cancel := context.WithTimeout(ctx, c.BootTimeout)
	defer cancel()

	dir, err := os.MkdirTemp("", "mica-vm-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir) // QEMU has read it all once the guest is up
	m := &Machine{done: make(chan struct{}), calls: map[uint32]*pending{}}
	m.console.trace = c.Trace
	initrd := filepath.Join(dir, "initrd")
	if err := kit.writeInitramfs(ctx, initrd, c); err != nil {
		return nil, err
	}
	hello := make(chan string, 1)
	if err := m.start(kit, initrd, c, hello); err != nil {
		return nil, err
	}
	select {
	case m.Release = <-hello:
		return m, nil
	case <-m.done:
		err = errors.New("the guest ended while booting")
	case <-ctx.Done():
		err = fmt.Errorf("the guest did not come up: %w", ctx.Err())
	}
	m.Kill()
	return nil, fmt.Errorf("test machine: %w; end of its console:\n%s", err, m.console.tail(30))
}

// start launches QEMU and the goroutines that serve it.
func (m *Machine) start(kit *kit, initrd string, c Config, hello chan<- string) error {
	var ours, theirs [2]*os.File // agent, monitor
	for i, name := range []string{"agent", "monitor"} {
		fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("socketpair: %w", err)
		}
		unix.SetNonblock(fds[0], true) // so that Close interrupts a Read
		ours[i] = os.NewFile(uintptr(fds[0]), name)
		theirs[i] = os.NewFile(uintptr(fds[1]), name)
		defer theirs[i].Close()
	}
	m.sock, m.disks = ours[0], len(c.Disks)
	m.out, m.qmp = wire.NewWriter(m.sock), newMonitor(ours[1])
	closeOurs := func() { ours[0].Close(); ours[1].Close() }

	cmd := exec.Command(kit.qemu, kit.args(initrd, c)...)
	cmd.ExtraFiles = theirs[:] // descriptors 3 and 4
	cmd.Stderr = &m.console
	console, err := cmd.StdoutPipe()
	if err != nil {
		closeOurs()
		return err
	}
	// The emulator must not outlive a test that is killed. The death signal follows the thread
	// that forked, so that thread is kept for as long as QEMU lives.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	started := make(chan error)
	go func() { // keeper
		runtime.LockOSThread()
		if err := cmd.Start(); err != nil {
			started <- fmt.Errorf("start %s: %w", kit.qemu, err)
			return
		}
		m.proc = cmd.Process
		started <- nil
		var readers sync.WaitGroup
		readers.Add(2)
		go func() { defer readers.Done(); m.console.readFrom(console, func() { cmd.Process.Kill() }) }()
		go func() { defer readers.Done(); m.readFrames(hello) }()
		state, _ := cmd.Process.Wait() // not cmd.Wait: the console is read to its end first
		closeOurs()
		readers.Wait()
		cmd.Wait()
		m.fail(fmt.Errorf("test machine ended (%v); end of its console:\n%s", state, m.console.tail(30)))
		close(m.done)
	}()
	if err := <-started; err != nil {
		closeOurs()
		return err
	}
	return nil
}

// readFrames hands the agent's frames to the calls that wait for them.
func (m *Machine) readFrames(hello chan<- string) {
	r := bufio.NewReaderSize(m.sock, 256<<10)
	for {
		f, err := wire.Read(r)
		if err != nil {
			return
		}
		if f.Type == wire.Hello {
			hello <- string(f.Payload)
			continue
		}
		m.mu.Lock()
		p := m.calls[f.ID]
		switch {
		case p == nil:
		case f.Type == wire.Stdout:
			p.res.Stdout = append(p.res.Stdout, f.Payload...)
		case f.Type == wire.Stderr:
			p.res.Stderr = append(p.res.Stderr, f.Payload...)
		case f.Type == wire.Exit:
			var s wire.Status
			if p.err = json.Unmarshal(f.Payload, &s); p.err == nil && s.Error != "" {
				p.err = errors.New(s.Error)
			}
			p.res.Code = s.Code
			delete(m.calls, f.ID)
			close(p.done)
		}
		m.mu.Unlock()
	}
}

// fail ends every call with err.
func (m *Machine) fail(err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, p := range m.calls {
		p.err = err
		close(p.done)
	}
	m.calls = nil
}

// Run runs a program in the guest and waits for its end. A non-zero exit status is no error;
// err says that the program could not be started, that the guest died, or that ctx ended. In the
// last case the machine is killed: nobody knows what it was doing.
func (m *Machine) Run(ctx context.Context, c wire.Command) (Result, error) {
	p := &pending{done: make(chan struct{})}
	m.mu.Lock()
	if m.calls == nil {
		m.mu.Unlock()
		return Result{}, errors.New("test machine has ended")
	}
	m.nextID++
	id := m.nextID
	m.calls[id] = p
	m.mu.Unlock()
	if err := m.out.SendJSON(wire.Start, id, c); err != nil {
		m.Kill()
		return Result{}, fmt.Errorf("test machine: %w", err)
	}
	select {
	case <-p.done:
	case <-ctx.Done():
		m.Kill()
		<-p.done
		return p.res, fmt.Errorf("guest command %q: %w; stderr so far: %s; end of the console:\n%s",
			c.Args, ctx.Err(), lastBytes(p.res.Stderr, 2000), m.console.tail(20))
	}
	if p.err != nil {
		return p.res, fmt.Errorf("guest command %q: %w", c.Args, p.err)
	}
	return p.res, nil
}

// Console returns what the guest's kernel has printed so far.
func (m *Machine) Console() string { return m.console.tail(1 << 30) }

// Kill ends the machine at once, as a power cut does, and waits for its end.
func (m *Machine) Kill() {
	m.proc.Signal(syscall.SIGKILL) // by handle: safe also when it has ended
	<-m.done
}

// Close switches the machine off, or kills it if that takes more than 10 seconds. Closing twice
// is fine.
func (m *Machine) Close() {
	m.out.Send(wire.PowerOff, 0, nil)
	select {
	case <-m.done:
	case <-time.After(10 * time.Second):
	}
	m.Kill()
}

// args is QEMU's command line.
func (k *kit) args(initrd string, c Config) []string {
	memory, cpus, cpu := c.MemoryMB, c.CPUs, c.CPU
	if memory == 0 {
		memory = 768
	}
	if cpus == 0 {
		cpus = 1
	}
	if cpu == "" {
		cpu = "max"
	}
	// panic=-1 restarts at once, -no-reboot turns that into the end of the emulator.
	cmdline := "console=ttyS0 quiet loglevel=4 panic=-1 oops=panic rdinit=/init mitigations=off " +
		"nokaslr audit=0 random.trust_cpu=on " +
		// Device-mapper waits for many RCU grace periods; expedited ones are ten times shorter.
		"rcupdate.rcu_expedited=1 " +
		// On a host that is busy the emulator may not run for many seconds; the guest takes that
		// for a processor that is stuck.
		"nosoftlockup rcupdate.rcu_cpu_stall_suppress=1 " + c.Cmdline
	args := []string{
		"-accel", "tcg", "-machine", "q35", "-cpu", cpu, "-smp", strconv.Itoa(cpus), "-m", strconv.Itoa(memory),
		"-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-serial", "stdio",
		"-kernel", k.kernel, "-initrd", initrd, "-append", strings.TrimSpace(cmdline),
		"-device", "virtio-rng-pci",
		"-chardev", "socket,id=monitor,fd=4", "-mon", "chardev=monitor,mode=control",
		"-chardev", "socket,id=agent,fd=3",
		"-device", "virtio-serial-pci", "-device", "virtserialport,chardev=agent,name=" + wire.PortName,
	}
	for i, d := range c.Disks {
		cache := d.Cache
		if cache == "" {
			cache = "unsafe"
		}
		drive := fmt.Sprintf("file=%s,format=raw,if=none,id=d%d,cache=%s,discard=unmap,file.locking=off",
			strings.ReplaceAll(d.Path, ",", ",,"), i, cache)
		if d.ReadOnly {
			drive += ",readonly=on"
		}
		args = append(args, "-drive", drive, "-device", fmt.Sprintf("virtio-blk-pci,drive=d%d", i))
	}
	return args
}

// consoleLog keeps the guest's console by lines. Safe for concurrent use.
type consoleLog struct {
	mu    sync.Mutex
	buf   bytes.Buffer // guarded by mu
	trace func(string)
}

func (l *consoleLog) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

// runaway is how many complaints of a kernel it takes to believe that it does nothing else any
// more: a fault in the handler of a fault never ends.
const runaway = 500

func (l *consoleLog) readFrom(r interface{ Read([]byte) (int, error) }, kill func()) {
	s := bufio.NewReader(r)
	faults := 0
	for {
		line, err := s.ReadString('\n')
		if faults < runaway {
			l.Write([]byte(strings.TrimRight(line, "\r\n") + "\n"))
		}
		if complaint.MatchString(line) {
			if faults++; faults == runaway {
				kill()
			}
		}
		if l.trace != nil && line != "" {
			l.trace(strings.TrimRight(line, "\r\n"))
		}
		if err != nil {
			return
		}
	}
}

// tail returns the last n lines.
func (l *consoleLog) tail(n int) string {
	l.mu.Lock()
	defer l.mu.Unlock()
	lines := strings.Split(strings.TrimRight(l.buf.String(), "\n"), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}

func lastBytes(b []byte, n int) []byte { return b[max(0, len(b)-n):] }
