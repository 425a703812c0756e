package fuse

import (
	"errors"
	"fmt"
	"io"
	"os"
	"testing"

	"mica/dev"

	"golang.org/x/sys/unix"
)

// message builds a request as the kernel sends it.
func message(op opcode, node uint64, args ...any) []byte {
	m := make([]byte, inHeaderLen)
	for _, a := range args {
		switch v := a.(type) {
		case uint32:
			m = ne.AppendUint32(m, v)
		case uint64:
			m = ne.AppendUint64(m, v)
		case string:
			m = append(m, v...)
		case []byte:
			m = append(m, v...)
		default:
			panic(fmt.Sprintf("%T", a))
		}
	}
	ne.PutUint32(m, uint32(len(m)))
	ne.PutUint32(m[4:], uint32(op))
	ne.PutUint64(m[8:], 42)
	ne.PutUint64(m[16:], node)
	return m
}

var (
	u32 = func(v uint32) any { return v }
	u64 = func(v uint64) any { return v }
)

// rw are the arguments of READ and WRITE before the data.
func rw(off uint64, size uint32) []byte {
	return message(0, 0, u64(1), u64(off), u32(size), u32(0), u64(0), u32(0), u32(0))[inHeaderLen:]
}

func TestParse(t *testing.T) {
	for _, c := range []struct {
		name string
		msg  []byte
		want request
		bad  bool
	}{
		{"read", message(opRead, 2, rw(1<<40, 4096)), request{op: opRead, node: 2, off: 1 << 40, size: 4096}, false},
		{"read of the longest", message(opRead, 2, rw(0, maxIO)), request{op: opRead, node: 2, size: maxIO}, false},
		{"read too long", message(opRead, 2, rw(0, maxIO+1)), request{}, true},
		{"read cut short", message(opRead, 2, rw(0, 4096)[:39]), request{}, true},
		{"write", message(opWrite, 2, rw(512, 3), "abc"), request{op: opWrite, node: 2, off: 512, size: 3, data: []byte("abc")}, false},
		{"write with more than it says", message(opWrite, 2, rw(512, 2), "abc"), request{op: opWrite, node: 2, off: 512, size: 2, data: []byte("ab")}, false},
		{"write with less than it says", message(opWrite, 2, rw(512, 4), "abc"), request{}, true},
		{"write of 4 GiB", message(opWrite, 2, rw(512, 1<<32-1), "abc"), request{}, true},
		{"lookup", message(opLookup, 1, "disk\x00"), request{op: opLookup, node: 1, name: []byte("disk")}, false},
		{"lookup with extensions", message(opLookup, 1, "disk\x00\x01\x02"), request{op: opLookup, node: 1, name: []byte("disk")}, false},
		{"lookup without an end", message(opLookup, 1, "disk"), request{}, true},
		{"lookup of nothing", message(opLookup, 1), request{}, true},
		{"fallocate", message(opFallocate, 2, u64(1), u64(4096), u64(1<<33), u32(3), u32(0)), request{op: opFallocate, node: 2, off: 4096, n: 1 << 33, flags: 3}, false},
		{"lseek", message(opLseek, 2, u64(1), u64(77), u32(3), u32(0)), request{op: opLseek, node: 2, off: 77, flags: 3}, false},
		{"init", message(opInit, 0, u32(7), u32(44), u32(1<<17), u32(1<<30|1), u32(1<<7), make([]byte, 44)), request{op: opInit, major: 7, minor: 44, caps: 1<<39 | 1<<30 | 1}, false},
		{"init of an old kernel", message(opInit, 0, u32(7), u32(31), u32(1<<17), u32(1)), request{op: opInit, major: 7, minor: 31, caps: 1}, false},
		{"unknown", message(4711, 2, "xyz"), request{op: 4711, node: 2}, false},
		{"nothing", nil, request{}, true},
		{"half a header", message(opRead, 2)[:39], request{}, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			var r request
			err := r.parse(c.msg)
			if c.bad {
				if !errors.Is(err, errMalformed) {
					t.Fatalf("%v, want malformed", err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			c.want.unique = 42
			if got, want := fmt.Sprintf("%+v", r), fmt.Sprintf("%+v", c.want); got != want {
				t.Errorf("got  %s\nwant %s", got, want)
			}
		})
	}
	wrong := message(opRead, 2, rw(0, 512))
	ne.PutUint32(wrong, uint32(len(wrong)+1))
	if err := new(request).parse(wrong); !errors.Is(err, errMalformed) {
		t.Errorf("wrong length field: %v", err)
	}
}

func TestErrno(t *testing.T) {
	for _, c := range []struct {
		err  error
		want unix.Errno
	}{
		{nil, 0},
		{dev.ErrNoSpace, unix.ENOSPC},
		{fmt.Errorf("thin 7: provision block 12: %w", dev.ErrNoSpace), unix.ENOSPC},
		{errors.Join(dev.ErrNoSpace, unix.EIO), unix.ENOSPC},
		{dev.ErrReadOnly, unix.EROFS},
		{dev.ErrClosed, unix.EIO},
		{dev.ErrOutOfRange, unix.EINVAL},
		{dev.ErrUnsupported, unix.EOPNOTSUPP},
		{fmt.Errorf("message: %w", errMalformed), unix.EINVAL},
		{io.EOF, unix.EIO},
		{io.ErrUnexpectedEOF, unix.EIO},
		{unix.EIO, unix.EIO},
		{&os.PathError{Op: "write", Path: "data", Err: unix.ENOSPC}, unix.ENOSPC},
		{unix.EDQUOT, unix.ENOSPC},
		{unix.ENOMEM, unix.ENOMEM},
		{unix.EAGAIN, unix.EIO},
		{unix.EINTR, unix.EIO},
		{unix.ENOSYS, unix.EOPNOTSUPP}, // ENOSYS would switch the operation off
		{unix.Errno(512), unix.EIO},    // ERESTARTSYS is not for replies
		{unix.Errno(100000), unix.EIO},
		{errors.New("pool failed"), unix.EIO},
	} {
		if got := errnoOf(c.err); got != c.want {
			t.Errorf("%v: %v, want %v", c.err, got, c.want)
		}
	}
}

func TestVersion(t *testing.T) {
	for _, c := range []struct {
		release      string
		major, minor int
	}{{"6.12.9+bpo-amd64", 6, 12}, {"6.9-rc3", 6, 9}, {"5.4.0-150-generic", 5, 4}, {"7.0", 7, 0}, {"6", 6, 0}, {"x", 0, 0}, {"", 0, 0}} {
		if a, b := version(c.release); a != c.major || b != c.minor {
			t.Errorf("%q: %d.%d, want %d.%d", c.release, a, b, c.major, c.minor)
		}
	}
}
