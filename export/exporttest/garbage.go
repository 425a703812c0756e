package exporttest

import (
	"os"
	"testing"
	"time"

	"mica/dev"
	"mica/export"

	"golang.org/x/sys/unix"
)

// testNoGarbage: a request of 4 KiB that the device answers at once allocates nothing on its way
// through the server.
func testNoGarbage(t *testing.T, d Driver) {
	r := newRig(t, d)
	a, err := r.e.Attach(within(t, time.Minute), "garbage", memory{dev.NewMem(16 << 20)}, export.AttachOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer r.detach(a)
	f, err := os.OpenFile(a.Node(), os.O_RDWR|unix.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	fd, buf := int(f.Fd()), aligned(t, 4096)
	for _, c := range []struct {
		name string
		do   func() (int, error)
	}{
		{"write", func() (int, error) { return unix.Pwrite(fd, buf, 8192) }},
		{"read", func() (int, error) { return unix.Pread(fd, buf, 8192) }},
	} {
		once := func() {
			if n, err := c.do(); n != len(buf) || err != nil {
				t.Fatalf("%s: %d bytes, %v", c.name, n, err)
			}
		}
		for range 100 { // what is made once is there
			once()
		}
		if n := testing.AllocsPerRun(1000, once); n != 0 {
			t.Errorf("%s: %v allocations a request", c.name, n)
		}
	}
}
