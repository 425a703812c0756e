package nbd

import (
	"io"
	"strings"
	"testing"

	"mica/dev"
)

// badRequests is what clients must not send, and what they get for it; the connection goes on.
func badRequests(size uint64, structured bool) map[string]struct {
	flags, cmd uint16
	off        uint64
	n          uint32
	want       Errno
} {
	type r = struct {
		flags, cmd uint16
		off        uint64
		n          uint32
		want       Errno
	}
	m := map[string]r{
		"read past the end":                  {0, cmdRead, size - 4096, 8192, EINVAL},
		"read at the end":                    {0, cmdRead, size, 512, EINVAL},
		"read far beyond":                    {0, cmdRead, 1<<64 - 512, 512, EINVAL},
		"read whose end overflows":           {0, cmdRead, 1<<64 - 512, 4096, EINVAL},
		"read at an odd offset":              {0, cmdRead, 100, 512, EINVAL},
		"read of an odd length":              {0, cmdRead, 0, 100, EINVAL},
		"read of nothing":                    {0, cmdRead, 0, 0, EINVAL},
		"read longer than allowed":           {0, cmdRead, 0, maxPayload + 512, EINVAL},
		"longest read there is":              {0, cmdRead, 0, 1<<32 - 512, EINVAL},
		"read with an unknown flag":          {1 << 9, cmdRead, 0, 512, EINVAL},
		"read with a flag of others":         {cmdFlagNoHole, cmdRead, 0, 512, EINVAL},
		"write past the end":                 {0, cmdWrite, size - 4096, 8192, ENOSPC},
		"big write past the end":             {0, cmdWrite, size - 4096, 1 << 20, ENOSPC},
		"write far beyond":                   {0, cmdWrite, 1 << 63, 512, ENOSPC},
		"write whose end overflows":          {0, cmdWrite, 1<<64 - 512, 1024, ENOSPC},
		"write at an odd offset":             {0, cmdWrite, 1, 512, EINVAL},
		"write of an odd length":             {0, cmdWrite, 0, 513, EINVAL},
		"big write of an odd length":         {0, cmdWrite, 0, 200001, EINVAL},
		"write of nothing":                   {0, cmdWrite, 0, 0, EINVAL},
		"write with an unknown flag":         {1 << 15, cmdWrite, 0, 4096, EINVAL},
		"write with payload length flag":     {1 << 5, cmdWrite, 0, 4096, EINVAL},
		"flush with an offset":               {0, cmdFlush, 512, 0, EINVAL},
		"flush with a length":                {0, cmdFlush, 0, 512, EINVAL},
		"flush with a flag":                  {cmdFlagDF, cmdFlush, 0, 0, EINVAL},
		"trim past the end":                  {0, cmdTrim, size - 512, 1024, EINVAL},
		"trim of nothing":                    {0, cmdTrim, 0, 0, EINVAL},
		"trim at an odd offset":              {0, cmdTrim, 3, 512, EINVAL},
		"zeroes past the end":                {0, cmdWriteZeroes, size, 512, ENOSPC},
		"longest zeroes":                     {0, cmdWriteZeroes, 512, 1<<32 - 512, ENOSPC},
		"zeroes with a flag of others":       {cmdFlagReqOne, cmdWriteZeroes, 0, 512, EINVAL},
		"fast zeroes that are not":           {cmdFlagFastZero | cmdFlagNoHole, cmdWriteZeroes, 0, 4096, ENOTSUP},
		"status without a context":           {0, cmdBlockStatus, 0, 512, EINVAL},
		"cache":                              {0, 5, 0, 512, EINVAL},
		"resize":                             {0, 8, 0, 512, EINVAL},
		"unknown command":                    {0, 4711, 0, 0, EINVAL},
		"unknown command with odd arguments": {0xffff, 0xffff, 1<<64 - 1, 1<<32 - 1, EINVAL},
	}
	if structured {
		m["read unfragmented and too long"] = r{cmdFlagDF, cmdRead, 0, wholeSize + 512, EOVERFLOW}
	} else {
		m["read unfragmented without structured replies"] = r{cmdFlagDF, cmdRead, 0, 512, EINVAL}
	}
	return m
}

func TestBadRequestsAreRefused(t *testing.T) {
	const size = 64 << 20
	for _, structured := range []bool{false, true} {
		f := dev.NewFault(dev.NewMem(size))
		_, c := serveDevice(t, f, ExportOptions{}, structured, false)
		for name, r := range badRequests(size, structured) {
			var data []byte
			if r.cmd == cmdWrite {
				data = make([]byte, r.n)
			}
			before := f.Counts()
			if _, _, err := c.do(r.flags, r.cmd, r.off, r.n, data); err != r.want {
				t.Fatalf("structured %v, %s: got %v, want %v", structured, name, err, r.want)
			}
			if got := f.Counts().Sub(before); got != (dev.OpCounts{}) {
				t.Errorf("structured %v, %s: reached the device: %+v", structured, name, got)
			}
		}
		if _, _, err := c.do(0, cmdRead, 0, 4096, nil); err != nil {
			t.Errorf("structured %v: after all refusals: %v", structured, err)
		}
	}
}

// TestReadOnlyExport: changes are refused with EPERM, their payload is skipped, reads go on.
func TestReadOnlyExport(t *testing.T) {
	f := dev.NewFault(dev.NewMem(8 << 20))
	_, c := serveDevice(t, f, ExportOptions{ReadOnly: true}, true, true)
	for _, r := range []struct {
		cmd uint16
		n   int
	}{{cmdWrite, 512}, {cmdWrite, inlineMax + 512}, {cmdWrite, 4 << 20}, {cmdTrim, 4096}, {cmdWriteZeroes, 4096}} {
		var data []byte
		if r.cmd == cmdWrite {
			data = make([]byte, r.n)
		}
		if _, _, err := c.do(0, r.cmd, 0, uint32(r.n), data); err != EPERM {
			t.Errorf("%s of %d: %v, want EPERM", commandName(r.cmd), r.n, err)
		}
	}
	if got := f.Counts(); got.Writes+got.Discards+got.Zeroes != 0 {
		t.Errorf("the device was changed: %+v", got)
	}
	for _, cmd := range []uint16{cmdRead, cmdBlockStatus} {
		if _, _, err := c.do(0, cmd, 0, 4096, nil); err != nil {
			t.Errorf("%s: %v", commandName(cmd), err)
		}
	}
	if _, _, err := c.do(0, cmdFlush, 0, 0, nil); err != nil {
		t.Errorf("flush: %v", err)
	}
}

// TestViolationsClose: where the protocol leaves no way to go on, the connection ends, and the
// server does not.
func TestViolationsClose(t *testing.T) {
	s, path := startServer(t, Options{})
	if err := s.AddExport("disk", dev.NewMem(64<<20), ExportOptions{}); err != nil {
		t.Fatal(err)
	}
	bad := map[string][]byte{
		"wrong magic":            append(rawRequest(0, cmdRead, 1, 0, 512, nil)[4:], 0, 0, 0, 0),
		"reply magic":            append([]byte{0x67, 0x44, 0x66, 0x98}, make([]byte, 24)...),
		"payload beyond limit":   rawRequest(0, cmdWrite, 1, 0, maxPayload+512, nil),
		"payload of 4 GiB":       rawRequest(0, cmdWrite, 1, 0, 1<<32-1, nil),
		"an option, not request": append([]byte("IHAVEOPT"), make([]byte, 20)...),
	}
	for name, send := range bad {
		t.Run(name, func(t *testing.T) {
			c := connect(t, path, "disk", true, false)
			c.nc.Write(send)
			wantClosed(t, c)
		})
	}
}

func TestDecodeRequest(t *testing.T) {
	b := rawRequest(3, 1, 0x0102030405060708, 0x1112131415161718, 0x21222324, nil)
	r, err := decodeRequest(b)
	if want := (request{3, 1, 0x0102030405060708, 0x1112131415161718, 0x21222324}); err != nil || r != want {
		t.Errorf("got %+v, %v, want %+v", r, err, want)
	}
	b[0] = 0
	if _, err := decodeRequest(b); err == nil || !strings.Contains(err.Error(), "0x00609513") {
		t.Errorf("wrong magic: %v", err)
	}
}

// TestReplyLayouts compares encoders with bytes written down from the protocol document.
func TestReplyLayouts(t *testing.T) {
	b := make([]byte, 64)
	tests := map[string]struct {
		got  []byte
		want string
	}{
		"simple": {func() []byte { putSimple(b, 0x1122, ENOSPC); return b[:16] }(), "\x67\x44\x66\x98" + "\x00\x00\x00\x1c" + "\x00\x00\x00\x00\x00\x00\x11\x22"},
	}
	h := make([]byte, holeChunkSize)
	putHoleChunk(h, 1, 7, 0x200, 0x400)
	tests["hole"] = struct {
		got  []byte
		want string
	}{h, "\x66\x8e\x33\xef" + "\x00\x01" + "\x00\x02" + "\x00\x00\x00\x00\x00\x00\x00\x07" + "\x00\x00\x00\x0c" + "\x00\x00\x00\x00\x00\x00\x02\x00" + "\x00\x00\x04\x00"}
	d := make([]byte, dataChunkSize)
	putDataChunk(d, 0, 7, 0x200, 0x400)
	tests["data"] = struct {
		got  []byte
		want string
	}{d, "\x66\x8e\x33\xef" + "\x00\x00" + "\x00\x01" + "\x00\x00\x00\x00\x00\x00\x00\x07" + "\x00\x00\x04\x08" + "\x00\x00\x00\x00\x00\x00\x02\x00"}
	tests["error"] = struct {
		got  []byte
		want string
	}{appendErrorChunk(nil, 7, EIO, "hm"), "\x66\x8e\x33\xef" + "\x00\x01" + "\x80\x01" + "\x00\x00\x00\x00\x00\x00\x00\x07" + "\x00\x00\x00\x08" + "\x00\x00\x00\x05" + "\x00\x02" + "hm"}
	for name, tt := range tests {
		if string(tt.got) != tt.want {
			t.Errorf("%s: got %x, want %x", name, tt.got, tt.want)
		}
	}
	if n := len(appendErrorChunk(nil, 1, EIO, strings.Repeat("é", 300))); n > chunkSize+6+256 {
		t.Errorf("error chunk of %d bytes", n)
	}
}

func TestPreferredBlock(t *testing.T) {
	for n, want := range map[int64]uint32{0: 4096, -5: 4096, 100: 512, 512: 512, 4096: 4096, 64 << 10: 64 << 10,
		192 << 10: 64 << 10, 1 << 30: 32 << 20, 1<<30 + 64<<10: 64 << 10} {
		if got := preferredBlock(n); got != want {
			t.Errorf("preferredBlock(%d) = %d, want %d", n, got, want)
		}
	}
}

// TestDisconnect: requests in flight are answered before the server closes, later ones are not.
func TestDisconnect(t *testing.T) {
	f := dev.NewFault(dev.NewMem(8 << 20))
	_, c := serveDevice(t, f, ExportOptions{}, true, false)
	gate := make(chan struct{})
	f.Add(dev.Rule{Ops: dev.OpFlush, Times: 1, Pass: true, Before: func(dev.Op, int64, int64) { <-gate }})
	var b []byte
	b = append(b, rawRequest(0, cmdFlush, 1, 0, 0, nil)...)
	b = append(b, rawRequest(0, cmdRead, 2, 0, 512, nil)...)
	b = append(b, rawRequest(0, cmdDisc, 3, 0, 0, nil)...)
	b = append(b, rawRequest(0, cmdRead, 4, 0, 512, nil)...)
	if _, err := c.nc.Write(b); err != nil {
		t.Fatal(err)
	}
	if k, err := c.reply(nil); err != nil || k.cookie != 2 {
		t.Fatalf("got %+v, %v, want the reply to 2", k, err)
	}
	close(gate)
	if k, err := c.reply(nil); err != nil || k.cookie != 1 || k.errno != 0 {
		t.Fatalf("got %+v, %v, want the reply to 1", k, err)
	}
	if k, err := c.reply(nil); err != io.EOF && !isReset(err) {
		t.Fatalf("got %+v, %v, want the end", k, err)
	}
}
