package vm

import (
	"context"
	"fmt"
	"regexp"
	"strings"
	"testing"
	"time"

	"mica/internal/vm/wire"
)

// RunTests runs a test program (BuildTest) in the guest and reports its tests as subtests of t:
// each one that fails there fails here, with what it printed. args go to the program; env is added
// to its environment.
func (m *Machine) RunTests(t *testing.T, limit time.Duration, env []string, args ...string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), limit+30*time.Second)
	defer cancel()
	args = append(args, "-test.v", fmt.Sprintf("-test.timeout=%v", limit))
	res, err := m.Run(ctx, wire.Command{Args: args, Env: env})
	if err != nil {
		t.Fatalf("%v\nstdout:\n%s", err, lastBytes(res.Stdout, 8000))
	}
	tests := parseTests(string(res.Stdout))
	for _, r := range tests {
		t.Run(r.name, func(t *testing.T) {
			switch r.verdict {
			case "FAIL":
				t.Errorf("in the guest:\n%s", r.text)
			case "SKIP":
				t.Skipf("in the guest: %s", strings.TrimSpace(r.text))
			default:
				t.Logf("in the guest: %s\n%s", r.took, r.text)
			}
		})
	}
	if res.Code != 0 || len(tests) == 0 {
		t.Errorf("%q: exit status %d, %d tests\nend of its output:\n%s%s", args, res.Code, len(tests), lastBytes(res.Stdout, 8000), lastBytes(res.Stderr, 4000))
	}
}

// A testResult is one test without subtests of a program's -test.v output, or one that failed.
type testResult struct {
	name, verdict, took, text string
}

var (
	verdictLine = regexp.MustCompile(`^ *--- (PASS|FAIL|SKIP): (\S+) \(([0-9.]+s)\)$`)
	runLine     = regexp.MustCompile(`^=== (?:RUN|CONT|NAME|PAUSE) +(\S*)$`)
)

// parseTests reads the output of a test program with -test.v. What a test prints follows the line
// that says it runs.
func parseTests(out string) []testResult {
	text := map[string]*strings.Builder{}
	var all []testResult
	current := ""
	for line := range strings.Lines(out) {
		trimmed := strings.TrimRight(line, "\n")
		if r := runLine.FindStringSubmatch(trimmed); r != nil {
			current = r[1]
			continue
		}
		if r := verdictLine.FindStringSubmatch(trimmed); r != nil {
			all = append(all, testResult{name: r[2], verdict: r[1], took: r[3]})
			continue
		}
		if text[current] == nil {
			text[current] = &strings.Builder{}
		}
		text[current].WriteString(line)
	}
	var leaves []testResult
	for _, r := range all {
		parent := false
		for _, o := range all {
			parent = parent || strings.HasPrefix(o.name, r.name+"/")
		}
		if b := text[r.name]; b != nil {
			r.text = b.String()
		}
		if !parent || r.verdict == "FAIL" && r.text != "" {
			leaves = append(leaves, r)
		}
	}
	return leaves
}
