package ondisk

import (
	"encoding/binary"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"mica/dev"
)

// memImage is a device of bytes.
func memImage(t testing.TB, text []byte) dev.Device {
	t.Helper()
	d := dev.NewMem(int64(max(len(text), xfsSector)))
	if len(text) > 0 {
		if _, err := d.WriteAt(text, 0); err != nil {
			t.Fatal(err)
		}
	}
	return d
}

// xfsImage is a file system of one group of 64 blocks of 4096 bytes, whose log is its last 16.
func xfsImage(records ...func(log []byte)) []byte {
	b := make([]byte, 64*4096)
	be := binary.BigEndian
	be.PutUint32(b, xfsSuper)
	be.PutUint32(b[4:], 4096)
	be.PutUint64(b[48:], 48)
	be.PutUint32(b[84:], 64)
	be.PutUint32(b[96:], 16)
	b[124] = 6
	for _, fn := range records {
		fn(b[48*4096:])
	}
	return b
}

// xfsRecordAt puts a record at a sector of the log.
func xfsRecordAt(sector int, round uint32, ops uint32, size uint32, flags byte) func([]byte) {
	return func(log []byte) {
		h, be := log[sector*xfsSector:], binary.BigEndian
		be.PutUint32(h, xfsRecord)
		be.PutUint32(h[8:], 2)
		be.PutUint64(h[16:], uint64(round)<<32|uint64(sector))
		be.PutUint32(h[40:], ops)
		be.PutUint32(h[320:], size)
		sectors := max(1, int(size)/xfsHeaderFor)
		log[(sector+sectors)*xfsSector%len(log)+9] = flags
	}
}

func TestXFSClean(t *testing.T) {
	for _, c := range []struct {
		name  string
		image []byte
		want  bool
		fails bool
	}{
		{"unmounted", xfsImage(xfsRecordAt(0, 1, 1, 32<<10, 0x20)), true, false},
		{"in use", xfsImage(xfsRecordAt(0, 1, 1, 32<<10, 0x20), xfsRecordAt(2, 1, 4, 32<<10, 0)), false, false},
		{"unmounted again", xfsImage(xfsRecordAt(0, 1, 1, 32<<10, 0x20), xfsRecordAt(2, 1, 4, 32<<10, 0), xfsRecordAt(8, 1, 1, 32<<10, 0x20)), true, false},
		{"the next round is newer", xfsImage(xfsRecordAt(100, 1, 1, 32<<10, 0x20), xfsRecordAt(2, 2, 4, 32<<10, 0)), false, false},
		{"a header of several sectors", xfsImage(xfsRecordAt(4, 1, 1, 256<<10, 0x20)), true, false},
		{"a record around the end of the log", xfsImage(xfsRecordAt(127, 1, 1, 32<<10, 0x20)), true, false},
		{"one operation that is no unmount", xfsImage(xfsRecordAt(0, 1, 1, 32<<10, 0x01)), false, false},
		{"an empty log", xfsImage(), false, false},
		{"no file system", make([]byte, 4096), false, true},
		{"a log outside", xfsImage(func(log []byte) {})[:4096], false, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := xfsClean(memImage(t, c.image))
			if got != c.want || (err != nil) != c.fails {
				t.Errorf("clean %v, error %v; want %v, error %v", got, err, c.want, c.fails)
			}
		})
	}
}

// TestXFSMade: what mkfs.xfs makes is clean, with logs of several sizes.
func TestXFSMade(t *testing.T) {
	tool, err := exec.LookPath("mkfs.xfs")
	if err != nil {
		t.Skip("SKIPPED: mkfs.xfs is not installed (package xfsprogs)")
	}
	for _, args := range [][]string{nil, {"-b", "size=1024"}, {"-l", "size=70m,su=256k"}, {"-d", "agcount=7"}} {
		path := filepath.Join(t.TempDir(), "image")
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(path, 600<<20); err != nil {
			t.Fatal(err)
		}
		if out, err := exec.Command(tool, append(args, "-q", path)...).CombinedOutput(); err != nil {
			t.Fatalf("mkfs.xfs %v: %v\n%s", args, err, out)
		}
		d, err := dev.Open(path, dev.OpenOptions{ReadOnly: true})
		if err != nil {
			t.Fatal(err)
		}
		if clean, err := xfsClean(d); err != nil || !clean {
			t.Errorf("mkfs.xfs %v: clean %v, %v", args, clean, err)
		}
		d.Close()
	}
}

// TestCheckXFS: what kernel 5.4 does not mount is told from what it mounts.
func TestCheckXFS(t *testing.T) {
	for _, c := range []struct {
		name     string
		ro, in   uint32
		accepted bool
	}{
		{"as mica makes it", 0x5, 0x3, true},
		{"counts of inodes", 0xd, 0x3, false},
		{"large times", 0x5, 0xb, false},
		{"large extent counters", 0x5, 0x23, false},
		{"parent pointers", 0x5, 0x83, false},
	} {
		b := xfsImage()
		binary.BigEndian.PutUint32(b[212:], c.ro)
		binary.BigEndian.PutUint32(b[216:], c.in)
		if err := CheckXFS(memImage(t, b)); (err == nil) != c.accepted {
			t.Errorf("%s: %v", c.name, err)
		}
	}
	if err := CheckXFS(memImage(t, make([]byte, 4096))); err == nil {
		t.Error("no file system was accepted")
	}
}

// FuzzXFSClean: whatever the bytes are, the answer is yes, no or an error.
func FuzzXFSClean(f *testing.F) {
	f.Add(xfsImage(xfsRecordAt(0, 1, 1, 32<<10, 0x20)))
	f.Add(xfsImage(xfsRecordAt(127, 1, 1, 256<<10, 0x20), xfsRecordAt(2, 2, 4, 32<<10, 0)))
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) > 1<<20 {
			return
		}
		clean, err := xfsClean(memImage(t, b))
		if clean && err != nil {
			t.Errorf("clean, and %v", err)
		}
	})
}
