package bench

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"text/tabwriter"

	"mica/bench/plot"
)

// firstOwn is the column of mica that others are compared with, -1 if there is none.
func (t *Table) firstOwn() int { return slices.IndexFunc(t.Columns, isOwn) }

// gain is how many times better the first column of mica is than another: above 1 is better,
// whichever way the row counts. NaN where it cannot be said.
func (t *Table) gain(r *Row, column int) float64 {
	own := t.firstOwn()
	if own < 0 || own == column || own >= len(r.Cells) || column >= len(r.Cells) {
		return math.NaN()
	}
	switch r.Better {
	case "higher":
		return Ratio(r.Cells[own], r.Cells[column])
	case "lower":
		return Ratio(r.Cells[column], r.Cells[own])
	}
	return math.NaN()
}

// times formats a ratio.
func times(v float64) string {
	switch {
	case math.IsNaN(v):
		return "-"
	case v >= 100:
		return thousands(int64(math.Round(v))) + "x"
	case v >= 10:
		return fmt.Sprintf("%.1fx", v)
	}
	return fmt.Sprintf("%.2fx", v)
}

// cellText is a cell with how mica compares.
func (t *Table) cellText(r *Row, i int) string {
	if i >= len(r.Cells) {
		return ""
	}
	c := r.Cells[i]
	if len(c.Samples) == 0 {
		if c.Why != "" {
			return "(" + c.Why + ")"
		}
		return ""
	}
	s := c.String()
	if g := t.gain(r, i); !math.IsNaN(g) {
		s += " (" + times(g) + ")"
	}
	return s
}

func (t *Table) heading(r *Row) string {
	if r.Unit == "" {
		return r.Name
	}
	return r.Name + ", " + r.Unit
}

// verdict is a target in words, with what it came to.
func (t *Table) verdict(g Target) (what, want, got string, met bool) {
	v, peer := t.Got(g)
	sign := ">="
	if g.AtMost {
		sign = "<="
	}
	if g.Peer == "" {
		unit := ""
		if r := t.row(g.Row); r != nil {
			unit = " " + r.Unit
		}
		what, want, got = g.Row+": "+g.Own, sign+" "+number(g.Want)+unit, number(v)+unit
	} else {
		if g.Peer == "best" {
			peer = "the best peer (" + peer + ")"
		}
		how := " / "
		if g.Gain {
			how = " better than "
		}
		what, want, got = g.Row+": "+g.Own+how+peer, sign+" "+number(g.Want), times(v)
	}
	if math.IsNaN(v) {
		return what, want, "not measured", true
	}
	return what, want, got, g.Met(v)
}

// WriteText writes a result for a terminal.
func WriteText(w io.Writer, res *Result) error {
	var b bytes.Buffer
	fmt.Fprintf(&b, "%s, %d CPUs, %s, Linux %s, load %.1f to %.1f, %d rounds, %.0f s\n", res.Machine.CPU, res.Machine.CPUs, res.Machine.OS,
		res.Machine.Kernel, res.Machine.Load[0], res.Machine.Load[1], res.Rounds, res.Seconds)
	if res.Quick {
		b.WriteString("A quick run: the figures mean nothing.\n")
	}
	b.WriteString("Medians; in brackets how many times better mica is, the median over the rounds.\n")
	for _, p := range res.Parts {
		fmt.Fprintf(&b, "\n%s (%s)\n", strings.ToUpper(p.Title), p.Medium)
		for i := range p.Tables {
			t := &p.Tables[i]
			fmt.Fprintf(&b, "\n%s\n", t.Title)
			tw := tabwriter.NewWriter(&b, 0, 8, 2, ' ', 0)
			fmt.Fprintf(tw, "\t%s\n", strings.Join(t.Columns, "\t"))
			for k := range t.Rows {
				r := &t.Rows[k]
				line := []string{t.heading(r)}
				for c := range t.Columns {
					line = append(line, t.cellText(r, c))
				}
				fmt.Fprintln(tw, strings.Join(line, "\t"))
			}
			tw.Flush()
			for _, g := range t.Targets {
				what, want, got, met := t.verdict(g)
				fmt.Fprintf(&b, "  %s  %s: %s, want %s\n", map[bool]string{true: "ok  ", false: "MISS"}[met], what, got, want)
			}
		}
		for _, n := range p.Notes {
			fmt.Fprintf(&b, "  note: %s\n", n)
		}
	}
	_, err := w.Write(b.Bytes())
	return err
}

// Files of a report, below its directory.
const (
	pageFile     = "performance.md"
	partsDir     = "performance"
	resultsFile  = "results.json"
	findingsFile = "findings.md"
)

// WriteReport writes DIR/performance.md and, in DIR/performance, the drawings and results.json.
// What is in DIR/performance/findings.md, written by people, is made part of the page.
func WriteReport(res *Result, dir string) error {
	sub := filepath.Join(dir, partsDir)
	if err := os.MkdirAll(sub, 0o755); err != nil {
		return err
	}
	findings, err := os.ReadFile(filepath.Join(sub, findingsFile))
	if err != nil && !os.IsNotExist(err) {
		return err
	}
	old, err := filepath.Glob(filepath.Join(sub, "*.svg"))
	if err != nil {
		return err
	}
	for _, f := range old {
		if err := os.Remove(f); err != nil {
			return err
		}
	}
	files := Report(res, string(findings))
	b, err := json.MarshalIndent(res, "", "  ")
	if err != nil {
		return err
	}
	files[filepath.Join(partsDir, resultsFile)] = append(b, '\n')
	for name, b := range files {
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o644); err != nil {
			return err
		}
	}
	return nil
}

// Report makes the page and the drawings, by path below the report's directory.
func Report(res *Result, findings string) map[string][]byte {
	files := map[string][]byte{}
	var b bytes.Buffer
	b.WriteString("# Performance\n\n" +
		"<!-- Made by `mica bench` from performance/results.json and performance/findings.md. -->\n\n" +
		"mica beside what one would pick instead, measured in one run by `make bench`. Each job is done by everybody in turn, " +
		"in several rounds; a figure is the median of the rounds, and the number in brackets says how many times better mica " +
		"(the first column of its own) is: the median of the ratios within a round, because machines are shared and their speed " +
		"drifts. Ratios count, absolute figures of another day do not compare.\n\n")
	if res.Quick {
		b.WriteString("**This was a quick run, made to show that everything works. Its figures mean nothing.**\n\n")
	}
	machineTable(&b, res)
	summary(&b, res)
	for _, p := range res.Parts {
		fmt.Fprintf(&b, "## %s\n\n%s\n\nMedium: %s. This part took %.0f s.\n", p.Title, p.About, p.Medium, p.Seconds)
		for i := range p.Tables {
			t := &p.Tables[i]
			fmt.Fprintf(&b, "\n### %s\n\n", t.Title)
			markdownTable(&b, t)
			if svg := t.draw(); svg != nil {
				name := filepath.Join(partsDir, t.ID+".svg")
				files[name] = svg
				fmt.Fprintf(&b, "\n![%s](%s)\n", t.Title, name)
			}
			details(&b, t)
		}
		for _, n := range p.Notes {
			fmt.Fprintf(&b, "\n- Note: %s\n", n)
		}
		b.WriteByte('\n')
	}
	b.WriteString(findings)
	files[pageFile] = b.Bytes()
	return files
}

func machineTable(b *bytes.Buffer, res *Result) {
	m := res.Machine
	var tools []string
	for _, n := range slices.Sorted(maps.Keys(m.Tools)) {
		tools = append(tools, n+" "+m.Tools[n])
	}
	b.WriteString("| the run | |\n| --- | --- |\n")
	for _, l := range [][2]string{
		{"when", res.When.Format("2006-01-02 15:04 UTC")},
		{"command", "`" + res.Command + "`"},
		{"processor", fmt.Sprintf("%s, %d CPUs", m.CPU, m.CPUs)},
		{"memory", fmt.Sprintf("%d MiB", m.MemoryMB)},
		{"system", m.OS + ", Linux " + m.Kernel},
		{"built with", m.Go},
		{"others", strings.Join(tools, ", ")},
		{"load of the machine", fmt.Sprintf("%.1f at the beginning, %.1f at the end", m.Load[0], m.Load[1])},
		{"rounds", fmt.Sprintf("%d, %.0f s in all", res.Rounds, res.Seconds)},
	} {
		fmt.Fprintf(b, "| %s | %s |\n", l[0], l[1])
	}
	b.WriteByte('\n')
}

// summary lists the targets.
func summary(b *bytes.Buffer, res *Result) {
	var lines []string
	met, n := 0, 0
	for _, p := range res.Parts {
		for i := range p.Tables {
			t := &p.Tables[i]
			for _, g := range t.Targets {
				what, want, got, ok := t.verdict(g)
				mark := "-"
				if got != "not measured" {
					n++
					mark = "missed"
					if ok {
						met++
						mark = "met"
					}
				}
				lines = append(lines, fmt.Sprintf("| %s | %s | %s | %s | %s |", p.ID, what, want, got, mark))
			}
		}
	}
	if len(lines) == 0 {
		return
	}
	fmt.Fprintf(b, "## Targets\n\n%d of %d met.\n\n| part | what | want | got | |\n| --- | --- | --- | --- | --- |\n%s\n\n", met, n, strings.Join(lines, "\n"))
}

func markdownTable(b *bytes.Buffer, t *Table) {
	fmt.Fprintf(b, "| | %s |\n|%s\n", strings.Join(t.Columns, " | "), strings.Repeat(" --- |", len(t.Columns)+1))
	for k := range t.Rows {
		r := &t.Rows[k]
		fmt.Fprintf(b, "| %s |", t.heading(r))
		for c := range t.Columns {
			s := t.cellText(r, c)
			if isOwn(t.Columns[c]) && s != "" {
				s = "**" + s + "**"
			}
			fmt.Fprintf(b, " %s |", s)
		}
		b.WriteByte('\n')
	}
}

// details are the further figures of a table, folded away.
func details(b *bytes.Buffer, t *Table) {
	names := map[string]bool{}
	for _, r := range t.Rows {
		for _, c := range r.Cells {
			for n := range c.More {
				names[n] = true
			}
		}
	}
	if len(names) == 0 {
		return
	}
	b.WriteString("\n<details><summary>More of the same runs</summary>\n\n")
	fmt.Fprintf(b, "| | | %s |\n|%s\n", strings.Join(t.Columns, " | "), strings.Repeat(" --- |", len(t.Columns)+2))
	for _, r := range t.Rows {
		first := r.Name
		line := func(name string, value func(Cell) string) {
			fmt.Fprintf(b, "| %s | %s |", first, name)
			first = ""
			for _, c := range r.Cells {
				fmt.Fprintf(b, " %s |", value(c))
			}
			b.WriteByte('\n')
		}
		line("least to greatest", func(c Cell) string {
			if len(c.Samples) == 0 {
				return ""
			}
			lo, hi := c.Spread()
			return number(lo) + " to " + number(hi)
		})
		for _, n := range slices.Sorted(maps.Keys(names)) {
			if !slices.ContainsFunc(r.Cells, func(c Cell) bool { _, ok := c.More[n]; return ok }) {
				continue
			}
			line(n, func(c Cell) string {
				if v, ok := c.More[n]; ok {
					return number(v)
				}
				return ""
			})
		}
	}
	b.WriteString("\n</details>\n")
}

// draw makes the drawing of a table; nil if there is nothing to draw.
func (t *Table) draw() []byte {
	var series []plot.Series
	any := false
	for i, name := range t.Columns {
		s := plot.Series{Name: name, Own: isOwn(name)}
		for _, r := range t.Rows {
			v := math.NaN()
			if i < len(r.Cells) {
				v = r.Cells[i].Median()
			}
			any = any || !math.IsNaN(v)
			s.X, s.Y = append(s.X, r.X), append(s.Y, v)
		}
		series = append(series, s)
	}
	if !any {
		return nil
	}
	if t.XLabel != "" {
		return plot.Curves(t.Title, t.XLabel, t.Rows[0].Unit, series, number)
	}
	var groups []plot.Group
	for k := range t.Rows {
		r := &t.Rows[k]
		g := plot.Group{Name: r.Name, Unit: r.Unit}
		switch r.Better {
		case "higher":
			g.Unit += ", more is better"
		case "lower":
			g.Unit += ", less is better"
		}
		for i := range t.Columns {
			g.Values = append(g.Values, series[i].Y[k])
			g.Labels = append(g.Labels, t.cellText(r, i))
		}
		groups = append(groups, g)
	}
	return plot.Bars(t.Title, series, groups)
}
