package bench

import (
	"context"
	"errors"
	"math"
	"slices"
	"strings"
	"testing"
)

func cell(v ...float64) Cell { return Cell{Samples: v} }

func TestMedianAndRatio(t *testing.T) {
	if m := cell(3, 1, 2).Median(); m != 2 {
		t.Errorf("median of 3, 1, 2 is %v", m)
	}
	if m := cell(4, 1, 2, 3).Median(); m != 2.5 {
		t.Errorf("median of 4, 1, 2, 3 is %v", m)
	}
	if m := cell().Median(); !math.IsNaN(m) {
		t.Errorf("median of nothing is %v", m)
	}
	// The machine became ten times faster in the third round; pair by pair nothing changed.
	if r := Ratio(cell(2, 4, 30), cell(1, 2, 15)); r != 2 {
		t.Errorf("ratio pair by pair is %v, want 2", r)
	}
	if r := Ratio(cell(1), cell(0)); !math.IsNaN(r) {
		t.Errorf("ratio to zero is %v", r)
	}
}

func sample() *Table {
	return &Table{ID: "t", Title: "T", Columns: []string{"kit", "qemu", "mica thin", "mica plain file"},
		Rows: []Row{
			{Name: "read", Unit: "IOPS", Better: "higher", Cells: []Cell{cell(100), cell(50), cell(200), cell(250)}},
			{Name: "latency", Unit: "us", Better: "lower", Cells: []Cell{cell(100), cell(50), cell(200), {Why: "no such thing"}}},
			{Name: "count", Unit: "flushes", Cells: []Cell{{}, {}, cell(2), {}}},
		}}
}

func TestTargets(t *testing.T) {
	tab := sample()
	for _, c := range []struct {
		g    Target
		got  float64
		peer string
		met  bool
	}{
		{Target{Row: "read", Own: "mica thin", Peer: "qemu", Want: 4}, 4, "qemu", true},
		{Target{Row: "read", Own: "mica thin", Peer: "qemu", Want: 4.1}, 4, "qemu", false},
		{Target{Row: "read", Own: "mica thin", Peer: "best", Want: 2}, 2, "kit", true}, // mica itself is no peer
		{Target{Row: "latency", Own: "mica thin", Peer: "best", Want: 3, AtMost: true}, 4, "qemu", false},
		{Target{Row: "count", Own: "mica thin", Want: 2, AtMost: true}, 2, "", true},
	} {
		got, peer := tab.Got(c.g)
		if got != c.got || peer != c.peer || c.g.Met(got) != c.met {
			t.Errorf("%+v: %v of %q, met %v; want %v of %q, %v", c.g, got, peer, c.g.Met(got), c.got, c.peer, c.met)
		}
	}
	if _, _, got, met := tab.verdict(Target{Row: "none", Own: "mica thin", Peer: "kit", Want: 1}); got != "not measured" || !met {
		t.Errorf("a target that was not measured: %q, met %v", got, met)
	}
	if g := tab.gain(&tab.Rows[1], 0); g != 0.5 {
		t.Errorf("twice the latency is a gain of %v, want 0.5", g)
	}
}

// TestMeasureTakesTurns: everybody measures once a round, nobody always first, and who cannot is
// not asked again.
func TestMeasureTakesTurns(t *testing.T) {
	var order []string
	meterOf := func(name string, err error) meter {
		return func(context.Context) (figure, error) {
			order = append(order, name)
			return figure{float64(len(order)), map[string]float64{"n": float64(len(order))}}, err
		}
	}
	r := &runner{Options: Options{Rounds: 3, Log: func(string, ...any) {}}}
	tab := r.table("t", "T", "a", "b", "c", "none")
	err := r.measure(t.Context(), tab, Row{Name: "row"}, meterOf("a", nil), meterOf("b", nil), meterOf("c", unavailable("no c here")), nil)
	if err != nil {
		t.Fatal(err)
	}
	if want := strings.Fields("a b c b a a b"); !slices.Equal(order, want) {
		t.Errorf("order %v, want %v", order, want)
	}
	row := tab.Rows[0]
	if len(row.Cells[0].Samples) != 3 || len(row.Cells[1].Samples) != 3 || row.Cells[2].Why != "no c here" || row.Cells[3].Samples != nil {
		t.Errorf("cells %+v", row.Cells)
	}
	if row.Cells[0].More["n"] != 5 {
		t.Errorf("median of what goes with the samples: %v, want 5", row.Cells[0].More)
	}
	broken := errors.New("broken")
	if err := r.measure(t.Context(), tab, Row{Name: "row"}, meterOf("a", broken)); !errors.Is(err, broken) {
		t.Errorf("a meter that fails: %v", err)
	}
}

func TestReport(t *testing.T) {
	tab := sample()
	tab.Targets = []Target{{Row: "read", Own: "mica thin", Peer: "qemu", Want: 4}, {Row: "read", Own: "mica thin", Peer: "kit", Want: 9}}
	tab.Rows[0].Cells[2].More = map[string]float64{"p99 us": 17}
	curve := Table{ID: "c", Title: "C", XLabel: "size", Columns: []string{"mica"},
		Rows: []Row{{Name: "1", Unit: "ms", X: 1, Cells: []Cell{cell(1)}}, {Name: "10", Unit: "ms", X: 10, Cells: []Cell{cell(1)}}}}
	res := &Result{Version: 1, Rounds: 1, Parts: []Part{{ID: "p", Title: "Part", Tables: []Table{*tab, curve}, Notes: []string{"left out"}}}}
	files := Report(res, "## Findings\n\nOne.\n")
	page := string(files["performance.md"])
	for _, want := range []string{
		"1 of 2 met", "| read, IOPS | 100 (2.00x) | 50 (4.00x) | **200** |", "(no such thing)", "p99 us", "left out", "## Findings",
		"![T](performance/t.svg)", "![C](performance/c.svg)",
	} {
		if !strings.Contains(page, want) {
			t.Errorf("the page has no %q:\n%s", want, page)
		}
	}
	for _, name := range []string{"performance/t.svg", "performance/c.svg"} {
		if len(files[name]) == 0 {
			t.Errorf("no %s", name)
		}
	}
	var b strings.Builder
	if err := WriteText(&b, res); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(b.String(), "MISS  read: mica thin / kit: 2.00x, want >= 9") {
		t.Errorf("text:\n%s", b.String())
	}
}

func TestNumber(t *testing.T) {
	for v, want := range map[float64]string{0: "0", 1234567: "1,234,567", -1234: "-1,234", 999: "999", 45.67: "45.7", 1.234: "1.23", 0.00123: "0.0012", 3: "3"} {
		if got := number(v); got != want {
			t.Errorf("number(%v) = %q, want %q", v, got, want)
		}
	}
	if got := bytesName(64 << 10); got != "64 KiB" {
		t.Errorf("bytesName: %q", got)
	}
}
