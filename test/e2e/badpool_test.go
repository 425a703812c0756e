package e2e

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// closedPool makes a small pool with three devices: 1 with data, 2 a snapshot of it, 3 empty.
func (b *box) closedPool() string {
	b.Helper()
	b.pool = b.path("pool")
	b.mica("pool", "create", b.pool, "--size", "64M", "--metadata-size", "2M")
	b.mica("thin", "create", b.pool, "1")
	b.input(pattern(3, 300_000), "thin", "write", b.pool, "1", "--offset", "1M")
	b.mica("thin", "snap", b.pool, "2", "1")
	b.mica("thin", "create", b.pool, "3")
	return b.pool
}

// input runs a command with a standard input.
func (b *box) input(in []byte, args ...string) {
	b.Helper()
	c := b.command(args...)
	c.Stdin = bytes.NewReader(in)
	if out, stderr, code := b.tryCommand(c); code != 0 {
		b.Fatalf("mica %s: exit status %d\n%s%s", strings.Join(args, " "), code, out, stderr)
	}
}

// unchanged runs what must fail, and compares everything that the pool says about itself before
// and after.
func (b *box) unchanged(do func()) {
	b.Helper()
	state := func() string {
		out, stderr, code := b.try("thin", "dump", b.pool)
		if code != 0 {
			b.Fatalf("thin dump: %s", stderr)
		}
		return out + b.mica("thin", "ls", b.pool, "--json")
	}
	before := state()
	do()
	if after := state(); after != before {
		b.Errorf("the pool has changed: %s", firstDifference(after, before))
	}
}

// TestClosedPoolRefusals: commands on a closed pool that cannot work say what is wrong with which
// thing and by how much, and change nothing.
func TestClosedPoolRefusals(t *testing.T) {
	b := newBox(t)
	p := b.closedPool()
	const big = "16777216" // the first that does not fit 24 bits
	for _, c := range []struct {
		args  []string
		words []string
	}{
		{[]string{"thin", "create", p, "1"}, []string{"device", "1", "exists"}},
		{[]string{"thin", "snap", p, "2", "1"}, []string{"2", "exists"}},
		{[]string{"thin", "snap", p, "9", "8"}, []string{"8", "no such thin device"}},
		{[]string{"thin", "rm", p, "99"}, []string{"99", "no such thin device"}},
		{[]string{"thin", "read", p, "99"}, []string{"99", "no such thin device"}},
		{[]string{"thin", "write", p, "99"}, []string{"99", "no such thin device"}},
		{[]string{"thin", "discard", p, "99", "--offset", "0", "--length", "1M"}, []string{"99", "no such thin device"}},
		{[]string{"thin", "export", p, "99", "--size", "1M", "--nbd", b.path("s")}, []string{"99", "no such thin device"}},
		{[]string{"thin", "delta", p, "1", "99"}, []string{"99", "no such thin device"}},
		{[]string{"thin", "create", p, big}, []string{big, "24 bits"}},
		{[]string{"thin", "snap", p, big, "1"}, []string{big, "24 bits"}},
		{[]string{"thin", "snap", p, "9", big}, []string{big, "24 bits"}},
		{[]string{"thin", "rm", p, big}, []string{big, "24 bits"}},
		{[]string{"thin", "read", p, big}, []string{big, "24 bits"}},
		{[]string{"thin", "write", p, big}, []string{big, "24 bits"}},
		{[]string{"thin", "discard", p, big, "--offset", "0", "--length", "1M"}, []string{big, "24 bits"}},
		{[]string{"thin", "export", p, big, "--size", "1M", "--nbd", b.path("s")}, []string{big, "24 bits"}},
		{[]string{"thin", "delta", p, "1", big}, []string{big, "24 bits"}},
		{[]string{"thin", "export", p, "1", "--size", "1000", "--nbd", b.path("s")}, []string{"1000", "512"}},
		{[]string{"thin", "export", p, "1", "--size", "0", "--nbd", b.path("s")}, []string{"0 bytes"}},
		{[]string{"pool", "grow", p, "--size", "32M"}, []string{"33554432", "512 blocks", "1024"}},
		{[]string{"pool", "grow", p, "--metadata-size", "1M"}, []string{"1048576", "512 metadata blocks"}},
		{[]string{"pool", "create", p}, []string{p, "exists"}},
		{[]string{"thin", "restore", p, "-i", b.writeFile("dump.xml", []byte("<superblock"))}, []string{"metadata"}},
		{[]string{"thin", "restore", p, "-i", b.path("none.xml")}, []string{"none.xml", "no such file"}},
	} {
		b.unchanged(func() { b.fails(c.args, c.words...) })
	}
	for _, args := range [][]string{
		{"thin", "create", p, "seven"}, {"thin", "create", p, "-1"}, {"thin", "create", p}, {"thin", "create"},
		{"thin", "discard", p, "1", "--offset", "0"}, {"thin", "discard", p, "1", "--offset", "x", "--length", "1M"},
		{"thin", "export", p, "1", "--nbd", b.path("s")}, {"thin", "export", p, "1", "--size", "1M"},
		{"thin", "export", p, "1", "--size", "1M", "--nbd", b.path("s"), "--fuse", b.path("f")},
		{"thin", "ls"}, {"thin", "read", "--data", p + "/data", "1"}, {"pool", "grow", p}, {"thin", "frobnicate", p},
	} {
		b.unchanged(func() { b.misused(args, "--help") })
	}
	// More than fits: what was written until then stays, as on every disk that runs full.
	c := b.command("thin", "write", p, "3")
	c.Stdin = bytes.NewReader(pattern(4, 65<<20))
	out, stderr, code := b.tryCommand(c)
	b.wantFailure("thin write of 65 MiB", out, stderr, code, 1, []string{"thin 3", "no space left", "0 of 1024 data blocks of 64 KiB free"})
	b.mica("thin", "rm", p, "3")
}

// TestNewPoolRefusals: a pool that cannot be made leaves nothing.
func TestNewPoolRefusals(t *testing.T) {
	b := newBox(t)
	b.noCheck = true
	nothing := func(dir string) {
		t.Helper()
		if entries, err := os.ReadDir(dir); err == nil && len(entries) > 0 {
			t.Errorf("%s holds %s", dir, entries[0].Name())
		}
	}
	p := b.path("new")
	b.fails([]string{"pool", "create", p, "--block-size", "96K"}, "98304", "65536")
	nothing(p)
	b.fails([]string{"pool", "create", p, "--block-size", "2G"}, "2147483648", "1073741824")
	nothing(p)
	b.fails([]string{"pool", "create", p, "--size", "32K"}, "32768", "65536")
	nothing(p)
	b.fails([]string{"pool", "create", p, "--size", "1G", "--metadata-size", "8K"}, "8192")
	nothing(p)
	b.misused([]string{"pool", "create", p, "--size", "many"}, "many")
	nothing(p)
	file := b.writeFile("file", []byte("text"))
	b.fails([]string{"pool", "create", file}, file, "not a directory")
	b.fails([]string{"pool", "create", "--data", file, "--metadata", b.path("m")}, file, "4 bytes")
	if text := b.readFile(file); string(text) != "text" {
		t.Error("a file was overwritten")
	}

	// Devices in use, or with something on them.
	loop, loop2 := b.loopDevice("a", 64<<20), b.loopDevice("b", 64<<20)
	b.fails([]string{"pool", "create", "--data", loop, "--metadata", loop}, loop)
	b.sh("mkfs.ext4", "-q", loop)
	b.fails([]string{"pool", "create", "--data", loop, "--metadata", loop2}, loop, "ext4")
	b.fails([]string{"pool", "create", "--data", loop2, "--metadata", loop}, loop, "ext4")
	dir := b.mkdir("mnt/a")
	if err := unix.Mount(loop, dir, "ext4", 0, ""); err != nil {
		t.Fatal(err)
	}
	b.fails([]string{"pool", "create", "--force", "--data", loop, "--metadata", loop2}, loop, "in use")
	b.fails([]string{"pool", "create", "--force", "--data", loop2, "--metadata", loop}, loop, "in use")
	b.unmount(dir)
	b.sh("e2fsck", "-fn", loop)
	b.mica("pool", "create", "--force", "--data", loop, "--metadata", loop2)
	b.fails([]string{"pool", "create", "--data", loop, "--metadata", loop2}, loop2)
	checkMetadata(b, loop2)
}

// loopDevice makes a loop device on a file of the box.
func (b *box) loopDevice(name string, size int64) string {
	b.Helper()
	path := b.writeFile(name, nil)
	if err := os.Truncate(path, size); err != nil {
		b.Fatal(err)
	}
	node := strings.TrimSpace(b.sh("losetup", "-f", "--show", path))
	b.atEnd = append(b.atEnd, func() { b.sh("losetup", "-d", node) })
	return node
}

// TestDamagedPools: whatever is wrong with a pool, everything that opens it says so, names the
// file, and leaves it as it is.
func TestDamagedPools(t *testing.T) {
	b := newBox(t)
	b.closedPool()
	good := b.path("good")
	b.sh("cp", "-a", "--sparse=always", b.pool, good)
	data, meta := filepath.Join(b.pool, "data"), filepath.Join(b.pool, "metadata")
	superblock := func(change func([]byte)) func() {
		return func() {
			text := b.readFile(meta)
			change(text)
			b.put(meta, text)
		}
	}
	for _, c := range []struct {
		name   string
		damage func()
		words  []string
		ls     bool // the metadata alone can be listed and checked
		dump   bool // its mappings can be read all the same
	}{
		{"no pool", func() { os.RemoveAll(b.pool) }, []string{b.pool, "no such file"}, false, false},
		{"empty directory", func() { os.Remove(data); os.Remove(meta) }, []string{"pool/metadata", "no such file"}, false, false},
		{"no data", func() { os.Remove(data) }, []string{"pool/data", "no such file"}, true, true},
		{"a text as metadata", func() { b.put(meta, bytes.Repeat([]byte("no pool "), 1<<18)) }, []string{"/pool", "superblock"}, false, false},
		{"zeros as metadata", func() { b.put(meta, make([]byte, 2<<20)) }, []string{"/pool", "superblock"}, false, false},
		{"empty metadata", func() { b.put(meta, nil) }, []string{"/pool", "superblock", "0 blocks"}, false, false},
		{"flipped bit in the superblock", superblock(func(s []byte) { s[100] ^= 1 }), []string{"/pool", "superblock checksum 0x"}, false, false},
		{"flipped bit in its checksum", superblock(func(s []byte) { s[1] ^= 0x80 }), []string{"/pool", "superblock checksum 0x"}, false, false},
		{"shorter metadata", func() { b.truncate(meta, 1<<20) }, []string{"/pool", "256", "512"}, false, true},
		{"shorter data", func() { b.truncate(data, 32<<20) }, []string{"/pool", "33554432", "1024 blocks of 65536"}, true, true},
		{"a directory as data", func() { os.Remove(data); os.Mkdir(data, 0o755) }, []string{"pool/data", "regular file"}, true, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			outer := b.T
			b.T = t
			defer func() { b.T = outer }()
			c.damage()
			before := b.treeSum(b.pool)
			for _, args := range [][]string{
				{"thin", "create", b.pool, "7"}, {"thin", "snap", b.pool, "7", "1"}, {"thin", "rm", b.pool, "1"},
				{"thin", "read", b.pool, "1"}, {"thin", "write", b.pool, "1"}, {"thin", "discard", b.pool, "1", "--offset", "0", "--length", "4M"},
				{"thin", "export", b.pool, "1", "--size", "4M", "--nbd", b.path("s")},
				{"pool", "grow", b.pool, "--size", "128M"}, {"pool", "trim", b.pool},
			} {
				b.fails(args, c.words...)
			}
			if !c.ls {
				b.fails([]string{"thin", "ls", b.pool}, c.words...)
				if out, stderr, code := b.try("thin", "check", b.pool); code != 1 || out+stderr == "" {
					t.Errorf("thin check: exit status %d, %s%s", code, out, stderr)
				}
			}
			if !c.dump {
				b.fails([]string{"thin", "dump", b.pool}, c.words...)
				b.fails([]string{"thin", "delta", b.pool, "1", "2"}, c.words...)
			}
			// The daemon.
			if c.name != "no pool" { // it would make one
				os.MkdirAll(b.root, 0o700)
				if err := os.Symlink(b.pool, filepath.Join(b.root, "pool")); err != nil {
					t.Fatal(err)
				}
				b.fails(b.serveArgs(), c.words...)
				os.RemoveAll(b.root)
			}
			if after := b.treeSum(b.pool); after != before {
				t.Errorf("the files have changed: %s, were %s", after, before)
			}
			os.RemoveAll(b.pool)
			b.sh("cp", "-a", "--sparse=always", good, b.pool)
		})
	}
}

func (b *box) put(path string, text []byte) {
	b.Helper()
	if err := os.WriteFile(path, text, 0o600); err != nil {
		b.Fatal(err)
	}
}

func (b *box) truncate(path string, size int64) {
	b.Helper()
	if err := os.Truncate(path, size); err != nil {
		b.Fatal(err)
	}
}

// treeSum is a digest of the names and contents of all files below a directory.
func (b *box) treeSum(dir string) string {
	b.Helper()
	var all bytes.Buffer
	filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			fmt.Fprintln(&all, path, digestOf(b.readFile(path)))
		}
		return nil
	})
	return digestOf(all.Bytes())
}

// TestOpenElsewhere: a pool that one process has open is refused to every other, with its pid.
func TestOpenElsewhere(t *testing.T) {
	b := newBox(t)
	p := b.closedPool()
	uri := "nbd+unix:///?socket=" + b.path("s")
	end := b.export(uri, "--nbd", b.path("s"), "1", 4<<20)
	pid := fmt.Sprint(b.tools[len(b.tools)-1].Process.Pid)
	for _, args := range [][]string{
		{"thin", "create", p, "7"}, {"thin", "ls", p}, {"thin", "check", p}, {"thin", "dump", p},
		{"pool", "grow", p, "--size", "128M"}, {"pool", "create", p, "--force"}, {"thin", "restore", p, "--force", "-i", "/dev/null"},
	} {
		b.fails(args, pid, "mica status")
	}
	end()
	b.mica("thin", "create", p, "7")
}

// TestOneDaemonAPool: two daemons with directories of their own and one pool between them: the
// second refuses, names the first, and changes nothing.
func TestOneDaemonAPool(t *testing.T) {
	b := newBox(t)
	b.start()
	b.smallImage()
	before := b.figures()
	config := b.writeFile("second.toml", fmt.Appendf(nil, "[pool]\ndata = %q\nmetadata = %q\n",
		filepath.Join(b.pool, "data"), filepath.Join(b.pool, "metadata")))
	b.fails([]string{"serve", "--root", b.path("root2"), "--run", b.path("run2"), "--config", config},
		filepath.Join(b.pool, "metadata"), fmt.Sprintf("locked by process %d", b.serve.Process.Pid))
	if after := b.figures(); after != before {
		t.Errorf("a second daemon changed the store: %+v, was %+v", after, before)
	}
}
