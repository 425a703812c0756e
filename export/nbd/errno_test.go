package nbd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"
	"testing"

	"mica/dev"
)

func TestErrnoOf(t *testing.T) {
	tests := []struct {
		err  error
		want Errno
	}{
		{nil, 0},
		{dev.ErrNoSpace, ENOSPC},
		{fmt.Errorf("thin 7: provision block 3: %w", dev.ErrNoSpace), ENOSPC},
		{&os.PathError{Op: "write", Path: "/x", Err: syscall.ENOSPC}, ENOSPC},
		{syscall.EDQUOT, ENOSPC},
		{syscall.EFBIG, ENOSPC},
		{dev.ErrReadOnly, EPERM},
		{fmt.Errorf("pool: %w", dev.ErrReadOnly), EPERM},
		{syscall.EROFS, EPERM},
		{syscall.EPERM, EPERM},
		{dev.ErrOutOfRange, EINVAL},
		{dev.CheckRange(5, 5, 5), EINVAL},
		{io.EOF, EINVAL},
		{io.ErrUnexpectedEOF, EINVAL},
		{dev.ErrClosed, ESHUTDOWN},
		{context.Canceled, ESHUTDOWN},
		{errShutdown, ESHUTDOWN},
		{refuse(EOVERFLOW, "too long"), EOVERFLOW},
		{fmt.Errorf("wrapped: %w", refuse(ENOTSUP, "slow")), ENOTSUP},
		{EPERM, EPERM},
		{syscall.EIO, EIO},
		{dev.ErrWouldBlock, EIO}, // nobody's to see
		{errors.New("anything else"), EIO},
		{errors.Join(errors.New("a"), dev.ErrNoSpace), ENOSPC},
	}
	for _, tt := range tests {
		if got := errnoOf(tt.err); got != tt.want {
			t.Errorf("errnoOf(%v) = %d, want %d", tt.err, got, tt.want)
		}
	}
}

// TestDeviceErrorsReachTheClient injects errors into every kind of request, on every path
// through the server, and looks at what arrives. Nothing of it may end the connection.
func TestDeviceErrorsReachTheClient(t *testing.T) {
	causes := []struct {
		err  error
		want Errno
	}{
		{dev.ErrNoSpace, ENOSPC}, {dev.ErrReadOnly, EPERM}, {dev.ErrOutOfRange, EINVAL}, {dev.ErrClosed, ESHUTDOWN}, {dev.ErrInjected, EIO},
	}
	requests := []struct {
		name       string
		flags, cmd uint16
		n          int
		op         dev.Op
	}{
		{"small read", 0, cmdRead, 4096, dev.OpRead},
		{"read in pieces", 0, cmdRead, 3 * pieceSize, dev.OpRead},
		{"long read", 0, cmdRead, wholeSize + pieceSize, dev.OpRead},
		{"small write", 0, cmdWrite, 4096, dev.OpWrite},
		{"write in pieces", 0, cmdWrite, 3 * pieceSize, dev.OpWrite},
		{"forced write", cmdFlagFUA, cmdWrite, 4096, dev.OpWrite},
		{"flush of a forced write", cmdFlagFUA, cmdWrite, 4096, dev.OpFlush},
		{"flush of a forced write in pieces", cmdFlagFUA, cmdWrite, 2 * pieceSize, dev.OpFlush},
		{"flush", 0, cmdFlush, 0, dev.OpFlush},
		{"trim", 0, cmdTrim, 1 << 20, dev.OpDiscard},
		{"flush of a forced trim", cmdFlagFUA, cmdTrim, 1 << 20, dev.OpFlush},
		{"zeroes", 0, cmdWriteZeroes, 1 << 20, dev.OpZero},
		{"zeroes without a hole", cmdFlagNoHole, cmdWriteZeroes, 1 << 20, dev.OpZero},
		{"flush of forced zeroes", cmdFlagFUA, cmdWriteZeroes, 1 << 20, dev.OpFlush},
	}
	for _, structured := range []bool{false, true} {
		f := dev.NewFault(dev.NewMem(8 << 20))
		_, c := serveDevice(t, f, ExportOptions{}, structured, false)
		for _, r := range requests {
			for _, cause := range causes {
				name := fmt.Sprintf("structured %v, %s, %v", structured, r.name, cause.err)
				f.Add(dev.Rule{Ops: r.op, Err: cause.err, Times: 1})
				var data []byte
				if r.cmd == cmdWrite {
					data = make([]byte, r.n)
				}
				off := uint64(4096)
				if r.cmd == cmdFlush {
					off = 0
				}
				_, chunks, err := c.do(r.flags, r.cmd, off, uint32(r.n), data)
				f.Clear()
				if err != cause.want {
					t.Fatalf("%s: got %v, want %v", name, err, cause.want)
				}
				if last := chunks[len(chunks)-1]; structured && len(last.data) <= 6 {
					t.Errorf("%s: no message in the error chunk", name)
				}
			}
		}
		if _, _, err := c.do(0, cmdRead, 0, 4096, nil); err != nil {
			t.Errorf("structured %v: after all errors: %v", structured, err)
		}
	}
}

// TestLateReadErrorCloses: a simple reply of many pieces has no way to report an error in the
// middle but the end of the connection.
func TestLateReadErrorCloses(t *testing.T) {
	f := dev.NewFault(dev.NewMem(8 << 20))
	s, c := serveDevice(t, f, ExportOptions{}, false, false)
	f.Add(dev.Rule{Ops: dev.OpRead, Skip: 2})
	if _, _, err := c.do(0, cmdRead, 0, 4<<20, nil); err == nil || isTimeout(err) {
		t.Fatalf("got %v, want a broken connection", err)
	}
	f.Clear()
	d := connect(t, s.path, "disk", false, false)
	if _, _, err := d.do(0, cmdRead, 0, 4<<20, nil); err != nil {
		t.Errorf("another connection: %v", err)
	}
}
