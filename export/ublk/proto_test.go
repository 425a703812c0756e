package ublk

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"runtime"
	"strings"
	"testing"

	"mica/dev"
	"mica/export"

	"golang.org/x/sys/unix"
)

// TestNumbers: the commands as the driver's header has them, computed there by _IOR and _IOWR.
func TestNumbers(t *testing.T) {
	for got, want := range map[uint32]uint32{
		cmdGetDevInfo: 0x80207502, cmdAddDev: 0xc0207504, cmdDelDev: 0xc0207505, cmdStartDev: 0xc0207506,
		cmdStopDev: 0xc0207507, cmdSetParams: 0xc0207508, cmdStartRecovery: 0xc0207510, cmdEndRecovery: 0xc0207511,
		cmdGetFeatures: 0x80207513, cmdDelDevAsync: 0x80207514, cmdUpdateSize: 0xc0207515,
		ioFetch: 0xc0107520, ioCommitAndFetch: 0xc0107521,
	} {
		if got != want {
			t.Errorf("%s: 0x%x, want 0x%x", commandNames[got], got, want)
		}
	}
}

func unhex(t *testing.T, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.NewReplacer(" ", "", "\n", "", "\t", "").Replace(s))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestEncodings(t *testing.T) {
	c := ctrlCmd{id: 0x01020304, buf: make([]byte, 8), data: 0x1122334455667788}
	want := unhex(t, "04030201 ffff 0800 efcdab8967452301 8877665544332211 0000000000000000")
	if got := c.encode(0x0123456789abcdef); !bytes.Equal(got, want) {
		t.Errorf("control command %x, want %x", got, want)
	}
	i := devInfo{queues: 2, depth: 128, maxIO: 1 << 20, id: anyID, flags: featNeeded, cookie: 0x6d69000000000001}
	want = unhex(t, "0200 8000 0000 0000 00001000 ffffffff 00000000 00000000 d800000000000000 010000000000696d"+strings.Repeat("00", 24))
	got := i.encode()
	if !bytes.Equal(got, want) {
		t.Errorf("device %x, want %x", got, want)
	}
	var back devInfo
	if back.decode(got); back != i {
		t.Errorf("read back %+v, want %+v", back, i)
	}
	var cmd [ioCmdLen]byte
	encodeIOCmd(&cmd, 1, 0x203, -28)
	if want := unhex(t, "0100 0302 e4ffffff 0000000000000000"); !bytes.Equal(cmd[:], want) {
		t.Errorf("I/O command %x, want %x", cmd, want)
	}
	desc := unhex(t, "01200000 08000000 0004000000000000 0000000000000000")
	if d := decodeIODesc(desc); d.op != opWrite || d.flags != flagFUA || d.off != 512<<10 || d.n != 4096 {
		t.Errorf("request %+v", d)
	}
	if a, b := descsOffset(1), dataOffset(3, 5); a != 98304 || b != 1<<31+3<<41+5<<25 {
		t.Errorf("offsets %d, %d", a, b)
	}
}

type discardOnly struct{ dev.Device }

func (discardOnly) Discard(_, _ int64) error { return nil }

type blocks struct {
	discardOnly
	size int64
}

func (b blocks) BlockSize() int64 { return b.size }

func TestParams(t *testing.T) {
	plain := struct{ dev.Device }{dev.NewMem(1 << 20)} // without extras
	for _, c := range []struct {
		name string
		d    dev.Device
		o    export.AttachOptions
		want params
	}{
		{"plain", plain, export.AttachOptions{SectorSize: 512},
			params{attrs: attrVolatileCache | attrFUA, logicalShift: 9, physicalShift: 9, optimal: 9, maxSectors: 2048, sectors: 2048}},
		{"read-only", discardOnly{plain}, export.AttachOptions{SectorSize: 4096, ReadOnly: true},
			params{attrs: attrReadOnly, logicalShift: 12, physicalShift: 12, optimal: 12, maxSectors: 2048, sectors: 2048}},
		{"blocks of 64 KiB", blocks{discardOnly{plain}, 64 << 10}, export.AttachOptions{SectorSize: 512},
			params{attrs: attrVolatileCache | attrFUA, logicalShift: 9, physicalShift: 9, optimal: 16, maxSectors: 2048, sectors: 2048, granularity: 64 << 10}},
		{"blocks of 192 KiB", blocks{discardOnly{plain}, 192 << 10}, export.AttachOptions{SectorSize: 512},
			params{attrs: attrVolatileCache | attrFUA, logicalShift: 9, physicalShift: 9, optimal: 9, maxSectors: 2048, sectors: 2048, granularity: 192 << 10}},
		{"blocks below a sector", blocks{discardOnly{plain}, 512}, export.AttachOptions{SectorSize: 4096},
			params{attrs: attrVolatileCache | attrFUA, logicalShift: 12, physicalShift: 12, optimal: 12, maxSectors: 2048, sectors: 2048, granularity: 4096}},
	} {
		if got := paramsOf(c.d, 1<<20, c.o); *got != c.want {
			t.Errorf("%s: %+v, want %+v", c.name, *got, c.want)
		}
	}
	p := params{attrs: attrVolatileCache, logicalShift: 9, physicalShift: 9, optimal: 16, maxSectors: 2048, sectors: 1 << 40, granularity: 65536}
	want := unhex(t, `3c000000 03000000 04000000 09091009 00080000 00000000 0000000000010000 0000000000000000
		00000000 00000100 ffff7f00 ffff7f00 0100 0000`)
	if got := p.encode(); !bytes.Equal(got, want) {
		t.Errorf("parameters %x, want %x", got, want)
	}
}

// TestOldKernels: each feature that is missing is named, with the kernel that has it.
func TestOldKernels(t *testing.T) {
	if err := checkFeatures(featNeeded | 1<<40); err != nil {
		t.Errorf("all there: %v", err)
	}
	for bit, want := range map[uint64]string{featUserCopy: "user copy", featRecovery: "user recovery", featReissue: "reissue", featIoctlEncode: "6.4"} {
		err := checkFeatures(featNeeded &^ bit)
		if !errors.Is(err, export.ErrUnavailable) || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "kernel is too old") {
			t.Errorf("without 0x%x: %v, want %q", bit, err, want)
		}
	}
}

func TestErrno(t *testing.T) {
	for _, c := range []struct {
		err  error
		want unix.Errno
	}{
		{nil, 0}, {fmt.Errorf("x: %w", dev.ErrNoSpace), unix.ENOSPC}, {dev.ErrReadOnly, unix.EROFS}, {dev.ErrOutOfRange, unix.EINVAL},
		{dev.ErrUnsupported, unix.EOPNOTSUPP}, {dev.ErrClosed, unix.EIO}, {unix.EDQUOT, unix.ENOSPC}, {unix.ENODEV, unix.EIO},
		{unix.EAGAIN, unix.EIO}, {unix.EINTR, unix.EIO}, {unix.EREMOTEIO, unix.EREMOTEIO}, {errors.New("x"), unix.EIO},
	} {
		if got := errnoOf(c.err); got != c.want {
			t.Errorf("%v: %v, want %v", c.err, got, c.want)
		}
	}
}

func TestCookies(t *testing.T) {
	a, b, c := cookieOf("/run/mica", "x"), cookieOf("/run/mica", "y"), cookieOf("/run/other", "x")
	if a&cookieRun != b&cookieRun || a&cookieRun == c&cookieRun || a&cookieName != c&cookieName || a&cookieName == b&cookieName {
		t.Errorf("%x, %x, %x", a, b, c)
	}
	if a>>48 != 0x6d69 || a == b || a == c {
		t.Errorf("%x", a)
	}
}

// TestWithoutAdmin: the capability is gone inside, and back afterwards.
func TestWithoutAdmin(t *testing.T) {
	has := func() bool {
		hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var d [2]unix.CapUserData
		if err := unix.Capget(&hdr, &d[0]); err != nil {
			t.Fatal(err)
		}
		return d[0].Effective&(1<<unix.CAP_SYS_ADMIN) != 0
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread()
		before := has()
		if !before {
			t.Log("there is no CAP_SYS_ADMIN to give up")
		}
		err := withoutAdmin(func() error {
			if has() {
				t.Error("CAP_SYS_ADMIN is still there")
			}
			return errBroken
		})
		if !errors.Is(err, errBroken) || has() != before {
			t.Errorf("afterwards: %v, %v", err, has())
		}
	}()
	<-done
}

var errBroken = errors.New("broken on purpose")
