package lint

import (
	"path"
	"regexp"
	"strings"
	"testing"
)

var (
	namedTest = regexp.MustCompile("`((?:Test|Fuzz|Benchmark)[A-Z][A-Za-z0-9_]*)`")
	testFunc  = regexp.MustCompile(`(?m)^func ((?:Test|Fuzz|Benchmark)[A-Z][A-Za-z0-9_]*)\(`)
	// A cell of a table names packages, each followed by tests of it.
	packageName = regexp.MustCompile("`([a-z][a-z0-9_/]*)`: ")
)

// TestDocsNameTests: every test that a page names as the proof of a promise is there, in the
// package that it is said to be in.
func TestDocsNameTests(t *testing.T) {
	tests := map[string]map[string]bool{} // by package
	pages := map[string]string{}
	eachFile(t, func(name string, text []byte) {
		switch {
		case strings.HasSuffix(name, "_test.go"):
			dir := path.Dir(name)
			if tests[dir] == nil {
				tests[dir] = map[string]bool{}
			}
			for _, m := range testFunc.FindAllSubmatch(text, -1) {
				tests[dir][string(m[1])] = true
			}
		case strings.HasSuffix(name, ".md"):
			pages[name] = string(text)
		}
	})
	named := 0
	for page, text := range pages {
		for i, line := range strings.Split(text, "\n") {
			at := packageName.FindAllStringSubmatchIndex(line, -1)
			for _, m := range namedTest.FindAllStringSubmatchIndex(line, -1) {
				named++
				pkg, test := "", line[m[2]:m[3]]
				for _, p := range at {
					if p[0] < m[0] {
						pkg = line[p[2]:p[3]]
					}
				}
				if pkg != "" {
					if !tests[pkg][test] {
						t.Errorf("%s:%d: there is no %s in %s", page, i+1, test, pkg)
					}
					continue
				}
				found := false
				for _, list := range tests {
					found = found || list[test]
				}
				if !found {
					t.Errorf("%s:%d: there is no %s", page, i+1, test)
				}
			}
		}
	}
	if named < 20 {
		t.Errorf("%d tests are named in all pages: the pattern finds none", named)
	}
}
