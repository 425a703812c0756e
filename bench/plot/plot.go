// Package plot draws the two kinds of pictures that the report needs, as SVG: groups of bars, and
// curves on logarithmic axes. The same input gives the same bytes.
package plot

import (
	"bytes"
	"fmt"
	"math"
	"strings"
)

// colours of series, in order; those of Own series come from own.
var (
	others = []string{"#9aa3ad", "#c9a15a", "#7d9b76", "#b07aa1", "#8c6d5a", "#5f6b7a"}
	own    = []string{"#1f6feb", "#79b1ff", "#0b3d91"}
)

// A Series is a name with its colour's kind.
type Series struct {
	Name string
	Own  bool      // drawn in the colours of the project
	X    []float64 // of curves
	Y    []float64 // NaN: no value
}

func colours(list []Series) []string {
	var out []string
	o, n := 0, 0
	for _, s := range list {
		if s.Own {
			out = append(out, own[o%len(own)])
			o++
		} else {
			out = append(out, others[n%len(others)])
			n++
		}
	}
	return out
}

type canvas struct{ bytes.Buffer }

func (c *canvas) begin(w, h int) {
	fmt.Fprintf(c, "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %d %d\" width=\"%d\" height=\"%d\" "+
		"font-family=\"system-ui, sans-serif\" font-size=\"12\">\n<rect width=\"%d\" height=\"%d\" fill=\"#ffffff\"/>\n", w, h, w, h, w, h)
}

func (c *canvas) end() []byte {
	c.WriteString("</svg>\n")
	return c.Bytes()
}

var escaper = strings.NewReplacer("&", "&amp;", "<", "&lt;", ">", "&gt;", `"`, "&quot;")

// text puts a string at x, y; anchor is "start", "middle" or "end".
func (c *canvas) text(x, y float64, anchor, fill, extra, s string) {
	fmt.Fprintf(c, "<text x=\"%.1f\" y=\"%.1f\" text-anchor=\"%s\" fill=\"%s\"%s>%s</text>\n", x, y, anchor, fill, extra, escaper.Replace(s))
}

const (
	ink   = "#1c2128"
	faint = "#6b7480"
	bold  = ` font-weight="600"`
)

// legend draws the names of series in rows and returns the height that they took.
func (c *canvas) legend(x, y, width float64, list []Series) float64 {
	col := colours(list)
	at, top := x, y
	for i, s := range list {
		w := 24 + 6.6*float64(len(s.Name))
		if at > x && at+w > x+width {
			at, y = x, y+18
		}
		fmt.Fprintf(c, "<rect x=\"%.1f\" y=\"%.1f\" width=\"11\" height=\"11\" rx=\"2\" fill=\"%s\"/>\n", at, y, col[i])
		c.text(at+16, y+10, "start", ink, "", s.Name)
		at += w
	}
	return y + 18 - top
}

// A Group is one row of bars: one value for each series.
type Group struct {
	Name   string
	Unit   string
	Values []float64 // NaN: none
	Labels []string  // what is written beside a bar
}

// Bars draws groups of horizontal bars. Groups have units of their own: the longest bar of each
// group has the full length.
func Bars(title string, series []Series, groups []Group) []byte {
	const width, left, barH, gap, barMax = 860, 20, 15, 30, 640
	col := colours(series)
	var c canvas
	h := 64.0
	for _, g := range groups {
		h += gap
		for _, v := range g.Values {
			if !math.IsNaN(v) {
				h += barH + 2
			}
		}
	}
	h += 18 * float64(len(series)/5)
	c.begin(width, int(h))
	c.text(left, 24, "start", ink, ` font-size="15" font-weight="600"`, title)
	y := 36 + c.legend(left, 36, width-2*left, series) + 4
	for _, g := range groups {
		top := 0.0
		for _, v := range g.Values {
			top = math.Max(top, zeroNaN(v))
		}
		c.text(left, y+14, "start", ink, bold, g.Name)
		c.text(width-left, y+14, "end", faint, "", g.Unit)
		y += 20
		for i, v := range g.Values {
			if math.IsNaN(v) {
				continue
			}
			w := 1.0
			if top > 0 {
				w = math.Max(1, v/top*barMax)
			}
			fmt.Fprintf(&c, "<rect x=\"%d\" y=\"%.1f\" width=\"%.1f\" height=\"%d\" rx=\"2\" fill=\"%s\"/>\n", left, y, w, barH, col[i])
			c.text(left+w+6, y+barH-3, "start", ink, "", g.Labels[i])
			y += barH + 2
		}
		y += gap - 20
	}
	return c.end()
}

func zeroNaN(v float64) float64 {
	if math.IsNaN(v) {
		return 0
	}
	return v
}

// Curves draws series over X, both axes logarithmic. Values that are not above zero are left out.
func Curves(title, xLabel, yLabel string, series []Series, label func(float64) string) []byte {
	const width, height, left, right, bottom = 860, 420, 80, 24, 48
	var c canvas
	c.begin(width, height)
	c.text(20, 24, "start", ink, ` font-size="15" font-weight="600"`, title)
	top := 36 + c.legend(20, 36, width-40, series) + 10
	x0, x1, y0, y1 := bounds(series)
	px := func(v float64) float64 { return left + (math.Log10(v)-x0)/(x1-x0)*(width-left-right) }
	py := func(v float64) float64 { return height - bottom - (math.Log10(v)-y0)/(y1-y0)*(height-bottom-top) }
	for e := math.Ceil(y0); e <= y1; e++ {
		v := math.Pow(10, e)
		fmt.Fprintf(&c, "<line x1=\"%d\" x2=\"%d\" y1=\"%.1f\" y2=\"%.1f\" stroke=\"#e4e7eb\"/>\n", left, width-right, py(v), py(v))
		c.text(left-8, py(v)+4, "end", faint, "", label(v))
	}
	for e := math.Ceil(x0); e <= x1; e++ {
		v := math.Pow(10, e)
		fmt.Fprintf(&c, "<line x1=\"%.1f\" x2=\"%.1f\" y1=\"%.1f\" y2=\"%d\" stroke=\"#e4e7eb\"/>\n", px(v), px(v), top, height-bottom)
		c.text(px(v), height-bottom+18, "middle", faint, "", label(v))
	}
	c.text((left+width-right)/2, height-8, "middle", ink, "", xLabel)
	c.text(16, top+(height-bottom-top)/2, "middle", ink, fmt.Sprintf(" transform=\"rotate(-90 16 %.1f)\"", top+(height-bottom-top)/2), yLabel)
	col := colours(series)
	for i, s := range series {
		var points []string
		for k, v := range s.Y {
			if v > 0 && s.X[k] > 0 {
				points = append(points, fmt.Sprintf("%.1f,%.1f", px(s.X[k]), py(v)))
			}
		}
		fmt.Fprintf(&c, "<polyline points=\"%s\" fill=\"none\" stroke=\"%s\" stroke-width=\"2\"/>\n", strings.Join(points, " "), col[i])
		for _, p := range points {
			x, y, _ := strings.Cut(p, ",")
			fmt.Fprintf(&c, "<circle cx=\"%s\" cy=\"%s\" r=\"3\" fill=\"%s\"/>\n", x, y, col[i])
		}
	}
	return c.end()
}

// bounds are the logarithms of the least and greatest values, with room around them.
func bounds(series []Series) (x0, x1, y0, y1 float64) {
	x0, y0, x1, y1 = math.Inf(1), math.Inf(1), math.Inf(-1), math.Inf(-1)
	for _, s := range series {
		for k, v := range s.Y {
			if v > 0 && s.X[k] > 0 {
				x0, x1 = math.Min(x0, math.Log10(s.X[k])), math.Max(x1, math.Log10(s.X[k]))
				y0, y1 = math.Min(y0, math.Log10(v)), math.Max(y1, math.Log10(v))
			}
		}
	}
	if x0 > x1 {
		x0, x1, y0, y1 = 0, 1, 0, 1
	}
	y0, y1 = math.Floor(y0), math.Max(math.Ceil(y1), math.Floor(y0)+1)
	if x1-x0 < 0.1 {
		x0, x1 = x0-0.5, x1+0.5
	}
	return x0, x1, y0, y1
}
