package bench

import (
	"math"
	"slices"
	"time"
)

// A Result is one run, as it is kept in a file.
type Result struct {
	Version int       `json:"version"` // of this form: 1
	When    time.Time `json:"when"`
	Command string    `json:"command"` // that repeats the run
	Machine Machine   `json:"machine"`
	Rounds  int       `json:"rounds"`
	Quick   bool      `json:"quick"` // a smoke run: the figures mean nothing
	Seconds float64   `json:"seconds"`
	Parts   []Part    `json:"parts"`
}

// A Part is what belongs to one question.
type Part struct {
	ID      string  `json:"id"`
	Title   string  `json:"title"`
	About   string  `json:"about"`  // what is compared, and how
	Medium  string  `json:"medium"` // what the data lay on
	Seconds float64 `json:"seconds"`
	Tables  []Table `json:"tables"`
	// Notes are what a reader must know beside the figures: what was left out and why.
	Notes []string `json:"notes,omitempty"`
}

// A Table compares columns (who) in rows (which job, or which size).
type Table struct {
	ID      string   `json:"id"`
	Title   string   `json:"title"`
	Columns []string `json:"columns"`
	Rows    []Row    `json:"rows"`
	Targets []Target `json:"targets,omitempty"`
	// XLabel makes the plot a curve over Row.X, on logarithmic axes; else it is bars.
	XLabel string `json:"x_label,omitempty"`
}

// A Row is one job done by several.
type Row struct {
	Name   string `json:"name"`
	Unit   string `json:"unit"`
	Better string `json:"better"` // "higher", "lower" or "" where neither is
	// X is the place of the row on the axis of a curve.
	X     float64 `json:"x,omitempty"`
	Cells []Cell  `json:"cells"` // one for each column
}

// A Cell is what one of them did in one job.
type Cell struct {
	// Samples are in the row's unit, one a round, in the order of the rounds. None: not measured.
	Samples []float64 `json:"samples,omitempty"`
	// Why says why there are no samples; "" where the job means nothing for the column.
	Why string `json:"why,omitempty"`
	// More are medians of other figures of the same runs, by name with unit ("p99 us").
	More map[string]float64 `json:"more,omitempty"`
}

// A Target is a bound on the ratio of two columns in one row.
type Target struct {
	Row  string  `json:"row"`
	Own  string  `json:"own"`
	Peer string  `json:"peer"` // a column, "best" for the best of all that are not mica, or "" for the value itself
	Want float64 `json:"want"`
	// AtMost: the ratio must not be above Want; else not below.
	AtMost bool `json:"at_most,omitempty"`
	// Gain: what counts is how many times better Own is, whichever way the row counts.
	Gain bool `json:"gain,omitempty"`
}

// Add adds a part that was measured elsewhere: after the parts that it belongs to, or at the end. A part
// with the same name is replaced.
func (r *Result) Add(p Part) {
	for i := range r.Parts {
		if r.Parts[i].ID == p.ID {
			r.Parts[i] = p
			return
		}
	}
	after := slices.IndexFunc(r.Parts, func(q Part) bool { return q.ID == blockPart.id })
	if after < 0 {
		r.Parts = append(r.Parts, p)
		return
	}
	r.Parts = slices.Insert(r.Parts, after+1, p)
}

// Median of the samples; NaN if there are none.
func (c Cell) Median() float64 { return median(c.Samples) }

// Spread are the least and the greatest sample.
func (c Cell) Spread() (lo, hi float64) {
	if len(c.Samples) == 0 {
		return math.NaN(), math.NaN()
	}
	return slices.Min(c.Samples), slices.Max(c.Samples)
}

func median(v []float64) float64 {
	if len(v) == 0 {
		return math.NaN()
	}
	s := slices.Sorted(slices.Values(v))
	if n := len(s); n%2 == 0 {
		return (s[n/2-1] + s[n/2]) / 2
	}
	return s[len(s)/2]
}

// Ratio is the median of the ratios a/b of the samples of the same round; NaN if there are none.
func Ratio(a, b Cell) float64 {
	var r []float64
	for i := range min(len(a.Samples), len(b.Samples)) {
		if b.Samples[i] != 0 {
			r = append(r, a.Samples[i]/b.Samples[i])
		}
	}
	return median(r)
}

// row finds a row by name.
func (t *Table) row(name string) *Row {
	for i := range t.Rows {
		if t.Rows[i].Name == name {
			return &t.Rows[i]
		}
	}
	return nil
}

// cell is the cell of a column in a row; empty if there is none.
func (t *Table) cell(r *Row, column string) Cell {
	if i := slices.Index(t.Columns, column); i >= 0 && i < len(r.Cells) {
		return r.Cells[i]
	}
	return Cell{}
}

// Got is what a target's ratio came to, and the column that Peer stood for. NaN: not measured.
func (t *Table) Got(g Target) (ratio float64, peer string) {
	r := t.row(g.Row)
	if r == nil {
		return math.NaN(), g.Peer
	}
	own := t.cell(r, g.Own)
	switch g.Peer {
	case "":
		return own.Median(), ""
	case "best":
		return t.best(r, own)
	}
	if g.Gain && r.Better == "lower" {
		return Ratio(t.cell(r, g.Peer), own), g.Peer
	}
	return Ratio(own, t.cell(r, g.Peer)), g.Peer
}

// best is the ratio of own to the best column that is not mica's.
func (t *Table) best(r *Row, own Cell) (float64, string) {
	name, value := "", math.NaN()
	for i, c := range t.Columns {
		if isOwn(c) || i >= len(r.Cells) || len(r.Cells[i].Samples) == 0 {
			continue
		}
		m := r.Cells[i].Median()
		if name == "" || r.Better == "lower" && m < value || r.Better != "lower" && m > value {
			name, value = c, m
		}
	}
	return Ratio(own, t.cell(r, name)), name
}

// isOwn tells columns of mica from those of peers.
func isOwn(column string) bool { return len(column) >= 4 && column[:4] == "mica" }

// Met reports whether a ratio keeps a target.
func (g Target) Met(ratio float64) bool {
	if g.AtMost {
		return ratio <= g.Want
	}
	return ratio >= g.Want
}
