// Package manpage makes manual pages (roff, man(7) macros) from command definitions, so that the
// pages and --help say the same.
package manpage

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// Section is the manual's section for administration commands.
const Section = "8"

// All returns the pages of a command and of all below it that are not hidden, by file name:
// "mica-image-import.8".
func All(root *cobra.Command) map[string]string {
	pages := map[string]string{}
	var walk func(*cobra.Command)
	walk = func(c *cobra.Command) {
		if c.Hidden || c.IsAdditionalHelpTopicCommand() {
			return
		}
		pages[fileName(c)] = Page(c)
		for _, sub := range c.Commands() {
			walk(sub)
		}
	}
	walk(root)
	return pages
}

func dashed(c *cobra.Command) string { return strings.ReplaceAll(c.CommandPath(), " ", "-") }

func fileName(c *cobra.Command) string { return dashed(c) + "." + Section }

// Page is the manual page of one command.
func Page(c *cobra.Command) string {
	var b strings.Builder
	root := c.Root()
	fmt.Fprintf(&b, ".TH %s %s \"\" %s \"%s manual\"\n", escape(strings.ToUpper(dashed(c))), Section, root.Name(), root.Name())
	b.WriteString(".SH NAME\n")
	fmt.Fprintf(&b, "%s \\- %s\n", escape(dashed(c)), escape(lowerFirst(c.Short)))
	b.WriteString(".SH SYNOPSIS\n")
	writeSynopsis(&b, c)
	if text := strings.TrimSpace(c.Long); text != "" {
		b.WriteString(".SH DESCRIPTION\n")
		writeText(&b, text)
	} else {
		b.WriteString(".SH DESCRIPTION\n")
		writeText(&b, c.Short+".")
	}
	if subs := visible(c); len(subs) > 0 {
		b.WriteString(".SH COMMANDS\n")
		for _, sub := range subs {
			fmt.Fprintf(&b, ".TP\n.BR %s (%s)\n%s\n", escape(dashed(sub)), Section, escape(sub.Short))
		}
	}
	writeOptions(&b, "OPTIONS", c.NonInheritedFlags())
	writeOptions(&b, "GLOBAL OPTIONS", c.InheritedFlags())
	writeEnvironment(&b)
	b.WriteString(".SH EXIT STATUS\n.TP\n0\nDone.\n.TP\n1\nAn error, named on standard error.\n.TP\n2\nA mistake in the command line.\n")
	if c.Example != "" {
		b.WriteString(".SH EXAMPLES\n.nf\n")
		for _, line := range strings.Split(strings.TrimRight(c.Example, "\n"), "\n") {
			b.WriteString(escapeLine(strings.TrimPrefix(line, "  ")) + "\n")
		}
		b.WriteString(".fi\n")
	}
	writeSeeAlso(&b, c)
	return b.String()
}

// visible lists the subcommands that have pages.
func visible(c *cobra.Command) []*cobra.Command {
	var list []*cobra.Command
	for _, sub := range c.Commands() {
		if !sub.Hidden && !sub.IsAdditionalHelpTopicCommand() && sub.Name() != "help" {
			list = append(list, sub)
		}
	}
	return list
}

func writeSynopsis(b *strings.Builder, c *cobra.Command) {
	name, args, _ := strings.Cut(c.UseLine(), c.CommandPath())
	_ = name
	if len(visible(c)) > 0 && c.Args == nil {
		fmt.Fprintf(b, ".B %s\n.I COMMAND\n", escape(c.CommandPath()))
		return
	}
	fmt.Fprintf(b, ".B %s\n%s\n", escape(c.CommandPath()), escapeLine(strings.TrimSpace(args)))
}

// writeText writes paragraphs; indented lines keep their form.
func writeText(b *strings.Builder, text string) {
	literal := false
	for _, line := range strings.Split(text, "\n") {
		indented := strings.HasPrefix(line, "    ")
		switch {
		case indented && !literal:
			b.WriteString(".RS 4\n.nf\n")
			literal = true
		case !indented && literal && line != "":
			b.WriteString(".fi\n.RE\n")
			literal = false
		}
		switch {
		case line == "" && !literal:
			b.WriteString(".PP\n")
		case line == "":
		default:
			b.WriteString(escapeLine(strings.TrimPrefix(line, "    ")) + "\n")
		}
	}
	if literal {
		b.WriteString(".fi\n.RE\n")
	}
}

func writeOptions(b *strings.Builder, title string, flags *pflag.FlagSet) {
	first := true
	flags.VisitAll(func(f *pflag.Flag) {
		if f.Hidden || f.Name == "help" {
			return
		}
		if first {
			fmt.Fprintf(b, ".SH %s\n", title)
			first = false
		}
		value, usage := pflag.UnquoteUsage(f)
		b.WriteString(".TP\n")
		if f.Shorthand != "" {
			fmt.Fprintf(b, "\\fB\\-%s\\fP, ", f.Shorthand)
		}
		fmt.Fprintf(b, "\\fB\\-\\-%s\\fP", escape(f.Name))
		if value != "" {
			fmt.Fprintf(b, " \\fI%s\\fP", escape(value))
		}
		b.WriteString("\n" + escapeLine(capitalize(usage)))
		if !strings.Contains(usage, "(default") && !zero(f) {
			fmt.Fprintf(b, " (default: %s)", escape(f.DefValue))
		}
		b.WriteString("\n")
	})
}

// zero reports whether a default need not be told.
func zero(f *pflag.Flag) bool {
	switch f.DefValue {
	case "", "0", "false", "[]", "0s":
		return true
	}
	return false
}

func writeEnvironment(b *strings.Builder) {
	b.WriteString(".SH ENVIRONMENT\n.TP\n.B MICA_RUN\nThe daemon's RUN directory, where \\-\\-run is not given.\n")
}

func writeSeeAlso(b *strings.Builder, c *cobra.Command) {
	var names []string
	if c.HasParent() {
		names = append(names, dashed(c.Parent()))
		for _, s := range visible(c.Parent()) {
			if s != c && c.Parent().HasParent() {
				names = append(names, dashed(s))
			}
		}
	}
	if len(names) == 0 {
		return
	}
	b.WriteString(".SH SEE ALSO\n")
	for i, n := range names {
		comma := ","
		if i == len(names)-1 {
			comma = ""
		}
		fmt.Fprintf(b, ".BR %s (%s)%s\n", escape(n), Section, comma)
	}
}

var special = strings.NewReplacer(`\`, `\e`, `-`, `\-`)

func escape(s string) string { return special.Replace(s) }

// escapeLine is escape for text at the beginning of a line, where a dot or a quote would begin a
// request.
func escapeLine(s string) string {
	s = escape(s)
	if strings.HasPrefix(s, ".") || strings.HasPrefix(s, "'") {
		s = `\&` + s
	}
	return s
}

func lowerFirst(s string) string {
	if len(s) > 1 && s[1] >= 'a' && s[1] <= 'z' {
		return strings.ToLower(s[:1]) + s[1:]
	}
	return s
}

func capitalize(s string) string {
	if s == "" {
		return s
	}
	return strings.ToUpper(s[:1]) + s[1:]
}
