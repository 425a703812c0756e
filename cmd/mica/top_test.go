package main

import (
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"mica/daemon/api"
	"mica/layer"
)

func TestParseBlockStat(t *testing.T) {
	tests := []struct {
		name, line string
		want       blockStat
		err        string
	}{
		{"now", "  10 1 80 5 20 2 400 7 3 900 12 4 0 2048 1 6 2\n",
			blockStat{Reads: 10, ReadBytes: 40960, Writes: 20, WriteBytes: 204800, InFlight: 3, BusyMS: 900, Discards: 4, DiscardBytes: 1 << 20, Flushes: 6}, ""},
		{"before 4.18", "1 0 8 0 1 0 8 0 0 1 0", blockStat{Reads: 1, ReadBytes: 4096, Writes: 1, WriteBytes: 4096, BusyMS: 1}, ""},
		{"a later kernel", "1 0 8 0 1 0 8 0 0 1 0 0 0 0 0 2 0 99 98", blockStat{Reads: 1, ReadBytes: 4096, Writes: 1, WriteBytes: 4096, BusyMS: 1, Flushes: 2}, ""},
		{"too short", "1 2 3", blockStat{}, "3 fields"},
		{"no number", "1 0 8 0 x 0 8 0 0 1 0", blockStat{}, "field 5"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := parseBlockStat(tt.line)
			if (err == nil) != (tt.err == "") || err != nil && !strings.Contains(err.Error(), tt.err) {
				t.Fatalf("error %v, want %q", err, tt.err)
			}
			if d := cmp.Diff(tt.want, got); err == nil && d != "" {
				t.Error(d)
			}
		})
	}
}

// TestCompareSamples: rates are differences by time; a device made anew counts from zero; the
// busiest comes first.
func TestCompareSamples(t *testing.T) {
	container := func(name, id string) api.Container {
		return api.Container{Container: layer.Container{Name: name, Attachment: &layer.Attachment{ID: id, As: layer.AsBlock}}}
	}
	at := time.Unix(1000, 0)
	a := topSample{at: at, stats: map[string]blockStat{"1": {Reads: 100, ReadBytes: 1000}, "2": {Writes: 500}}}
	b := topSample{
		at:         at.Add(2 * time.Second),
		containers: []api.Container{container("idle", "3"), container("anew", "2"), container("reader", "1"), {Container: layer.Container{Name: "detached"}}},
		stats:      map[string]blockStat{"1": {Reads: 120, ReadBytes: 9000, BusyMS: 1000}, "2": {Writes: 4}, "3": {}},
	}
	a.pool.Commits, b.pool.Commits = 10, 30
	p := compareSamples(a, b)
	if p.Commits != 10 {
		t.Errorf("%v commits a second, want 10", p.Commits)
	}
	want := []topRow{
		{Name: "reader", Counted: true, Reads: 10, ReadBytes: 4000, Busy: 0.5, Attached: "block"},
		{Name: "anew", Counted: true, Writes: 2, Attached: "block"},
		{Name: "detached", Attached: "-"},
		{Name: "idle", Counted: true, Attached: "block"},
	}
	if d := cmp.Diff(want, p.Rows); d != "" {
		t.Error(d)
	}
}

// TestTop: what a container writes is seen.
func TestTop(t *testing.T) {
	b := newBox(t)
	b.start()
	b.mica("image", "import", b.testImage())
	b.mica("create", "test:1", "web")
	b.mica("create", "test:1", "idle")
	dir := b.mica("mount", "web")
	done := make(chan error, 1)
	cmd := b.command("top", "--rounds", "1", "--interval", "1s", "--json")
	var out strings.Builder
	cmd.Stdout = &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { done <- cmd.Wait() }()
	// Write until it has ended, so that some of it lies between its two looks.
	for running := true; running; {
		select {
		case err := <-done:
			if err != nil {
				t.Fatal(err)
			}
			running = false
		default:
			b.write(dir+"/data", strings.Repeat("x", 1<<20))
		}
	}
	var p topPool
	if err := json.Unmarshal([]byte(out.String()), &p); err != nil {
		t.Fatalf("%v: %s", err, out.String())
	}
	if len(p.Rows) != 2 || p.Rows[0].Name != "web" || !p.Rows[0].Counted || p.Rows[0].WriteBytes == 0 || p.Rows[0].Flushes == 0 {
		t.Errorf("rows %+v, want web first, with writes and flushes", p.Rows)
	}
	if idle := p.Rows[1]; idle.Counted || idle.Attached != "-" {
		t.Errorf("the container that is not attached: %+v", idle)
	}
	text := b.mica("top", "--rounds", "2", "--interval", "100ms")
	if n := strings.Count(text, "NAME"); n != 2 || !strings.Contains(text, "web") || !strings.Contains(text, "pool rw") {
		t.Errorf("two rounds printed %d tables:\n%s", n, text)
	}
	b.mica("umount", "web")
}
