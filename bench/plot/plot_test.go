package plot

import (
	"bytes"
	"encoding/xml"
	"errors"
	"io"
	"math"
	"strconv"
	"strings"
	"testing"
)

// elements parses an SVG and lists the attributes of its elements by name.
func elements(t *testing.T, svg []byte) map[string][]map[string]string {
	t.Helper()
	out := map[string][]map[string]string{}
	d := xml.NewDecoder(bytes.NewReader(svg))
	for {
		tok, err := d.Token()
		if errors.Is(err, io.EOF) {
			return out
		}
		if err != nil {
			t.Fatalf("not XML: %v\n%s", err, svg)
		}
		if e, ok := tok.(xml.StartElement); ok {
			a := map[string]string{}
			for _, x := range e.Attr {
				a[x.Name.Local] = x.Value
			}
			out[e.Name.Local] = append(out[e.Name.Local], a)
		}
	}
}

func num(t *testing.T, s string) float64 {
	t.Helper()
	v, err := strconv.ParseFloat(s, 64)
	if err != nil || math.IsNaN(v) || math.IsInf(v, 0) {
		t.Fatalf("%q is not a number", s)
	}
	return v
}

func TestBars(t *testing.T) {
	series := []Series{{Name: "peer <1>"}, {Name: "mica", Own: true}}
	svg := Bars("A & B", series, []Group{
		{Name: "read", Unit: "IOPS", Values: []float64{50, 100}, Labels: []string{"50", "100"}},
		{Name: "write", Unit: "IOPS", Values: []float64{math.NaN(), 7}, Labels: []string{"", "7"}},
	})
	var widths []float64
	for _, r := range elements(t, svg)["rect"] {
		if r["height"] == "15" {
			widths = append(widths, num(t, r["width"]))
		}
	}
	if len(widths) != 3 || widths[1] != 2*widths[0] || widths[2] != widths[1] {
		t.Errorf("bars of 50, 100 and 7 of 7 are %v wide, want half, full, full", widths)
	}
	if !strings.Contains(string(svg), "peer &lt;1&gt;") {
		t.Error("names are not escaped")
	}
	if again := Bars("A & B", series, nil); !bytes.Equal(again, Bars("A & B", series, nil)) {
		t.Error("the same input gave different drawings")
	}
}

func TestCurves(t *testing.T) {
	svg := Curves("t", "x", "y", []Series{
		{Name: "flat", Own: true, X: []float64{1, 10, 100}, Y: []float64{5, 5, 5}},
		{Name: "rising", X: []float64{1, 10, 100}, Y: []float64{1, 10, 100}},
		{Name: "gaps", X: []float64{1, 10, 100}, Y: []float64{math.NaN(), 0, 3}},
	}, func(v float64) string { return strconv.FormatFloat(v, 'g', -1, 64) })
	lines := elements(t, svg)["polyline"]
	if len(lines) != 3 {
		t.Fatalf("%d curves, want 3", len(lines))
	}
	points := func(i int) (x, y []float64) {
		for _, p := range strings.Fields(lines[i]["points"]) {
			a, b, _ := strings.Cut(p, ",")
			x, y = append(x, num(t, a)), append(y, num(t, b))
		}
		return x, y
	}
	if _, y := points(0); y[0] != y[1] || y[1] != y[2] {
		t.Errorf("a flat curve is at %v", y)
	}
	x, y := points(1)
	if math.Abs((x[1]-x[0])-(x[2]-x[1])) > 0.11 || math.Abs((y[0]-y[1])-(y[1]-y[2])) > 0.11 {
		t.Errorf("decades are not equally far apart: x %v, y %v", x, y)
	}
	if x, _ := points(2); len(x) != 1 {
		t.Errorf("values that are not above zero are drawn: %v", x)
	}
	elements(t, Curves("nothing", "x", "y", nil, func(float64) string { return "" }))
}
