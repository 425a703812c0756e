package fuse

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"mica/dev"
	"mica/export"
	"mica/export/holder"

	"golang.org/x/sys/unix"
)

// serveRole is a daemon as small as can be: it adopts or attaches "disk", served from a file, and
// says so. A line on its standard input makes it detach, its end makes it hand over.
func serveRole(dir, file string, args []string) error {
	socket := filepath.Join(dir, "holder.sock")
	e, err := New(Options{
		RunDir: filepath.Join(dir, "run"), LinkDir: filepath.Join(dir, "links"),
		HolderSocket: socket, HolderCommand: []string{"/proc/self/exe", "role-holder", socket},
		HelperCommand: []string{"/proc/self/exe", "role-helper"},
	})
	if err != nil {
		return err
	}
	f, err := dev.OpenFile(file, dev.OpenOptions{})
	if err != nil {
		return err
	}
	var d dev.Device = f
	if len(args) > 0 && args[0] == "inline" {
		d = inline(f)
	}
	names, err := e.Survivors(context.Background())
	if err != nil {
		return err
	}
	how := "attached"
	var a export.Attachment
	if len(names) > 0 {
		how = "adopted"
		a, err = e.Adopt(context.Background(), names[0], d)
	} else {
		a, err = e.Attach(context.Background(), "disk", d, export.AttachOptions{})
	}
	if err != nil {
		return err
	}
	fmt.Println(how, a.Node())
	line, err := bufio.NewReader(os.Stdin).ReadString('\n')
	if err == nil && line == "detach\n" {
		if err := a.Detach(context.Background()); err != nil {
			return err
		}
	}
	return e.Close()
}

type child struct {
	c   *exec.Cmd
	in  io.WriteCloser
	how string
	at  string // node
}

func startServe(t *testing.T, dir, file string, args ...string) *child {
	t.Helper()
	c := exec.Command("/proc/self/exe", append([]string{"role-serve", dir, file}, args...)...)
	c.Stderr = os.Stderr
	in, err := c.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := c.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	ch := &child{c: c, in: in}
	if err != nil {
		c.Process.Kill()
		c.Wait()
		t.Fatalf("server said %q: %v", line, err)
	}
	ch.how, ch.at, _ = strings.Cut(strings.TrimSpace(line), " ")
	return ch
}

// kill ends the server with SIGKILL. It must be dead soon, whatever its devices are doing.
func (c *child) kill(t *testing.T) {
	t.Helper()
	c.c.Process.Kill()
	done := make(chan struct{})
	go func() { c.c.Wait(); close(done) }()
	select {
	case <-done:
	case <-time.After(10 * time.Second):
		t.Fatal("server does not die of SIGKILL")
	}
}

func (c *child) finish(t *testing.T, how string) {
	t.Helper()
	io.WriteString(c.in, how)
	c.in.Close()
	if err := c.c.Wait(); err != nil {
		t.Fatalf("server: %v", err)
	}
}

// kills is how often the server is killed; MICA_KILLS says otherwise.
func kills(t *testing.T) int {
	if s := os.Getenv("MICA_KILLS"); s != "" {
		n, err := strconv.Atoi(s)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	return 10
}

// TestKill kills the server in the middle of verified writes, again and again. Nobody sees an
// error, and nothing is lost.
func TestKill(t *testing.T) {
	needRoot(t)
	needTool(t, "fio")
	if ok, why := kernelResends(); !ok {
		t.Skip("SKIPPED: " + why)
	}
	for _, mode := range []string{"workers", "inline"} {
		t.Run(mode, func(t *testing.T) {
			s := &setup{t: t, dir: shmDir(t)}
			s.useHolder(t)
			file := filepath.Join(s.dir, "data")
			if f, err := dev.CreateFile(file, 128<<20, dev.OpenOptions{}); err != nil {
				t.Fatal(err)
			} else {
				f.Close()
			}
			seed := uint64(time.Now().UnixNano())
			t.Logf("seed %d", seed)
			rnd := rand.New(rand.NewPCG(seed, 1))
			c := startServe(t, s.dir, file, mode)
			if c.how != "attached" {
				t.Fatal(c.how)
			}
			node := c.at
			stop := filepath.Join(s.dir, "stop")
			result := make(chan error, 1)
			rounds := 0
			go func() {
				for {
					out, err := tryRun("fio", "--name=v", "--filename="+node, "--rw=randwrite", "--bsrange=512-64k",
						"--ioengine=libaio", "--iodepth=16", "--direct=1", "--numjobs=4", "--size=16m", "--offset_increment=32m",
						"--verify=crc32c", "--verify_state_save=0", "--verify_fatal=1", "--verify_dump=0", "--allow_file_create=0", "--rate=20m,20m")
					rounds++
					if err != nil {
						result <- fmt.Errorf("fio: %w\n%s", err, out)
						return
					}
					if _, err := os.Stat(stop); err == nil {
						result <- nil
						return
					}
				}
			}()
			for i := range kills(t) {
				select {
				case err := <-result:
					t.Fatalf("after %d kills: %v", i, err)
				case <-time.After(time.Duration(50+rnd.IntN(400)) * time.Millisecond):
				}
				c.kill(t)
				if rnd.IntN(2) == 0 {
					time.Sleep(time.Duration(rnd.IntN(100)) * time.Millisecond)
				}
				c = startServe(t, s.dir, file, mode)
				if c.how != "adopted" || c.at != node {
					t.Fatalf("kill %d: next server: %s %s", i, c.how, c.at)
				}
			}
			os.WriteFile(stop, nil, 0o600)
			if err := <-result; err != nil {
				t.Fatal(err)
			}
			t.Logf("%d rounds of fio", rounds)
			c.finish(t, "detach\n")
			s.nothingLeft(t)
		})
	}
}

// TestHandOver: a server that closes leaves its nodes to the next one, with a file system
// mounted all the time.
func TestHandOver(t *testing.T) {
	s := newSetup(t, true)
	needTool(t, "mkfs.ext4")
	d := dev.NewMem(64 << 20)
	a, err := s.e.Attach(ctx(t), "disk", d, export.AttachOptions{})
	if err != nil {
		t.Fatal(err)
	}
	run(t, "mkfs.ext4", "-q", a.Node())
	mnt := filepath.Join(s.dir, "mnt")
	mount(t, a.Node(), mnt)
	for i := range 5 {
		if err := s.e.Close(); err != nil {
			t.Fatal(err)
		}
		select {
		case <-a.Done():
		default:
			t.Fatal("not done after close")
		}
		wrote := make(chan error, 1)
		go func() { wrote <- writeSync(filepath.Join(mnt, strconv.Itoa(i)), 1<<20) }()
		time.Sleep(50 * time.Millisecond)
		select {
		case err := <-wrote:
			t.Fatalf("written without a server: %v", err)
		default:
		}
		if s.e, err = New(s.o); err != nil {
			t.Fatal(err)
		}
		if _, err := s.e.Attach(ctx(t), "disk", d, export.AttachOptions{}); !errors.Is(err, export.ErrExists) {
			t.Fatalf("attach in the place of a survivor: %v", err)
		}
		if _, err := s.e.Adopt(ctx(t), "disk", dev.NewMem(1<<20)); err == nil {
			t.Fatal("adopted with a smaller device")
		}
		names, err := s.e.Survivors(ctx(t))
		if err != nil || len(names) != 1 || names[0] != "disk" {
			t.Fatalf("survivors: %v, %v", names, err)
		}
		if a, err = s.e.Adopt(ctx(t), "disk", d); err != nil {
			t.Fatal(err)
		}
		if err := <-wrote; err != nil {
			t.Fatal(err)
		}
		if names, _ := s.e.Survivors(ctx(t)); len(names) != 0 {
			t.Fatalf("survivors after adopt: %v", names)
		}
	}
	unmountFS(t, mnt)
	run(t, "e2fsck", "-fn", a.Node())
	if err := a.Detach(ctx(t)); err != nil {
		t.Fatal(err)
	}
	s.nothingLeft(t)
}

func writeSync(path string, n int) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.Write(make([]byte, n)); err != nil {
		return err
	}
	return f.Sync()
}

// TestDrop: a survivor that nobody can serve ends in I/O errors, not in processes that hang.
func TestDrop(t *testing.T) {
	s := newSetup(t, true)
	d := dev.NewMem(64 << 20)
	a, err := s.e.Attach(ctx(t), "disk", d, export.AttachOptions{})
	if err != nil {
		t.Fatal(err)
	}
	node, err := os.OpenFile(a.Node(), os.O_RDWR|unix.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer node.Close()
	if err := s.e.Close(); err != nil {
		t.Fatal(err)
	}
	if s.e, err = New(s.o); err != nil {
		t.Fatal(err)
	}
	wrote := make(chan error, 1)
	go func() {
		b, _ := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
		_, err := node.WriteAt(b, 0)
		wrote <- err
	}()
	time.Sleep(50 * time.Millisecond)
	if err := s.e.Drop(ctx(t), "nobody"); !errors.Is(err, export.ErrNotFound) {
		t.Fatalf("drop of nothing: %v", err)
	}
	if err := s.e.Drop(ctx(t), "disk"); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-wrote:
		if err == nil {
			t.Fatal("a write to nobody succeeded")
		}
	case <-time.After(10 * time.Second):
		t.Fatal("write still waits after drop")
	}
	node.Close()
	if n := settled(0, func() int { return len(boundTo(s.dir)) }); n != 0 {
		t.Fatalf("%d loop devices left", n)
	}
	s.nothingLeft(t)
}

// TestHolderDies: the exporter starts another holder and gives it everything again, also when it
// is just about to leave.
func TestHolderDies(t *testing.T) {
	s := newSetup(t, true)
	d := dev.NewMem(64 << 20)
	a, err := s.e.Attach(ctx(t), "disk", d, export.AttachOptions{})
	if err != nil {
		t.Fatal(err)
	}
	quit := func() {
		t.Helper()
		c, err := holder.Dial(s.o.HolderSocket)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if err := c.Quit(true); err != nil {
			t.Fatal(err)
		}
	}
	quit()
	held := func() int {
		c, err := holder.Dial(s.o.HolderSocket)
		if err != nil {
			return 1
		}
		defer c.Close()
		l, _ := c.List()
		return 1 - len(l)
	}
	if settled(0, held) != 0 {
		t.Fatal("the next holder does not have the connection")
	}
	for range 5 {
		quit()
		if err := s.e.Close(); err != nil {
			t.Fatal(err)
		}
		if s.e, err = New(s.o); err != nil {
			t.Fatal(err)
		}
		if a, err = s.e.Adopt(ctx(t), "disk", d); err != nil {
			t.Fatal(err)
		}
		run(t, "dd", "if=/dev/zero", "of="+a.Node(), "bs=4096", "count=1", "oflag=direct", "conv=notrunc")
	}
	if err := a.Detach(ctx(t)); err != nil {
		t.Fatal(err)
	}
}

// TestLeftovers: what a server leaves that died between mount and node is cleared away.
func TestLeftovers(t *testing.T) {
	s := newSetup(t, true)
	if err := s.e.Close(); err != nil {
		t.Fatal(err)
	}
	// A mount without a holder's entry, as before its put.
	dir := filepath.Join(s.dir, "run", "fuse", "half")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	fd, err := mountFuse(dir, "mica", false)
	if err != nil {
		t.Fatal(err)
	}
	// The same with an entry that never became live.
	dir2 := filepath.Join(s.dir, "run", "fuse", "half2")
	if err := os.Mkdir(dir2, 0o700); err != nil {
		t.Fatal(err)
	}
	fd2, err := mountFuse(dir2, "mica", false)
	if err != nil {
		t.Fatal(err)
	}
	c, err := holder.Connect(ctx(t), s.o.HolderSocket, s.o.HolderCommand...)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Put("fuse/half2", record{Version: recordVersion, Dir: dir2}.json(), fd2); err != nil {
		t.Fatal(err)
	}
	c.Close()
	unix.Close(fd)
	unix.Close(fd2)
	// Links to a free loop device, to a file, and one of another daemon's that lives.
	for id, to := range map[string]string{"stale": "/dev/loop9999", "other": "/etc/passwd"} {
		if err := os.Symlink(to, filepath.Join(s.o.LinkDir, id)); err != nil {
			t.Fatal(err)
		}
	}
	if s.e, err = New(s.o); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(filepath.Join(s.o.LinkDir, "stale")); !os.IsNotExist(err) {
		t.Errorf("stale link: %v", err)
	}
	if err := os.Remove(filepath.Join(s.o.LinkDir, "other")); err != nil {
		t.Error(err)
	}
	s.nothingLeft(t)
}
