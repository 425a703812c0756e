package dmioctl

import (
	"encoding/binary"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// answer turns an encoded table into what the kernel answers: next counts from the beginning.
func answer(table []byte) []byte {
	out := append([]byte{}, table...)
	for at := 0; at < len(out); {
		next := int(binary.LittleEndian.Uint32(out[at+20:]))
		binary.LittleEndian.PutUint32(out[at+20:], uint32(at+next))
		at += next
	}
	return out
}

func TestTableRoundTrip(t *testing.T) {
	want := []Target{
		LinearTarget("/dev/vda", 8, 128),
		{Start: 128, Length: 1 << 40, Type: "thin", Params: "254:1 16777215"},
		{Start: 1<<40 + 128, Length: 1, Type: "zero"},
	}
	wire := encodeTable(want)
	if len(wire)%8 != 0 {
		t.Errorf("a table of %d bytes: targets are aligned to 8", len(wire))
	}
	got, err := decodeTable(answer(wire), len(want))
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("(-want +got)\n%s", d)
	}
}

func TestDecodeTableDistrustsTheAnswer(t *testing.T) {
	good := answer(encodeTable([]Target{LinearTarget("a", 0, 1), LinearTarget("b", 0, 1)}))
	back := append([]byte{}, good...)
	binary.LittleEndian.PutUint32(back[20:], 0)
	far := append([]byte{}, good...)
	binary.LittleEndian.PutUint32(far[20:], 1<<31)
	for _, c := range []struct {
		name  string
		data  []byte
		count int
	}{
		{"empty", nil, 1},
		{"cut short", good[:30], 1},
		{"more targets than data", good, 3},
		{"next goes nowhere", back, 2},
		{"next beyond the end", far, 2},
	} {
		if got, err := decodeTable(c.data, c.count); err == nil {
			t.Errorf("%s: got %v, want an error", c.name, got)
		}
	}
}

func TestParsePoolStatus(t *testing.T) {
	for _, c := range []struct {
		text string
		want PoolStatus
		bad  bool
	}{
		{text: "0 829/8192 0/16384 - rw discard_passdown queue_if_no_space - 1024 ",
			want: PoolStatus{MetaUsed: 829, MetaSize: 8192, DataSize: 16384, Mode: "rw", Discard: "discard_passdown", NoSpace: "queue_if_no_space"}},
		{text: "5 112/1024 20/20 77 out_of_data_space no_discard_passdown error_if_no_space - 256 ",
			want: PoolStatus{TransactionID: 5, MetaUsed: 112, MetaSize: 1024, DataUsed: 20, DataSize: 20, HeldRoot: 77,
				Mode: "out_of_data_space", Discard: "no_discard_passdown", NoSpace: "error_if_no_space"}},
		{text: "0 120/1024 100/131072 - ro ignore_discard queue_if_no_space needs_check 256 ",
			want: PoolStatus{MetaUsed: 120, MetaSize: 1024, DataUsed: 100, DataSize: 131072, Mode: "ro",
				Discard: "ignore_discard", NoSpace: "queue_if_no_space", NeedsCheck: true}},
		{text: "1 2/3 4/5 - rw", want: PoolStatus{TransactionID: 1, MetaUsed: 2, MetaSize: 3, DataUsed: 4, DataSize: 5, Mode: "rw"}},
		{text: "Fail", want: PoolStatus{Failed: true}},
		{text: "Error", want: PoolStatus{Failed: true}},
		{text: "", bad: true},
		{text: "1 2 3 4 5", bad: true},
		{text: "1 2/x 3/4 - rw", bad: true},
		{text: "1 2/3 3/4 q rw", bad: true},
	} {
		got, err := ParsePoolStatus(c.text)
		if (err != nil) != c.bad {
			t.Errorf("%q: error %v, want one: %v", c.text, err, c.bad)
		}
		if d := cmp.Diff(c.want, got); !c.bad && d != "" {
			t.Errorf("%q (-want +got)\n%s", c.text, d)
		}
	}
}

func TestPoolTable(t *testing.T) {
	got := ThinPool{Metadata: "/dev/dm-0", Data: "/dev/vda", LengthSectors: 2048, BlockSectors: 128, LowWaterMark: 7,
		Features: []string{"skip_block_zeroing", "error_if_no_space"}}.Target()
	want := Target{Length: 2048, Type: "thin-pool", Params: "/dev/dm-0 /dev/vda 128 7 2 skip_block_zeroing error_if_no_space"}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("(-want +got)\n%s", d)
	}
	if got := ThinTarget("254:1", 3, 8, "/dev/vdb").Params; got != "254:1 3 /dev/vdb" {
		t.Errorf("got %q", got)
	}
}

func TestImpossibleNames(t *testing.T) {
	c := &Control{} // not reached
	for _, name := range []string{"a/b", "a\x00b", string(make([]byte, 200))} {
		if _, err := c.Info(name); err == nil {
			t.Errorf("name %q was accepted", name)
		}
	}
}

func TestParsePoolTable(t *testing.T) {
	in := ThinPool{Metadata: "7:0", Data: "7:1", LengthSectors: 1 << 20, BlockSectors: 384, LowWaterMark: 32,
		Features: []string{"skip_block_zeroing", "error_if_no_space"}}
	got, err := ParsePoolTable(in.Target())
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(in, got); d != "" {
		t.Errorf("(-want +got)\n%s", d)
	}
	if !got.Has("error_if_no_space") || got.Has("read_only") {
		t.Errorf("features %v", got.Features)
	}
	// As the kernel prints it: without features there is a 0.
	if got, err = ParsePoolTable(Target{Type: "thin-pool", Length: 8, Params: "7:0 7:1 128 320 0 "}); err != nil || len(got.Features) != 0 {
		t.Errorf("%+v, %v", got, err)
	}
	for _, bad := range []Target{{Type: "linear", Params: "7:0 0"}, {Type: "thin-pool", Params: "7:0 7:1 128"},
		{Type: "thin-pool", Params: "7:0 7:1 x 0 0"}, {Type: "thin-pool", Params: "7:0 7:1 128 -1 0"}, {Type: "thin-pool"}} {
		if got, err := ParsePoolTable(bad); err == nil {
			t.Errorf("%+v was read as %+v", bad, got)
		}
	}
}
