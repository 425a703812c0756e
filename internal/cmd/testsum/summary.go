package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"regexp"
	"sort"
	"strings"
)

// An event is one line of `go test -json` (go doc test2json, go help buildjson).
type event struct {
	Action     string
	Package    string
	ImportPath string // of build-output and build-fail
	Test       string
	Output     string
	Elapsed    float64 // seconds
}

// outputLimit bounds what is kept of one test's or package's output, in bytes: the first and the
// last half of it.
const outputLimit = 256 << 10

// A test is one test or subtest; its zero value is running.
type test struct {
	name   string
	result string // pass, fail, skip or "" while it runs
	kids   int
	failed int // subtests, direct or not
	output output
}

// A pkg is one package under test.
type pkg struct {
	tests  map[string]*test
	order  []*test
	output output // outside tests
	build  string // import path whose build failed
}

type summary struct {
	w                       io.Writer
	pkgs                    map[string]*pkg
	builds                  map[string]*output
	passed, failed, skipped int
	reasons                 map[string][]string // of skips
	failures                []string
}

func newSummary(w io.Writer) *summary {
	return &summary{w: w, pkgs: map[string]*pkg{}, builds: map[string]*output{}, reasons: map[string][]string{}}
}

func (s *summary) pkg(name string) *pkg {
	p := s.pkgs[name]
	if p == nil {
		p = &pkg{tests: map[string]*test{}}
		s.pkgs[name] = p
	}
	return p
}

func (p *pkg) test(name string) *test {
	t := p.tests[name]
	if t == nil {
		t = &test{name: name}
		p.tests[name] = t
		p.order = append(p.order, t)
		if i := strings.LastIndexByte(name, '/'); i > 0 {
			p.test(name[:i]).kids++
		}
	}
	return t
}

// line takes one line of input. What is no event (a tool's own message) is passed on.
func (s *summary) line(line []byte) {
	var e event
	if err := json.Unmarshal(line, &e); err != nil || e.Action == "" {
		s.w.Write(line)
		return
	}
	switch e.Action {
	case "build-output":
		b := s.builds[e.ImportPath]
		if b == nil {
			b = &output{}
			s.builds[e.ImportPath] = b
		}
		b.add(e.Output)
	case "output":
		if e.Test == "" {
			s.pkg(e.Package).output.add(e.Output)
		} else {
			s.pkg(e.Package).test(e.Test).output.add(e.Output)
		}
	case "run":
		s.pkg(e.Package).test(e.Test)
	case "pass", "fail", "skip":
		if e.Test == "" {
			s.endPackage(e)
		} else {
			s.endTest(e)
		}
	}
}

func (s *summary) endTest(e event) {
	p := s.pkg(e.Package)
	t := p.test(e.Test)
	t.result = e.Action
	if e.Action == "fail" {
		for name := e.Test; strings.Contains(name, "/"); {
			name = name[:strings.LastIndexByte(name, '/')]
			p.test(name).failed++
		}
	}
	counts := t.kids == 0 || e.Action == "fail" && t.failed == 0
	if !counts {
		return
	}
	switch e.Action {
	case "pass":
		s.passed++
	case "fail":
		s.failed++
		s.fail(e.Package, t)
	case "skip":
		s.skipped++
		why := t.output.reason()
		s.reasons[why] = append(s.reasons[why], e.Package+" "+e.Test)
	}
}

// fail prints a failure in full: the test's output, with that of the tests around it.
func (s *summary) fail(pkgName string, t *test) {
	s.failures = append(s.failures, pkgName+" "+t.name)
	fmt.Fprintf(s.w, "\n--- FAILED %s %s\n%s", pkgName, t.name, t.output.text())
	p := s.pkg(pkgName)
	for name := t.name; strings.Contains(name, "/"); {
		name = name[:strings.LastIndexByte(name, '/')]
		if text := p.test(name).output.text(); strings.TrimSpace(stripMarks(text)) != "" {
			fmt.Fprintf(s.w, "    of %s:\n%s", name, text)
		}
	}
	fmt.Fprintln(s.w)
}

func (s *summary) endPackage(e event) {
	p := s.pkg(e.Package)
	var count, running, failedTests int
	for _, t := range p.order {
		if t.kids == 0 {
			count++
		}
		if t.result == "" && t.kids == 0 {
			running++
		}
		if t.result == "fail" {
			failedTests++
		}
	}
	switch {
	case e.Action == "fail" && (failedTests == 0 || running > 0):
		s.failed++
		s.failures = append(s.failures, e.Package)
		fmt.Fprintf(s.w, "\n--- FAILED %s (outside a test)\n%s", e.Package, p.output.text())
		for _, path := range sortedKeys(s.builds) {
			if path == e.Package || strings.HasPrefix(path, e.Package+" ") || strings.HasPrefix(path, e.Package+"_test") {
				fmt.Fprint(s.w, s.builds[path].text())
			}
		}
		for _, t := range p.order {
			if t.result == "" && t.kids == 0 {
				fmt.Fprintf(s.w, "    %s had not ended:\n%s", t.name, t.output.text())
			}
		}
		fmt.Fprintln(s.w)
	case e.Action == "skip" || count == 0:
	default:
		word := "ok  "
		if e.Action == "fail" {
			word = "FAIL"
		}
		fmt.Fprintf(s.w, "%s  %-44s %7.1f s  %s\n", word, e.Package, e.Elapsed, plural(count, "test"))
		for _, line := range p.output.lines() {
			if strings.HasPrefix(line, "SKIPPED ") {
				fmt.Fprintln(s.w, line)
			}
		}
	}
	delete(s.pkgs, e.Package) // its output is not needed any more
}

// finish prints the end of the report and says whether all is well.
func (s *summary) finish() bool {
	for _, name := range sortedKeys(s.pkgs) {
		s.failed++
		s.failures = append(s.failures, name)
		fmt.Fprintf(s.w, "\n--- FAILED %s (no result: the test run was cut short)\n%s\n", name, s.pkgs[name].output.text())
	}
	if s.failed > 0 || s.passed+s.skipped == 0 {
		for _, path := range sortedKeys(s.builds) {
			fmt.Fprintf(s.w, "%s", s.builds[path].text())
		}
	}
	if len(s.reasons) > 0 {
		fmt.Fprintln(s.w, "\nskipped:")
		for _, why := range sortedKeys(s.reasons) {
			fmt.Fprintf(s.w, "  %s: %s\n", plural(len(s.reasons[why]), "test"), why)
			for _, name := range s.reasons[why] {
				fmt.Fprintf(s.w, "      %s\n", name)
			}
		}
	}
	if len(s.failures) > 0 {
		fmt.Fprintln(s.w, "\nfailed:")
		for _, name := range s.failures {
			fmt.Fprintf(s.w, "  %s\n", name)
		}
	}
	if s.passed+s.failed+s.skipped == 0 {
		fmt.Fprintln(s.w, "\nno test ran")
	}
	fmt.Fprintf(s.w, "\n%d passed, %d failed, %d skipped\n", s.passed, s.failed, s.skipped)
	return s.failed == 0 && s.passed > 0
}

func sortedKeys[V any](m map[string]V) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	sort.Strings(keys)
	return keys
}

// output keeps the beginning and the end of a text.
type output struct {
	head, tail bytes.Buffer
	dropped    int
}

func (o *output) add(s string) {
	if room := outputLimit/2 - o.head.Len(); room > 0 && o.tail.Len() == 0 {
		n := min(room, len(s))
		o.head.WriteString(s[:n])
		s = s[n:]
	}
	o.tail.WriteString(s)
	if over := o.tail.Len() - outputLimit/2; over > outputLimit/8 {
		o.dropped += over
		o.tail.Next(over)
	}
}

func (o *output) text() string {
	if o.dropped == 0 {
		return o.head.String() + o.tail.String()
	}
	return fmt.Sprintf("%s\n[%d bytes left out]\n%s", o.head.String(), o.dropped, o.tail.String())
}

func (o *output) lines() []string { return strings.Split(o.text(), "\n") }

var (
	mark     = regexp.MustCompile(`^\s*(=== \w+|--- \w+:)`)
	position = regexp.MustCompile(`^\s*[\w.-]+\.go:\d+: `)
)

// stripMarks takes away the lines that the test runner itself prints.
func stripMarks(text string) string {
	var keep []string
	for _, line := range strings.Split(text, "\n") {
		if !mark.MatchString(line) {
			keep = append(keep, line)
		}
	}
	return strings.Join(keep, "\n")
}

// reason is the last thing a skipped test said.
func (o *output) reason() string {
	why := "no reason given"
	for _, line := range strings.Split(stripMarks(o.text()), "\n") {
		if line = position.ReplaceAllString(line, ""); strings.TrimSpace(line) != "" {
			why = strings.TrimSpace(line)
		}
	}
	return why
}
