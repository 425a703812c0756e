package lint

import (
	"bytes"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// root is the module's directory.
func root(t *testing.T) string {
	t.Helper()
	dir, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(dir, "go.mod")); err != nil {
		t.Fatal(err)
	}
	return dir
}

// eachFile calls fn for every file of the project but build products and binary files. name is
// relative to the root.
func eachFile(t *testing.T, fn func(name string, text []byte)) {
	t.Helper()
	dir := root(t)
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, _ := filepath.Rel(dir, path)
		if d.IsDir() {
			if name == ".git" || name == "bin" || name == ".cache" {
				return filepath.SkipDir
			}
			return nil
		}
		if !d.Type().IsRegular() || strings.HasSuffix(name, ".test") || strings.HasSuffix(name, ".prof") {
			return nil
		}
		text, err := os.ReadFile(path)
		if err != nil || bytes.IndexByte(text[:min(len(text), 8000)], 0) >= 0 {
			return err
		}
		fn(name, text)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestGoFiles(t *testing.T) {
	count := 0
	eachFile(t, func(name string, text []byte) {
		if !strings.HasSuffix(name, ".go") {
			return
		}
		count++
		if n := bytes.Count(text, []byte("\n")); n > MaxLines {
			t.Errorf("%s has %d lines, at most %d", name, n, MaxLines)
		}
		fset := token.NewFileSet()
		f, err := parser.ParseFile(fset, name, text, parser.SkipObjectResolution)
		if err != nil {
			t.Errorf("%v", err)
			return
		}
		for _, imp := range f.Imports {
			base := strings.TrimSuffix(strings.TrimSuffix(name, ".go"), "_test")
			if imp.Path.Value == `"unsafe"` && !strings.HasSuffix(base, "_unsafe") {
				t.Errorf("%s imports unsafe: its name must end in _unsafe.go", name)
			}
		}
		ast.Inspect(f, func(n ast.Node) bool {
			call, ok := n.(*ast.CallExpr)
			if !ok {
				return true
			}
			sel, ok := call.Fun.(*ast.SelectorExpr)
			if ok && (sel.Sel.Name == "Skip" && len(call.Args) == 0 || sel.Sel.Name == "SkipNow") {
				t.Errorf("%v: a skip without a reason", fset.Position(call.Pos()))
			}
			return true
		})
	})
	if count < 20 {
		t.Fatalf("found %d Go files only", count)
	}
}

// TestNoLeftovers: nothing is committed that a tool leaves behind.
func TestNoLeftovers(t *testing.T) {
	cmd := exec.Command("git", "ls-files")
	cmd.Dir = root(t)
	out, err := cmd.Output()
	if err != nil {
		t.Skipf("git ls-files: %v (no git, or no repository)", err)
	}
	leftover := regexp.MustCompile(`(\.(state|orig|rej|log|prof|test|swp|bak)|~|(^|/)core)$`)
	for _, name := range strings.Split(strings.TrimSpace(string(out)), "\n") {
		if leftover.MatchString(name) {
			t.Errorf("%s is committed", name)
		}
	}
}

// forbidden are words that must not be in any file; they are put together here so that this file
// passes.
var forbidden = []struct{ pattern, why string }{
	{`\bTO` + `DO\b|\bFIX` + `ME\b|\bXX` + `X\b`, "unfinished work"},
	{`(^|[^\w./-])/wo` + `rk/|/tmp/con` + `tract`, "a path of one machine"},
	{`deb\.deb` + `ian\.org|proxy\.go` + `lang\.org|registry\.np` + `mjs`, "a package host: machines have their own"},
}

func TestForbiddenWords(t *testing.T) {
	for _, f := range forbidden {
		re := regexp.MustCompile(f.pattern)
		eachFile(t, func(name string, text []byte) {
			if name == "go.sum" || name == "LICENSE" {
				return
			}
			for i, line := range bytes.Split(text, []byte("\n")) {
				if re.Match(line) {
					t.Errorf("%s:%d: %s: %s", name, i+1, f.why, bytes.TrimSpace(line))
				}
			}
		})
	}
}

// TestEntryPoints: the two commands that a newcomer needs are in the README, work through the
// Makefile, and the second is what is run before every change is taken.
func TestEntryPoints(t *testing.T) {
	read := func(name string) string {
		text, err := os.ReadFile(filepath.Join(root(t), name))
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
	readme, makefile := read("README.md"), read("Makefile")
	for _, target := range []string{"demo", "test"} {
		if !strings.Contains(readme, "make "+target) {
			t.Errorf("README.md does not name `make %s`", target)
		}
	}
	for _, target := range []string{"all", "build", "demo", "undemo", "test", "race", "fuzz-short", "bench", "lint", "man", "clean"} {
		if !regexp.MustCompile(`(?m)^` + target + `:`).MatchString(makefile) {
			t.Errorf("the Makefile has no target %s", target)
		}
	}
	var commands []string
	for _, line := range strings.Split(read(".ci/run"), "\n") {
		if line = strings.TrimSpace(line); line != "" && !strings.HasPrefix(line, "#") &&
			!strings.HasPrefix(line, "set ") && !strings.HasPrefix(line, "cd ") {
			commands = append(commands, line)
		}
	}
	if len(commands) != 1 || commands[0] != "make test" {
		t.Errorf(".ci/run runs %q, want exactly \"make test\"", commands)
	}
	if st, err := os.Stat(filepath.Join(root(t), ".ci/run")); err != nil || st.Mode()&0o111 == 0 {
		t.Errorf(".ci/run is not executable (%v)", err)
	}
}
