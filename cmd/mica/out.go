package main

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"

	units "github.com/docker/go-units"
	"github.com/spf13/cobra"
)

// jsonFlag adds --json to a command.
func jsonFlag(c *cobra.Command, on *bool) {
	c.Flags().BoolVar(on, "json", false, "print JSON")
}

// printJSON writes v indented, with a newline.
func printJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	e.SetEscapeHTML(false)
	return e.Encode(v)
}

// printJSONLine writes v on one line.
func printJSONLine(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetEscapeHTML(false)
	return e.Encode(v)
}

// table writes aligned columns; the first row is the heading.
func table(w io.Writer, rows [][]string) error {
	t := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	for _, r := range rows {
		fmt.Fprintln(t, strings.Join(r, "\t"))
	}
	return t.Flush()
}

// size formats bytes as people write them here: 10G is 10 * 2^30.
func size(bytes int64) string {
	return strings.TrimSuffix(units.CustomSize("%.4g%s", float64(bytes), 1024, []string{"B", "K", "M", "G", "T", "P", "E"}), "B")
}

// A sizeFlag is a number of bytes on the command line, with the suffixes K M G T.
type sizeFlag struct {
	v   *int64
	set bool
}

func (f *sizeFlag) String() string {
	if f.v == nil || *f.v == 0 {
		return ""
	}
	return size(*f.v)
}

func (f *sizeFlag) Set(s string) error {
	n, err := parseSize(s)
	if err == nil {
		*f.v, f.set = n, true
	}
	return err
}

func (f *sizeFlag) Type() string { return "size" }

// sizeVar adds a flag that takes a size.
func sizeVar(c *cobra.Command, v *int64, name string, value int64, usage string) {
	*v = value
	c.Flags().Var(&sizeFlag{v: v}, name, usage)
}

// parseSize reads "4096", "64K", "10G": powers of 1024.
func parseSize(s string) (int64, error) {
	n, err := units.RAMInBytes(s)
	if err != nil || n < 0 {
		return 0, fmt.Errorf("%q is not a size: a number of bytes, or a number with K, M, G or T", s)
	}
	return n, nil
}
