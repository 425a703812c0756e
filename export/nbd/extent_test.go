package nbd

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"slices"
	"testing"

	"mica/dev"
)

// listed answers Extents from a list of {length, flags}, at most max at a time.
type listed struct {
	dev.Device
	list  []run
	max   int
	calls int
}

func (l *listed) Extents(off, n int64) ([]dev.Extent, error) {
	l.calls++
	var out []dev.Extent
	pos := int64(0)
	for _, r := range l.list {
		a, z := max(pos, off), min(pos+r.n, off+n)
		if a < z && len(out) < l.max {
			out = append(out, dev.Extent{Off: a, Len: z - a, Hole: r.flags&stateHole != 0, Zero: r.flags&stateZero != 0})
		}
		pos += r.n
	}
	return out, nil
}

func TestRuns(t *testing.T) {
	const d, h, z, hz = 0, stateHole, stateZero, stateHole | stateZero
	tests := map[string]struct {
		list   []run
		max    int
		off, n int64
		limit  int
		want   []run
	}{
		"one":                        {[]run{{4096, d}}, 9, 0, 4096, 9, []run{{4096, d}}},
		"two":                        {[]run{{4096, hz}, {4096, d}}, 9, 0, 8192, 9, []run{{4096, hz}, {4096, d}}},
		"cut to the request":         {[]run{{4096, hz}, {4096, d}}, 9, 1024, 4096, 9, []run{{3072, hz}, {1024, d}}},
		"one at a time":              {[]run{{4096, hz}, {4096, d}, {512, z}}, 1, 0, 8704, 9, []run{{4096, hz}, {4096, d}, {512, z}}},
		"equal neighbours merge":     {[]run{{4096, d}, {4096, d}, {512, h}}, 1, 0, 8704, 9, []run{{8192, d}, {512, h}}},
		"limit":                      {[]run{{512, d}, {512, h}, {512, z}, {512, hz}}, 9, 0, 2048, 2, []run{{512, d}, {512, h}}},
		"limit of one is whole":      {[]run{{512, d}, {512, d}, {512, d}, {512, h}}, 1, 0, 2048, 1, []run{{1536, d}}},
		"boundary inside a sector":   {[]run{{700, hz}, {1348, d}}, 9, 0, 2048, 9, []run{{512, hz}, {1536, d}}},
		"hole inside a sector":       {[]run{{600, d}, {100, hz}, {1348, d}}, 9, 0, 2048, 9, []run{{2048, d}}},
		"data inside a sector":       {[]run{{600, hz}, {10, d}, {1438, hz}}, 9, 0, 2048, 9, []run{{512, hz}, {512, d}, {1024, hz}}},
		"shared flags of a sector":   {[]run{{100, hz}, {412, z}, {512, z}}, 9, 0, 1024, 9, []run{{1024, z}}},
		"many in a sector, stepwise": {[]run{{1, hz}, {1, hz}, {1, z}, {509, hz}}, 1, 0, 512, 9, []run{{512, z}}},
		"odd boundary at the end":    {[]run{{1000, d}, {24, hz}}, 9, 0, 1024, 9, []run{{1024, d}}},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			l := &listed{list: tt.list, max: tt.max}
			e := &export{extenter: l}
			got, err := e.runs(tt.off, tt.n, tt.limit)
			if err != nil || !slices.Equal(got, tt.want) {
				t.Errorf("got %v, %v, want %v", got, err, tt.want)
			}
		})
	}
}

// broken answers Extents with nonsense.
type broken struct{ xs []dev.Extent }

func (b broken) Extents(off, n int64) ([]dev.Extent, error) { return b.xs, nil }

func TestRunsOfABrokenDevice(t *testing.T) {
	for name, xs := range map[string][]dev.Extent{
		"none":       nil,
		"empty":      {{Off: 0, Len: 0}},
		"negative":   {{Off: 0, Len: -5}},
		"elsewhere":  {{Off: 512, Len: 512}},
		"gap":        {{Off: 0, Len: 512}, {Off: 1024, Len: 512}},
		"overlap":    {{Off: 0, Len: 1024}, {Off: 512, Len: 512}},
		"never done": {{Off: 0, Len: 100}},
	} {
		if got, err := (&export{extenter: broken{xs}}).runs(0, 4096, 9); err == nil {
			t.Errorf("%s: got %v, want an error", name, got)
		}
	}
}

func TestBlockStatus(t *testing.T) {
	m := dev.NewMem(8 << 30)
	for _, off := range []int64{0, 64 << 10, 5 << 30} {
		if _, err := m.WriteAt(make([]byte, 64<<10), off); err != nil {
			t.Fatal(err)
		}
	}
	l := &listed{Device: m, max: 1 << 20, list: []run{{128 << 10, 0}, {5<<30 - 128<<10, 3}, {64 << 10, 0}, {3<<30 - 64<<10, 3}}}
	_, c := serveDevice(t, l, ExportOptions{}, true, true)
	tests := []struct {
		flags uint16
		off   uint64
		n     uint32
		want  []status
	}{
		{0, 0, 1 << 20, []status{{128 << 10, 0}, {896 << 10, 3}}},
		{cmdFlagReqOne, 0, 1 << 20, []status{{128 << 10, 0}}},
		{cmdFlagReqOne, 512, 512, []status{{512, 0}}},
		{0, 127 << 10, 1<<32 - 512, []status{{1 << 10, 0}, {1<<32 - 512 - 1<<10, 3}}},
		{0, 5<<30 - 512, 66 << 10, []status{{512, 3}, {64 << 10, 0}, {1536, 3}}},
		{cmdFlagFUA, 8<<30 - 512, 512, []status{{512, 3}}},
	}
	for _, tt := range tests {
		_, chunks, err := c.do(tt.flags, cmdBlockStatus, tt.off, tt.n, nil)
		if err != nil {
			t.Fatal(err)
		}
		if got := statuses(t, chunks); !slices.Equal(got, tt.want) {
			t.Errorf("status of [%d, +%d), flags %d: got %v, want %v", tt.off, tt.n, tt.flags, got, tt.want)
		}
	}
	for _, bad := range []struct {
		off uint64
		n   uint32
	}{{8 << 30, 512}, {0, 0}, {0, 100}, {1 << 63, 512}} {
		if _, _, err := c.do(0, cmdBlockStatus, bad.off, bad.n, nil); err != EINVAL {
			t.Errorf("status of [%d, +%d): %v, want EINVAL", bad.off, bad.n, err)
		}
	}
}

// TestStatusIsBounded: a device in a thousand pieces is described in part.
func TestStatusIsBounded(t *testing.T) {
	l := &listed{Device: dev.NewMem(64 << 20), max: 1 << 20}
	for i := range 2 * maxStatusRuns {
		l.list = append(l.list, run{4096, uint32(i & 1)})
	}
	_, c := serveDevice(t, l, ExportOptions{}, true, true)
	_, chunks, err := c.do(0, cmdBlockStatus, 0, 32<<20, nil)
	if err != nil {
		t.Fatal(err)
	}
	if got := statuses(t, chunks); len(got) != maxStatusRuns {
		t.Errorf("%d descriptors, want %d", len(got), maxStatusRuns)
	}
}

// TestStatusWithoutSupport: a decorator offers Extents and then cannot.
func TestStatusWithoutSupport(t *testing.T) {
	f := dev.NewFault(bare{dev.NewMem(1 << 20)})
	_, c := serveDevice(t, f, ExportOptions{}, true, true)
	_, chunks, err := c.do(0, cmdBlockStatus, 0, 1<<20, nil)
	if err != nil {
		t.Fatal(err)
	}
	if got := statuses(t, chunks); !slices.Equal(got, []status{{1 << 20, 0}}) {
		t.Errorf("got %v", got)
	}
	if _, _, err := c.do(0, cmdTrim, 0, 4096, nil); err != nil {
		t.Errorf("trim, which is a hint: %v", err)
	}
	if _, _, err := c.do(cmdFlagFastZero, cmdWriteZeroes, 0, 4096, nil); err != ENOTSUP {
		t.Errorf("fast zero: %v, want ENOTSUP", err)
	}
	before := f.Counts()
	if _, _, err := c.do(0, cmdWriteZeroes, 0, 1<<20, nil); err != nil {
		t.Errorf("zeroes: %v", err)
	}
	if got := f.Counts().Sub(before).Writes; got != 4 {
		t.Errorf("zeroes of 1 MiB were written by %d writes, want 4", got)
	}
}

// TestReadHoles looks at the chunks that reads of a sparse device are answered with.
func TestReadHoles(t *testing.T) {
	m := newTryMem(16 << 20)
	data := pattern(1, 64<<10)
	for _, off := range []int64{64 << 10, 512 << 10} {
		if _, err := m.WriteAt(data, off); err != nil {
			t.Fatal(err)
		}
	}
	s, c := serveDevice(t, m, ExportOptions{}, true, false)
	tests := []struct {
		name   string
		flags  uint16
		off, n int
		want   string // D = data chunk, H = hole chunk, with KiB
	}{
		{"mapped", 0, 64 << 10, 4096, "D4"},
		{"hole", 0, 0, 4096, "H4"},
		{"short hole", 0, 0, 512, "D0"},
		{"both", 0, 60 << 10, 8192, "H4 D4"},
		{"both, short hole", 0, 62 << 10, 4096, "D4"},
		{"both, unfragmented", cmdFlagDF, 60 << 10, 8192, "D8"},
		{"hole, unfragmented", cmdFlagDF, 0, 64 << 10, "H64"},
		{"big, unfragmented", cmdFlagDF, 0, 1 << 20, "D1024"},
		{"big hole, unfragmented", cmdFlagDF, 1 << 20, 1 << 20, "H1024"},
		{"around data", 0, 0, 192 << 10, "H64 D64 H64"},
		{"pieces of hole", 0, 1 << 20, 2 << 20, "H1024 H1024"},
	}
	for _, tt := range tests {
		got, chunks, err := c.do(tt.flags, cmdRead, uint64(tt.off), uint32(tt.n), nil)
		if err != nil {
			t.Fatalf("%s: %v", tt.name, err)
		}
		want := make([]byte, tt.n)
		m.Mem.ReadAt(want, int64(tt.off))
		if !bytes.Equal(got, want) {
			t.Errorf("%s: wrong data", tt.name)
		}
		var kinds []byte
		for _, k := range chunks {
			switch k.typ {
			case 1:
				kinds = fmt.Appendf(kinds, "D%d ", (len(k.data)-8)>>10)
			case 2:
				kinds = fmt.Appendf(kinds, "H%d ", binary.BigEndian.Uint32(k.data[8:])>>10)
			}
		}
		if got := string(bytes.TrimSpace(kinds)); got != tt.want {
			t.Errorf("%s: chunks %q, want %q", tt.name, got, tt.want)
		}
	}
	// The same without structured replies: plain zeros.
	p := connect(t, s.path, "disk", false, false)
	if got, _, err := p.do(0, cmdRead, 0, 192<<10, nil); err != nil || !bytes.Equal(got[64<<10:128<<10], data) || !bytes.Equal(got[:64<<10], make([]byte, 64<<10)) {
		t.Errorf("simple reply of a sparse range is wrong: %v", err)
	}
}

// TestReadOfManyRuns: more runs than are worth chunks are answered with one chunk of data.
func TestReadOfManyRuns(t *testing.T) {
	m := newTryMem(1 << 20)
	for i := range int64(32) {
		if _, err := m.WriteAt(bytes.Repeat([]byte{byte(i + 1)}, 4096), 2*i*4096); err != nil {
			t.Fatal(err)
		}
	}
	_, c := serveDevice(t, m, ExportOptions{}, true, false)
	got, chunks, err := c.do(0, cmdRead, 0, 256<<10, nil)
	if err != nil {
		t.Fatal(err)
	}
	want := make([]byte, 256<<10)
	m.Mem.ReadAt(want, 0)
	if !bytes.Equal(got, want) {
		t.Error("wrong data")
	}
	if len(chunks) > maxReadRuns+1 {
		t.Errorf("%d chunks", len(chunks))
	}
}
