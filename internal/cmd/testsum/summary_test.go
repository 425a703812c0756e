package main

import (
	"encoding/json"
	"strings"
	"testing"
)

// events builds the JSON lines of a run.
func events(t *testing.T, list ...event) string {
	t.Helper()
	var b strings.Builder
	for _, e := range list {
		line, err := json.Marshal(e)
		if err != nil {
			t.Fatal(err)
		}
		b.Write(line)
		b.WriteByte('\n')
	}
	return b.String()
}

func TestSummary(t *testing.T) {
	run := func(name string) event { return event{Action: "run", Package: "p", Test: name} }
	end := func(action, name string) event { return event{Action: action, Package: "p", Test: name} }
	say := func(name, text string) event { return event{Action: "output", Package: "p", Test: name, Output: text} }
	for _, c := range []struct {
		name   string
		events []event
		ok     bool
		last   string
		want   []string // somewhere in the text
		not    []string
	}{
		{"pass and skip",
			[]event{run("TestA"), end("pass", "TestA"), run("TestB"), say("TestB", "    b_test.go:7: no loop devices\n"),
				say("TestB", "--- SKIP: TestB (0.00s)\n"), end("skip", "TestB"), end("pass", "")},
			true, "1 passed, 0 failed, 1 skipped", []string{"1 test: no loop devices\n      p TestB", "ok    p"}, []string{"failed:"}},
		{"subtests are counted, their parent is not",
			[]event{run("TestA"), run("TestA/x"), run("TestA/y"), end("pass", "TestA/x"), end("pass", "TestA/y"), end("pass", "TestA"), end("pass", "")},
			true, "2 passed, 0 failed, 0 skipped", nil, nil},
		{"a failing subtest is shown with what its parent said",
			[]event{run("TestA"), say("TestA", "    a_test.go:1: seed 42\n"), run("TestA/x"), say("TestA/x", "    a_test.go:9: got 1, want 2\n"),
				end("fail", "TestA/x"), end("fail", "TestA"), end("fail", "")},
			false, "0 passed, 1 failed, 0 skipped", []string{"FAILED p TestA/x", "got 1, want 2", "seed 42", "FAIL  p"}, nil},
		{"a parent that fails by itself counts",
			[]event{run("TestA"), run("TestA/x"), end("pass", "TestA/x"), say("TestA", "    leak\n"), end("fail", "TestA"), end("fail", "")},
			false, "1 passed, 1 failed, 0 skipped", []string{"leak"}, nil},
		{"a panic fails the package and shows what ran",
			[]event{run("TestA"), say("TestA", "panic: boom\n"), say("", "FAIL p 0.1s\n"), end("fail", "")},
			false, "0 passed, 1 failed, 0 skipped", []string{"FAILED p (outside a test)", "TestA had not ended", "panic: boom"}, nil},
		{"a build failure",
			[]event{{Action: "build-output", ImportPath: "p [p.test]", Output: "p.go:3: undefined: x\n"},
				{Action: "build-fail", ImportPath: "p [p.test]"}, say("", "FAIL p [build failed]\n"), end("fail", "")},
			false, "0 passed, 1 failed, 0 skipped", []string{"undefined: x"}, nil},
		{"a run that is cut short",
			[]event{run("TestA")},
			false, "0 passed, 1 failed, 0 skipped", []string{"cut short"}, nil},
		{"no test at all", nil, false, "0 passed, 0 failed, 0 skipped", []string{"no test ran"}, nil},
		{"a skip without a reason says so",
			[]event{run("TestA"), end("pass", "TestA"), run("TestB"), say("TestB", "--- SKIP: TestB (0.00s)\n"), end("skip", "TestB"), end("pass", "")},
			true, "1 passed, 0 failed, 1 skipped", []string{"1 test: no reason given"}, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			var out strings.Builder
			s := newSummary(&out)
			for _, line := range strings.SplitAfter(events(t, c.events...), "\n") {
				if line != "" {
					s.line([]byte(line))
				}
			}
			if ok := s.finish(); ok != c.ok {
				t.Errorf("got ok %v, want %v", ok, c.ok)
			}
			text := strings.TrimRight(out.String(), "\n")
			if last := text[strings.LastIndexByte(text, '\n')+1:]; last != c.last {
				t.Errorf("last line: got %q, want %q", last, c.last)
			}
			for _, want := range c.want {
				if !strings.Contains(text, want) {
					t.Errorf("%q is not in:\n%s", want, text)
				}
			}
			for _, not := range c.not {
				if strings.Contains(text, not) {
					t.Errorf("%q is in:\n%s", not, text)
				}
			}
		})
	}
}

func TestOutputIsBounded(t *testing.T) {
	var o output
	for range 10_000 {
		o.add(strings.Repeat("x", 99) + "\n")
	}
	o.add("the end\n")
	if text := o.text(); len(text) > 2*outputLimit || !strings.HasSuffix(text, "the end\n") {
		t.Errorf("kept %d bytes ending in %q", len(text), text[len(text)-8:])
	}
}
