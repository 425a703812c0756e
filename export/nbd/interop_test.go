package nbd

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"mica/dev"
)

// tool runs another project's program and returns its standard output; anything but exit code 0
// fails the test. A program that is not installed skips the test, with its name.
func tool(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := tryTool(t, name, args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func tryTool(t *testing.T, name string, args ...string) (string, error) {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Skipf("%s is not installed: its side of the protocol is NOT tested", name)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.WaitDelay = time.Second
	cmd.Env = append(os.Environ(), "PATH=/usr/sbin:/usr/bin:/sbin:/bin") // the distribution's python for nbdsh
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("%s %s: %v\n%s%s", name, strings.Join(args, " "), err, out.String(), errs.String())
	}
	return out.String(), nil
}

const interopSize = 24 << 20

// interopDevices are exported side by side: a file, a device that tells mapped from unmapped
// blocks as thin devices do, and one without any extras.
func interopServer(t *testing.T) (uri func(name string) string, devices map[string]dev.Device) {
	t.Helper()
	s, _ := startServer(t, Options{})
	devices = map[string]dev.Device{
		"file":     newFileDevice(t, interopSize),
		"thin":     newTryMem(interopSize),
		"plain":    bare{dev.NewMem(interopSize)},
		"readonly": newTryMem(interopSize),
	}
	for n, d := range devices {
		if err := s.AddExport(n, d, ExportOptions{Description: "the " + n + " one", ReadOnly: n == "readonly"}); err != nil {
			t.Fatal(err)
		}
	}
	return s.URI, devices
}

var writable = []string{"file", "thin", "plain"}

// sparseImage makes a file of interopSize with data here and there.
func sparseImage(t *testing.T) (path string, contents []byte) {
	t.Helper()
	contents = make([]byte, interopSize)
	for i, r := range []struct{ off, n int }{{0, 100 << 10}, {1 << 20, 4096}, {5<<20 + 512, 3 << 20}, {interopSize - 8192, 8192}} {
		copy(contents[r.off:], pattern(uint64(i)+50, r.n))
	}
	path = filepath.Join(medium(t), "image")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for off := 0; off < len(contents); off += 4096 {
		if p := contents[off : off+4096]; !bytes.Equal(p, make([]byte, 4096)) {
			if _, err := f.WriteAt(p, int64(off)); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := f.Truncate(interopSize); err != nil {
		t.Fatal(err)
	}
	return path, contents
}

func contentsOf(t *testing.T, d dev.Device) []byte {
	t.Helper()
	b := make([]byte, d.Size())
	if n, err := d.ReadAt(b, 0); n != len(b) {
		t.Fatal(err)
	}
	return b
}

func TestNbdinfo(t *testing.T) {
	uri, devices := interopServer(t)
	if _, err := devices["thin"].WriteAt(make([]byte, 128<<10), 64<<10); err != nil {
		t.Fatal(err)
	}
	var info struct {
		Protocol   string
		TLS        bool
		Structured bool
		Exports    []map[string]any
	}
	if err := json.Unmarshal([]byte(tool(t, "nbdinfo", "--json", uri("thin"))), &info); err != nil {
		t.Fatal(err)
	}
	if info.Protocol != "newstyle-fixed" || info.TLS || !info.Structured || len(info.Exports) != 1 {
		t.Fatalf("info %+v", info)
	}
	want := map[string]any{"export-name": "thin", "description": "the thin one", "export-size": float64(interopSize),
		"is_read_only": false, "can_df": true, "can_fast_zero": true, "can_flush": true, "can_fua": true, "can_multi_conn": true,
		"can_trim": true, "can_zero": true, "can_cache": false, "is_rotational": false,
		"block_size_minimum": 512.0, "block_size_preferred": 65536.0, "block_size_maximum": float64(32 << 20)}
	for k, w := range want {
		if got := info.Exports[0][k]; got != w {
			t.Errorf("%s is %v, want %v", k, got, w)
		}
	}
	if out := tool(t, "nbdinfo", "--list", uri("")); strings.Count(out, "export=") != len(devices) {
		t.Errorf("list: %s", out)
	}
	if out := tool(t, "nbdinfo", "--size", uri("file")); strings.TrimSpace(out) != fmt.Sprint(interopSize) {
		t.Errorf("size: %s", out)
	}
	for _, q := range []string{"--is=read-only", "--can=df", "--can=multi-conn"} {
		tool(t, "nbdinfo", q, uri("readonly"))
	}
	if _, err := tryTool(t, "nbdinfo", "--can=trim", uri("plain")); err == nil {
		t.Error("a device without Discard claims trim")
	}
	if _, err := tryTool(t, "nbdinfo", uri("nobody")); err == nil {
		t.Error("an export that does not exist was found")
	}
	got := strings.Join(strings.Fields(tool(t, "nbdinfo", "--map", uri("thin"))), " ")
	if w := fmt.Sprintf("0 65536 3 hole,zero 65536 131072 0 data 196608 %d 3 hole,zero", interopSize-196608); got != w {
		t.Errorf("map: %q, want %q", got, w)
	}
	if out := tool(t, "nbdinfo", "--map", "--totals", uri("thin")); !strings.Contains(out, "131072") {
		t.Errorf("totals: %s", out)
	}
}

func TestNbdcopy(t *testing.T) {
	image, want := sparseImage(t)
	for _, name := range writable {
		for _, args := range [][]string{nil, {"--synchronous"}, {"--connections=4", "--requests=64", "--flush"}, {"--request-size=4096", "--allocated"}} {
			t.Run(name+"/"+strings.Join(args, ""), func(t *testing.T) {
				uri, devices := interopServer(t)
				junk := bytes.Repeat([]byte{0xee}, interopSize) // must be gone afterwards
				if _, err := devices[name].WriteAt(junk, 0); err != nil {
					t.Fatal(err)
				}
				tool(t, "nbdcopy", append(args, image, uri(name))...)
				if !bytes.Equal(contentsOf(t, devices[name]), want) {
					t.Error("the device differs from the image")
				}
				back := filepath.Join(medium(t), "back")
				tool(t, "nbdcopy", append(args, uri(name), back)...)
				if got, err := os.ReadFile(back); err != nil || !bytes.Equal(got, want) {
					t.Errorf("the copy back differs (%v)", err)
				}
			})
		}
	}
	t.Run("between exports", func(t *testing.T) {
		uri, devices := interopServer(t)
		if _, err := devices["file"].WriteAt(want, 0); err != nil {
			t.Fatal(err)
		}
		tool(t, "nbdcopy", uri("file"), uri("thin"))
		if !bytes.Equal(contentsOf(t, devices["thin"]), want) {
			t.Error("the target differs")
		}
		if n, _ := devices["thin"].(dev.HostByter).HostBytes(); n > 8<<20 {
			t.Errorf("the sparse copy takes %d bytes", n)
		}
	})
}

func TestQemuImg(t *testing.T) {
	image, want := sparseImage(t)
	for _, name := range writable {
		t.Run(name, func(t *testing.T) {
			uri, devices := interopServer(t)
			if _, err := devices[name].WriteAt(bytes.Repeat([]byte{0xee}, interopSize), 0); err != nil {
				t.Fatal(err)
			}
			tool(t, "qemu-img", "convert", "-n", "-W", "-m", "8", "-f", "raw", "-O", "raw", image, uri(name))
			if !bytes.Equal(contentsOf(t, devices[name]), want) {
				t.Fatal("the device differs from the image")
			}
			tool(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", image, uri(name))
			qcow := filepath.Join(medium(t), "copy.qcow2")
			tool(t, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", uri(name), qcow)
			tool(t, "qemu-img", "compare", "-f", "raw", "-F", "qcow2", uri(name), qcow)
			if _, err := devices[name].WriteAt([]byte{1}, 2<<20); err != nil {
				t.Fatal(err)
			}
			if _, err := tryTool(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", image, uri(name)); err == nil {
				t.Error("compare does not see a changed byte")
			}
		})
	}
	t.Run("map", func(t *testing.T) {
		uri, devices := interopServer(t)
		if _, err := devices["thin"].WriteAt(make([]byte, 64<<10), 128<<10); err != nil {
			t.Fatal(err)
		}
		var got []struct {
			Start, Length int64
			Zero, Data    bool
		}
		if err := json.Unmarshal([]byte(tool(t, "qemu-img", "map", "--output=json", "-f", "raw", uri("thin"))), &got); err != nil {
			t.Fatal(err)
		}
		if s := fmt.Sprint(got); s != fmt.Sprintf("[{0 131072 true false} {131072 65536 false true} {196608 %d true false}]", interopSize-196608) {
			t.Errorf("map: %s", s)
		}
	})
}

func TestQemuIO(t *testing.T) {
	for _, name := range writable {
		t.Run(name, func(t *testing.T) {
			uri, devices := interopServer(t)
			io := func(cmds ...string) error {
				args := []string{"-f", "raw"}
				for _, c := range cmds {
					args = append(args, "-c", c)
				}
				out, err := tryTool(t, "qemu-io", append(args, uri(name))...)
				if err == nil && (strings.Contains(out, "failed") || strings.Contains(out, "error")) {
					err = fmt.Errorf("%v: %s", cmds, out)
				}
				return err
			}
			good := [][]string{
				{"write -P 0x11 0 1M", "read -P 0x11 0 1M", "flush"},
				{"write -f -P 0x22 512 512", "read -P 0x11 0 512", "read -P 0x22 512 512", "read -P 0x11 1024 512"},
				{"write -P 0x33 4M 9M", "write -z 5M 1M", "read -P 0x33 4M 1M", "read -P 0 5M 1M", "read -P 0x33 6M 7M"},
				{"write -z -u 6M 64k", "read -P 0 6M 64k", "write -f -z 4M 512", "read -P 0 4M 512", "read -P 0x33 4195328 512"},
				{"aio_write -P 0x44 16M 64k", "aio_write -P 0x45 17M 64k", "aio_read 0 1M", "aio_flush", "read -P 0x44 16M 64k", "read -P 0x45 17M 64k"},
				{"write -P 0x55 20M 1M", "discard 20M 1M", "discard 20971008 512", "write -P 0x56 20M 512", "read -P 0x56 20M 512"},
				{"read 100 100"}, // not aligned: the client aligns
				{"writev -P 0x66 22M 512 1024 4096", "read -P 0x66 22M 5632"},
			}
			for _, cmds := range good {
				if err := io(cmds...); err != nil {
					t.Error(err)
				}
			}
			if b := contentsOf(t, devices[name]); b[512] != 0x22 || b[1<<20-1] != 0x11 || b[16<<20] != 0x44 {
				t.Error("the device does not hold what was written")
			}
			if err := io(fmt.Sprintf("read %d 512", interopSize)); err == nil {
				t.Error("a read beyond the end succeeded")
			}
		})
	}
	t.Run("readonly", func(t *testing.T) {
		uri, _ := interopServer(t)
		if _, err := tryTool(t, "qemu-io", "-f", "raw", "-c", "write 0 512", uri("readonly")); err == nil {
			t.Error("a read-only export was opened for writing")
		}
		tool(t, "qemu-io", "-r", "-f", "raw", "-c", "read -P 0 0 1M", uri("readonly"))
	})
	t.Run("errors", func(t *testing.T) {
		s, _ := startServer(t, Options{})
		f := dev.NewFault(dev.NewMem(interopSize))
		if err := s.AddExport("disk", f, ExportOptions{}); err != nil {
			t.Fatal(err)
		}
		for _, e := range []struct {
			err  error
			want string
		}{{dev.ErrNoSpace, "No space left on device"}, {dev.ErrReadOnly, "Operation not permitted"}, {dev.ErrInjected, "Input/output error"}} {
			f.Clear()
			f.Add(dev.Rule{Ops: dev.OpWrite, Err: e.err})
			out, err := tryTool(t, "qemu-io", "-f", "raw", "-c", "write 0 64k", s.URI("disk"))
			if msg := out + fmt.Sprint(err); !strings.Contains(msg, e.want) {
				t.Errorf("%v: qemu-io says %q, want %q", e.err, msg, e.want)
			}
		}
	})
}

// TestNbdsh drives libnbd through what the copying tools never do.
func TestNbdsh(t *testing.T) {
	uri, _ := interopServer(t)
	script := `
import errno
h.add_meta_context("base:allocation")
h.connect_uri(%q)
h.set_strict_mode(0)
assert h.can_meta_context("base:allocation") and h.can_multi_conn() and h.can_df()
h.pwrite(b"x" * 4096, 8192, nbd.CMD_FLAG_FUA)
assert h.pread(4096, 8192, nbd.CMD_FLAG_DF) == b"x" * 4096
parts = []
def chunk(data, off, status, err):
    parts.append((off, len(data), status))
h.pread_structured(16384, 0, chunk)
assert sum(n for _, n, _ in parts) == 16384, parts
def fails(e, f, *a):
    try:
        f(*a)
    except nbd.Error as ex:
        assert ex.errnum == e, (ex.errno, e)
        return
    assert False, "no error"
fails(errno.EINVAL, h.pread, 512, 100)
fails(errno.EINVAL, h.pread, 512, h.get_size())
fails(errno.ENOSPC, h.pwrite, b"x" * 512, h.get_size())
fails(errno.EINVAL, h.pwrite, b"x" * 100, 0)
fails(errno.EINVAL, h.trim, 512, h.get_size())
fails(errno.ENOTSUP, h.zero, 4096, 0, nbd.CMD_FLAG_FAST_ZERO | nbd.CMD_FLAG_NO_HOLE)
fails(errno.EINVAL, h.cache, 512, 0)
h.zero(1 << 20, 0)
h.trim(1 << 20, 1 << 20)
h.flush()
ext = []
h.block_status(h.get_size(), 0, lambda c, off, e, err: ext.extend(e))
assert sum(ext[0::2]) == h.get_size(), ext
one = []
h.block_status(h.get_size(), 0, lambda c, off, e, err: one.extend(e), nbd.CMD_FLAG_REQ_ONE)
assert len(one) == 2, one
assert h.pread(512, 0) == bytes(512)
h.shutdown()
print("done")
`
	for _, name := range []string{"thin", "file"} {
		if out := tool(t, "nbdsh", "-c", fmt.Sprintf(script, uri(name))); !strings.Contains(out, "done") {
			t.Errorf("%s: %s", name, out)
		}
	}
}

// TestFio lets fio verify what it wrote: several jobs, each a connection with its own part of
// the device, block sizes from 512 bytes, trims and flushes between, while others read.
func TestFio(t *testing.T) {
	uri, devices := interopServer(t)
	for _, name := range writable {
		t.Run(name, func(t *testing.T) {
			stop := make(chan struct{})
			var wg sync.WaitGroup
			wg.Add(1)
			go func() { // a reader beside it, on the device itself
				defer wg.Done()
				p := make([]byte, 64<<10)
				for off := int64(0); ; off = (off + int64(len(p))) % (interopSize - int64(len(p))) {
					select {
					case <-stop:
						return
					default:
						devices[name].ReadAt(p, off)
					}
				}
			}()
			defer wg.Wait()
			defer close(stop)
			out := tool(t, "fio", "--name=verify", "--ioengine=nbd", "--uri="+uri(name), "--rw=randrw", "--rwmixread=30",
				"--bsrange=512-128k", "--blockalign=512", "--iodepth=16", "--numjobs=4", "--size=6m", "--offset_increment=6m",
				"--verify=crc32c", "--verify_state_save=0", "--verify_fatal=1", "--verify_backlog=64", "--fsync=50", "--loops=2", "--group_reporting", "--output-format=json", "--randrepeat=0")
			var res struct {
				Jobs []struct {
					Error       int
					Write, Read struct {
						TotalIOs int64 `json:"total_ios"`
					}
				}
			}
			if err := json.Unmarshal([]byte(out[strings.Index(out, "{"):]), &res); err != nil {
				t.Fatal(err)
			}
			if j := res.Jobs[0]; j.Error != 0 || j.Write.TotalIOs == 0 || j.Read.TotalIOs == 0 {
				t.Errorf("fio: error %d, %d writes, %d reads", j.Error, j.Write.TotalIOs, j.Read.TotalIOs)
			}
		})
	}
}
