package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"mica/cmd/mica/internal/manpage"
)

// eachCommand calls fn for every command that is not hidden.
func eachCommand(c *cobra.Command, fn func(*cobra.Command)) {
	if c.Hidden || c.Name() == "help" {
		return
	}
	fn(c)
	for _, sub := range c.Commands() {
		eachCommand(sub, fn)
	}
}

// TestManPages: the pages in docs/man are those of the commands, no more and no less.
func TestManPages(t *testing.T) {
	const dir = "../../docs/man"
	pages := manpage.All(newRoot())
	old, err := filepath.Glob(filepath.Join(dir, "*"))
	if err != nil {
		t.Fatal(err)
	}
	if *update {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		for _, f := range old {
			os.Remove(f)
		}
		for name, text := range pages {
			if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		old = nil
	}
	for name, text := range pages {
		b, err := os.ReadFile(filepath.Join(dir, name))
		if d := cmp.Diff(string(b), text); err != nil || d != "" {
			t.Errorf("docs/man/%s is not what the command says (go test ./cmd/mica -run ManPages -update): %v\n%s", name, err, d)
		}
	}
	for _, f := range old {
		if pages[filepath.Base(f)] == "" {
			t.Errorf("%s has no command", f)
		}
	}
}

// TestHelpTexts: every command says what it is for in a line and has an example; flags say what
// they are.
func TestHelpTexts(t *testing.T) {
	n := 0
	eachCommand(newRoot(), func(c *cobra.Command) {
		n++
		if c.Short == "" || strings.HasSuffix(c.Short, ".") || len(c.Short) > 80 {
			t.Errorf("%s: short text %q", c.CommandPath(), c.Short)
		}
		if !c.HasSubCommands() && c.Example == "" {
			t.Errorf("%s has no example", c.CommandPath())
		}
		for _, line := range strings.Split(c.Long+"\n"+c.Example, "\n") {
			if len(line) > 110 || strings.Contains(line, "\t") {
				t.Errorf("%s: line %q is too long, or has a tab", c.CommandPath(), line)
			}
		}
		for _, line := range strings.Split(c.Example, "\n") {
			if c.Example != "" && !strings.HasPrefix(line, "  ") {
				t.Errorf("%s: example %q is not indented by two", c.CommandPath(), line)
			}
		}
		c.Flags().VisitAll(func(f *pflag.Flag) {
			if f.Usage == "" || f.Usage[0] >= 'A' && f.Usage[0] <= 'Z' && f.Usage[1] >= 'a' && f.Usage[1] <= 'z' {
				t.Errorf("%s --%s: usage %q", c.CommandPath(), f.Name, f.Usage)
			}
		})
	})
	if n < 40 {
		t.Errorf("only %d commands", n)
	}
}
