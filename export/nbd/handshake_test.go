package nbd

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"syscall"
	"testing"
	"time"

	"mica/dev"
)

// wantClosed fails unless the server has closed the connection without another byte.
func wantClosed(t *testing.T, c *tclient) {
	t.Helper()
	if b, err := c.r.ReadByte(); err == nil {
		t.Fatalf("got byte %#x, want a closed connection", b)
	} else if isTimeout(err) {
		t.Fatalf("connection still open: %v", err)
	}
}

func isTimeout(err error) bool {
	var ne net.Error
	return errors.As(err, &ne) && ne.Timeout()
}

// types lists the reply types to one option.
func types(rs []optReply) string {
	names := map[uint32]string{1: "ACK", 2: "SERVER", 3: "INFO", 4: "META", 1<<31 + 1: "UNSUP", 1<<31 + 3: "INVALID",
		1<<31 + 6: "UNKNOWN", 1<<31 + 7: "SHUTDOWN", 1<<31 + 9: "TOO_BIG"}
	var s []string
	for _, r := range rs {
		n := names[r.typ]
		if n == "" {
			n = fmt.Sprintf("%#x", r.typ)
		}
		s = append(s, n)
	}
	return strings.Join(s, " ")
}

func TestOptions(t *testing.T) {
	s, path := startServer(t, Options{})
	for _, n := range []string{"a", "b", "name with / and ?"} {
		if err := s.AddExport(n, dev.NewMem(1<<20), ExportOptions{Description: "about " + n}); err != nil {
			t.Fatal(err)
		}
	}
	// Not an Extenter: no metadata context.
	if err := s.AddExport("plain", bare{dev.NewMem(1 << 20)}, ExportOptions{}); err != nil {
		t.Fatal(err)
	}
	many := make([]string, maxMetaQuery+1)
	type step struct {
		opt  uint32
		data []byte
		want string
	}
	structured := step{8, nil, "ACK"}
	tests := map[string][]step{
		"go":                                  {{7, goData("a"), "INFO INFO ACK"}},
		"go with all infos":                   {{7, goData("a", 0, 1, 2, 3, 77), "INFO INFO INFO INFO ACK"}},
		"go to a name with odd characters":    {{7, goData("name with / and ?"), "INFO INFO ACK"}},
		"go to nowhere and then somewhere":    {{7, goData("z"), "UNKNOWN"}, {7, goData("b"), "INFO INFO ACK"}},
		"no default among several":            {{7, goData(""), "UNKNOWN"}},
		"info does not enter":                 {{6, goData("a", 3), "INFO INFO ACK"}, {6, goData("z"), "UNKNOWN"}, {7, goData("a"), "INFO INFO ACK"}},
		"info without description":            {{6, goData("plain", 2), "INFO INFO ACK"}},
		"go cut short":                        {{7, []byte{0, 0}, "INVALID"}, {7, nil, "INVALID"}, {7, goData("a")[:6], "INVALID"}},
		"go with a name longer than the data": {{7, append(str32("abc")[:4], "ab\x00\x00"...), "INVALID"}},
		"go with huge name length":            {{7, []byte{255, 255, 255, 255, 0, 0}, "INVALID"}},
		"go with more infos than data":        {{7, append(str32("a"), 0, 9, 0, 1), "INVALID"}},
		"go with trailing data":               {{7, append(goData("a", 1), 0), "INVALID"}},
		"go with a name that is not utf-8":    {{7, goData("\xff"), "INVALID"}},
		"go with a zero byte in the name":     {{7, goData("a\x00"), "INVALID"}},
		"go with a name too long":             {{7, goData(strings.Repeat("x", 4097)), "INVALID"}},
		"list":                                {{3, nil, "SERVER SERVER SERVER SERVER ACK"}, {3, nil, "SERVER SERVER SERVER SERVER ACK"}},
		"list with data":                      {{3, []byte("x"), "INVALID"}},
		"abort":                               {{2, nil, "ACK"}},
		"abort with data":                     {{2, []byte("why not"), "ACK"}},
		"starttls":                            {{5, nil, "UNSUP"}, structured},
		"unknown options are skipped":         {{4, []byte("peek"), "UNSUP"}, {8888, make([]byte, maxOption), "UNSUP"}, {11, nil, "UNSUP"}, structured},
		"structured reply":                    {structured, structured},
		"structured reply with data":          {{8, []byte{1}, "INVALID"}},
		"contexts need structured replies":    {{9, metaData("a"), "INVALID"}, {10, metaData("a", "base:allocation"), "INVALID"}},
		"list all contexts":                   {structured, {9, metaData("a"), "META ACK"}},
		"list contexts by wildcard":           {structured, {9, metaData("a", "base:"), "META ACK"}},
		"list contexts of a name":             {structured, {9, metaData("a", "x-y:z", "base:allocation", "base:allocation"), "META ACK"}},
		"list contexts of others":             {structured, {9, metaData("a", "qemu:", "base:else", "nonsense", ""), "ACK"}},
		"set context":                         {structured, {10, metaData("a", "base:allocation"), "META ACK"}},
		"set no context":                      {structured, {10, metaData("a"), "ACK"}},
		"set ignores the wildcard":            {structured, {10, metaData("a", "base:"), "ACK"}},
		"set for an unknown export":           {structured, {10, metaData("z", "base:allocation"), "UNKNOWN"}},
		"no context without extents":          {structured, {9, metaData("plain"), "ACK"}, {10, metaData("plain", "base:allocation"), "ACK"}},
		"too many queries":                    {structured, {10, metaData("a", many...), "TOO_BIG"}},
		"contexts cut short":                  {structured, {10, metaData("a", "base:allocation")[:20], "INVALID"}, {9, str32("a"), "INVALID"}, {9, nil, "INVALID"}},
		"contexts with trailing data":         {structured, {10, append(metaData("a", "base:"), 1), "INVALID"}},
	}
	for name, steps := range tests {
		t.Run(name, func(t *testing.T) {
			c, err := dial(path)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			for i, st := range steps {
				rs, err := c.option(st.opt, st.data)
				if err != nil {
					t.Fatalf("step %d, option %d: %v after %s", i, st.opt, err, types(rs))
				}
				if got := types(rs); got != st.want {
					t.Errorf("step %d, option %d: got %s, want %s", i, st.opt, got, st.want)
				}
				if st.opt == 2 {
					wantClosed(t, c)
				}
			}
		})
	}
}

func TestInfoContents(t *testing.T) {
	s, path := startServer(t, Options{})
	if err := s.AddExport("x", newTryMem(3<<20), ExportOptions{Description: "tüt"}); err != nil {
		t.Fatal(err)
	}
	c, err := dial(path)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	rs, err := c.option(6, goData("", 1, 2, 3))
	if err != nil || types(rs) != "INFO INFO INFO INFO ACK" {
		t.Fatalf("%s, %v", types(rs), err)
	}
	got := map[uint16]string{}
	for _, r := range rs[:4] {
		got[binary.BigEndian.Uint16(r.data)] = string(r.data[2:])
	}
	flags := uint16(flagHasFlags | flagSendFlush | flagSendFUA | flagSendTrim | flagSendZeroes | flagMultiConn | flagSendFastZero)
	want := map[uint16]string{
		0: "\x00\x00\x00\x00\x00\x30\x00\x00" + string(binary.BigEndian.AppendUint16(nil, flags)),
		1: "x", // the default export's real name
		2: "tüt",
		3: "\x00\x00\x02\x00" + "\x00\x01\x00\x00" + "\x02\x00\x00\x00",
	}
	for k, w := range want {
		if got[k] != w {
			t.Errorf("info %d: got %q, want %q", k, got[k], w)
		}
	}
	if rs, err = c.option(3, nil); err != nil || string(rs[0].data) != "\x00\x00\x00\x01xtüt" {
		t.Errorf("list: %s, %v", types(rs), err)
	}
}

// TestFlagsByDevice: what is offered is what the device can do.
func TestFlagsByDevice(t *testing.T) {
	const always = flagHasFlags | flagSendFlush | flagSendFUA | flagMultiConn
	tests := map[string]struct {
		d          dev.Device
		o          ExportOptions
		structured bool
		want       uint16
	}{
		"memory":                {dev.NewMem(512), ExportOptions{}, false, always | flagSendTrim | flagSendZeroes | flagSendFastZero},
		"structured":            {dev.NewMem(512), ExportOptions{}, true, always | flagSendTrim | flagSendZeroes | flagSendFastZero | flagSendDF},
		"without extras":        {bare{dev.NewMem(512)}, ExportOptions{}, false, always | flagSendZeroes | flagSendFastZero},
		"read-only":             {dev.NewMem(512), ExportOptions{ReadOnly: true}, false, always | flagReadOnly},
		"empty":                 {dev.NewMem(0), ExportOptions{}, false, always | flagSendTrim | flagSendZeroes | flagSendFastZero},
		"read-only, structured": {dev.NewMem(512), ExportOptions{ReadOnly: true}, true, always | flagReadOnly | flagSendDF},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			_, c := serveDevice(t, tt.d, tt.o, tt.structured, false)
			if c.flags != tt.want {
				t.Errorf("flags %#x, want %#x", c.flags, tt.want)
			}
			if c.size != uint64(tt.d.Size()) {
				t.Errorf("size %d, want %d", c.size, tt.d.Size())
			}
			if c.blocks != [3]uint32{512, 4096, 32 << 20} {
				t.Errorf("block sizes %v", c.blocks)
			}
		})
	}
}

func TestExportName(t *testing.T) {
	s, path := startServer(t, Options{})
	if err := s.AddExport("", dev.NewMem(1<<20), ExportOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := s.AddExport("other", dev.NewMem(2<<20), ExportOptions{ReadOnly: true}); err != nil {
		t.Fatal(err)
	}
	tests := map[string]struct {
		flags  uint32
		name   string
		size   uint64
		length int
	}{
		"no zeroes":           {3, "other", 2 << 20, 10},
		"with zeroes":         {1, "other", 2 << 20, 134},
		"not fixed newstyle":  {0, "", 1 << 20, 134},
		"default":             {3, "", 1 << 20, 10},
		"unknown is closed":   {3, "nope", 0, 0},
		"not utf-8 is closed": {3, "\xfe", 0, 0},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			nc, err := net.Dial("unix", path)
			if err != nil {
				t.Fatal(err)
			}
			defer nc.Close()
			c, err := greet(nc, tt.flags)
			if err != nil {
				t.Fatal(err)
			}
			if err := c.sendOption(1, []byte(tt.name)); err != nil {
				t.Fatal(err)
			}
			if tt.length == 0 {
				wantClosed(t, c)
				return
			}
			b := make([]byte, tt.length)
			if _, err := io.ReadFull(c.r, b); err != nil {
				t.Fatal(err)
			}
			if got := binary.BigEndian.Uint64(b); got != tt.size {
				t.Errorf("size %d, want %d", got, tt.size)
			}
			if _, _, err := c.do(0, cmdRead, 0, 512, nil); err != nil {
				t.Errorf("read: %v", err)
			}
		})
	}
}

func TestHandshakeViolationsClose(t *testing.T) {
	s, path := startServer(t, Options{HandshakeTimeout: 10 * time.Second})
	if err := s.AddExport("a", dev.NewMem(1<<20), ExportOptions{}); err != nil {
		t.Fatal(err)
	}
	option := func(opt, n uint32) []byte {
		b := binary.BigEndian.AppendUint32([]byte("IHAVEOPT"), opt)
		return binary.BigEndian.AppendUint32(b, n)
	}
	many := []byte{0, 0, 0, 3}
	for range maxOptions {
		many = append(many, option(99, 0)...)
	}
	tests := map[string][]byte{
		"unknown client flag":   {0, 0, 0, 4},
		"all client flags":      {255, 255, 255, 255},
		"wrong option magic":    append([]byte{0, 0, 0, 3}, make([]byte, 16)...),
		"oversized option":      append([]byte{0, 0, 0, 3}, option(7, maxOption+1)...),
		"oversized unknown":     append([]byte{0, 0, 0, 3}, option(4711, 1<<31)...),
		"too many options":      many,
		"oversized export name": append(append([]byte{0, 0, 0, 3}, option(1, 4097)...), make([]byte, 4097)...),
	}
	for name, send := range tests {
		t.Run(name, func(t *testing.T) {
			nc, err := net.Dial("unix", path)
			if err != nil {
				t.Fatal(err)
			}
			defer nc.Close()
			nc.SetDeadline(time.Now().Add(20 * time.Second))
			nc.Write(send)
			b, err := io.ReadAll(nc)
			if isTimeout(err) {
				t.Fatalf("still open after %d bytes", len(b))
			}
		})
	}
}

// TestSilentClientsAreDropped: a handshake has a time limit, and does not hold up others.
func TestSilentClientsAreDropped(t *testing.T) {
	s, path := startServer(t, Options{HandshakeTimeout: 100 * time.Millisecond, MaxConnections: 3})
	if err := s.AddExport("a", dev.NewMem(1<<20), ExportOptions{}); err != nil {
		t.Fatal(err)
	}
	var silent []*tclient
	for range 2 {
		c, err := dial(path)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		silent = append(silent, c)
	}
	c := connect(t, path, "a", true, false)
	if _, _, err := c.do(0, cmdRead, 0, 4096, nil); err != nil {
		t.Fatal(err)
	}
	// The limit of connections is reached: the next one is closed at once.
	if extra, err := dial(path); err == nil {
		if _, err := extra.option(3, nil); err == nil {
			t.Error("a connection above the limit was served")
		}
		extra.Close()
	}
	for _, c := range silent {
		wantClosed(t, c)
	}
	// A connection in the transmission phase may be silent for as long as it likes.
	if _, _, err := c.do(0, cmdRead, 4096, 4096, nil); err != nil {
		t.Errorf("read after the handshake's time: %v", err)
	}
	connect(t, path, "a", false, false)
}

// TestStatusNeedsTheRightContext: a context counts only for the export that it was set for.
func TestStatusNeedsTheRightContext(t *testing.T) {
	s, path := startServer(t, Options{})
	for _, n := range []string{"a", "b"} {
		if err := s.AddExport(n, dev.NewMem(1<<20), ExportOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	tests := map[string]struct {
		set  []func(c *tclient) ([]optReply, error)
		want error
	}{
		"for this export":    {[]func(c *tclient) ([]optReply, error){set("a", "base:allocation")}, nil},
		"for another export": {[]func(c *tclient) ([]optReply, error){set("b", "base:allocation")}, EINVAL},
		"replaced by none":   {[]func(c *tclient) ([]optReply, error){set("a", "base:allocation"), set("a")}, EINVAL},
		"replaced by a failure": {[]func(c *tclient) ([]optReply, error){set("a", "base:allocation"),
			func(c *tclient) ([]optReply, error) { return c.option(10, nil) }}, EINVAL},
		"set again": {[]func(c *tclient) ([]optReply, error){set("b", "base:allocation"), set("a", "base:allocation")}, nil},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			c, err := dial(path)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			if _, err := c.option(8, nil); err != nil {
				t.Fatal(err)
			}
			for _, f := range tt.set {
				if _, err := f(c); err != nil {
					t.Fatal(err)
				}
			}
			if err := c.enter("a", false, false); err != nil {
				t.Fatal(err)
			}
			if _, _, err := c.do(0, cmdBlockStatus, 0, 4096, nil); err != tt.want {
				t.Errorf("block status: %v, want %v", err, tt.want)
			}
		})
	}
}

func set(name string, queries ...string) func(c *tclient) ([]optReply, error) {
	return func(c *tclient) ([]optReply, error) { return c.option(10, metaData(name, queries...)) }
}

// isReset: the server closed while bytes of the client were unread.
func isReset(err error) bool {
	return errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)
}

// fakeTCP is a listener that claims to be on the network.
type fakeTCP struct{}

func (fakeTCP) Accept() (net.Conn, error) { return nil, net.ErrClosed }
func (fakeTCP) Close() error              { return nil }
func (fakeTCP) Addr() net.Addr            { return &net.TCPAddr{} }
