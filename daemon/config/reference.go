package config

import (
	"fmt"
	"reflect"
	"strings"
)

// Reference is the page for people: every key with its default and what it means, in Markdown.
func Reference() string {
	var b strings.Builder
	b.WriteString(`# Configuration

` + "`mica serve`" + ` needs no configuration. What differs from the defaults goes into ` + "`" + DefaultFile + "`" + `, or into
the file that ` + "`--config`" + ` names. It is TOML. A key that does not exist is an error that shows its line.

Sizes are integers (bytes) or strings with ` + "`K`, `M`, `G`, `T`" + ` (powers of 1024). Durations are strings such as
` + "`\"90s\"`, `\"36h\"`, `\"7d\"`" + `. Percentages are integers, or strings with ` + "`%`" + `.

The values below are the defaults.

`)
	b.WriteString("```toml\n")
	c := Default()
	v := reflect.ValueOf(c)
	writeKeys(&b, v)
	for i := range v.NumField() {
		f := v.Type().Field(i)
		if f.Type.Kind() != reflect.Struct {
			continue
		}
		b.WriteString("\n")
		comment(&b, f.Tag.Get("doc"))
		fmt.Fprintf(&b, "[%s]\n", f.Tag.Get("toml"))
		writeKeys(&b, v.Field(i))
	}
	b.WriteString("```\n")
	return b.String()
}

func writeKeys(b *strings.Builder, v reflect.Value) {
	first := true
	for i := range v.NumField() {
		f := v.Type().Field(i)
		if f.Type.Kind() == reflect.Struct {
			continue
		}
		if !first {
			b.WriteString("\n")
		}
		first = false
		comment(b, f.Tag.Get("doc"))
		if f.Type.Kind() == reflect.Map { // tables: there are none by default
			for line := range strings.Lines(f.Tag.Get("example")) {
				b.WriteString("#     " + strings.TrimSpace(line) + "\n")
			}
			continue
		}
		fmt.Fprintf(b, "%s = %s\n", f.Tag.Get("toml"), literal(v.Field(i)))
	}
}

// literal writes a value so that the file reads it back.
func literal(v reflect.Value) string {
	switch x := v.Interface().(type) {
	case Size:
		if x%1024 != 0 || x == 0 {
			return fmt.Sprint(int64(x))
		}
		return fmt.Sprintf("%q", x.String())
	case fmt.Stringer:
		return fmt.Sprintf("%q", x.String())
	case []string:
		q := make([]string, len(x))
		for i, s := range x {
			q[i] = fmt.Sprintf("%q", s)
		}
		return "[" + strings.Join(q, ", ") + "]"
	case string:
		return fmt.Sprintf("%q", x)
	}
	return fmt.Sprint(v.Interface())
}

// comment wraps text at 100 columns.
func comment(b *strings.Builder, text string) {
	line := "#"
	for _, w := range strings.Fields(text) {
		if len(line)+1+len(w) > 100 {
			b.WriteString(line + "\n")
			line = "#"
		}
		line += " " + w
	}
	b.WriteString(line + "\n")
}
