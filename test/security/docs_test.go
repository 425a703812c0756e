package security

import (
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"

	"mica/daemon/config"
)

// grouped is a number as the document has it: 8,388,608.
func grouped(n int64) string {
	s := fmt.Sprint(n)
	for i := len(s) - 3; i > 0; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return s
}

// TestSecurityDocument: SECURITY.md says the bounds that the configuration has, and the tests that
// docs/reliability.md names for its promises are there.
func TestSecurityDocument(t *testing.T) {
	text := read(t, "../../SECURITY.md")
	c := config.Default()
	for key, want := range map[string]string{
		"max_archive": c.Images.MaxArchive.String() + "iB", "max_layer": c.Images.MaxLayer.String() + "iB", "max_entries": grouped(int64(c.Images.MaxEntries)),
		"max_ratio": grouped(int64(c.Images.MaxRatio)) + " times", "max_name": grouped(int64(c.Images.MaxName)) + " bytes", "max_xattrs": c.Images.MaxXattrs.String() + "iB",
		"limits.stall_timeout": strings.TrimSuffix(c.Limits.StallTimeout.String(), "m") + " min", "limits.operations": fmt.Sprint(c.Limits.Operations), "limits.events": grouped(int64(c.Limits.Events)),
	} {
		want = strings.NewReplacer("1TiB", "1 TiB", "256KiB", "256 KiB").Replace(want)
		found := false
		for line := range strings.Lines(text) {
			found = found || strings.HasPrefix(strings.TrimSpace(line), "|") && strings.Contains(line, "`"+key+"`") && strings.Contains(line, want)
		}
		if !found {
			t.Errorf("no line of a table has `%s` and %q", key, want)
		}
	}
}

// TestNamedTestsExist: what docs/reliability.md calls a test is one.
func TestNamedTestsExist(t *testing.T) {
	text := read(t, "../../docs/reliability.md")
	names := regexp.MustCompile("`([a-z][a-z/]*)`: ((?:`(?:Test|Fuzz)[A-Za-z0-9]+`(?:, )?\\s*)+)").FindAllStringSubmatch(text, -1)
	n := 0
	for _, m := range names {
		for _, name := range regexp.MustCompile("(Test|Fuzz)[A-Za-z0-9]+").FindAllString(m[2], -1) {
			n++
			if !declares(t, "../../"+m[1], name) {
				t.Errorf("%s has no %s", m[1], name)
			}
		}
	}
	if n < 30 {
		t.Errorf("%d names of tests were found: the document, or this test, has another form now", n)
	}
}

func declares(t *testing.T, dir, name string) bool {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Errorf("%s: %v", dir, err)
		return true
	}
	for _, e := range entries {
		if strings.HasSuffix(e.Name(), "_test.go") && strings.Contains(read(t, dir+"/"+e.Name()), "func "+name+"(") {
			return true
		}
	}
	return false
}

func read(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}
