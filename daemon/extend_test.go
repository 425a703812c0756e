package daemon

import (
	"context"
	"io"
	"log/slog"
	"testing"

	"mica/daemon/api"
	"mica/daemon/config"
	"mica/engine"
	"mica/lvm"
)

// TestExtenderNext: how far the data file grows.
func TestExtenderNext(t *testing.T) {
	const G, block = int64(1) << 30, int64(65536)
	tests := []struct {
		name        string
		now, used   int64
		max         int64
		total, free int64
		file        bool
		want        int64
	}{
		{"by the step", 10 * G, 8 * G, 0, 1000 * G, 900 * G, true, 12 * G},
		{"to the largest size", 10 * G, 8 * G, 11 * G, 1000 * G, 900 * G, true, 11 * G},
		{"not beyond the largest size", 10 * G, 8 * G, 10 * G, 1000 * G, 900 * G, true, 10 * G},
		{"as far as the host has room, what is promised already counted", 10 * G, 8 * G, 0, 100 * G, 8 * G, true, 11 * G}, // 8 - 5 kept - 2 promised
		{"not at all without room", 10 * G, 8 * G, 0, 100 * G, 6 * G, true, 10 * G},
		{"not on a block device", 10 * G, 8 * G, 0, 0, 0, false, 10 * G},
		{"at least a block", 2 * block, 2 * block, 0, 1000 * G, 900 * G, true, 3 * block},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			x := &extender{c: config.AutoExtend{Enabled: true, Threshold: 80, Step: 20, Max: config.Size(tt.max), HostFree: 5},
				host: func() (int64, int64, bool) { return tt.total, tt.free, tt.file }}
			got, why := x.next(engine.Status{BlockSize: block, DataBlocks: uint64(tt.now / block), DataUsed: uint64(tt.used / block)})
			if got != tt.want {
				t.Errorf("%d bytes (%s), want %d", got, why, tt.want)
			}
		})
	}
}

// TestExtenderStep: growth begins at the threshold and is told; a host that gets full is told once.
func TestExtenderStep(t *testing.T) {
	p := newFakePool()
	p.blocks = 1000
	free := int64(1) << 40
	var told []string
	x := &extender{pool: p, c: config.AutoExtend{Enabled: true, Threshold: 11, Step: 50, HostFree: 10}, log: slog.New(slog.NewTextHandler(io.Discard, nil)),
		host: func() (int64, int64, bool) { return 1 << 40, free, true },
		tell: func(kind, object, detail string) { told = append(told, kind) }}
	step := func() uint64 {
		t.Helper()
		if err := x.step(context.Background()); err != nil {
			t.Fatal(err)
		}
		return p.blocks
	}
	if n := step(); n != 1000 {
		t.Errorf("10 %% used: %d blocks", n)
	}
	x.c.Threshold = 10
	if n := step(); n != 1500 {
		t.Errorf("at the threshold: %d blocks, want 1500", n)
	}
	free = 1 << 30
	step()
	step()
	free = 1 << 40
	step()
	free = 1 << 30
	step()
	want := []string{api.EventGrow, api.EventHostSpace, api.EventHostSpace}
	if len(told) != 3 || told[0] != want[0] || told[1] != want[1] || told[2] != want[2] {
		t.Errorf("told %v, want %v", told, want)
	}
}

// TestExtendVolume: LVM is asked only past the threshold of data or metadata, each growth is told,
// and a volume group without room is told once until there is room again.
func TestExtendVolume(t *testing.T) {
	var told []string
	asked, grew, full := 0, true, false
	x := &extender{log: slog.New(slog.NewTextHandler(io.Discard, nil)),
		volume: &volumeExtender{80, func(context.Context) (bool, error) {
			asked++
			if full {
				return false, lvm.ErrNoRoom
			}
			return grew, nil
		}},
		tell: func(kind, object, detail string) { told = append(told, kind) }}
	steps := []struct {
		used, meta  uint64 // of 100
		grew, full  bool
		asked, told int // so far
	}{
		{79, 79, true, false, 0, 0},
		{80, 10, true, false, 1, 1},
		{10, 80, false, false, 2, 1}, // somebody else was faster
		{90, 10, false, true, 3, 2},
		{90, 10, false, true, 4, 2},
		{90, 10, true, false, 5, 3},
		{90, 10, false, true, 6, 4},
	}
	for i, s := range steps {
		grew, full = s.grew, s.full
		st := engine.Status{DataBlocks: 100, DataUsed: s.used, MetaBlocks: 100, MetaUsed: s.meta}
		if err := x.extendVolume(context.Background(), st); err != nil {
			t.Fatal(err)
		}
		if asked != s.asked || len(told) != s.told {
			t.Errorf("step %d: asked %d times, told %v, want %d and %d", i, asked, told, s.asked, s.told)
		}
	}
}
