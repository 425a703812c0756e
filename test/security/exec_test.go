package security

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

// shipped are the folders of what the program is made of.
var shipped = []string{"cmd", "daemon", "snapshotter", "image", "layer", "export", "engine", "lvm", "journal", "thin", "pdata", "dev"}

// starters are the places that start other programs, with how each chooses the program and what it
// gives it. A new one has to be looked at, and written down here.
var starters = map[string]string{
	"export/fuse/helper.go":        "this program in another role; calls go over its standard input",
	"export/helper/client.go":      "this program in another role; calls go over its standard input",
	"export/holder/client.go":      "this program in another role; its socket's path is an argument",
	"layer/helper/process.go":      "this program in another role; the request goes over its standard input",
	"layer/helper/mkfs.go":         "mke2fs, resize2fs, mkfs.xfs, xfs_repair: fixed arguments, a node and numbers",
	"engine/kernel/open.go":        "modprobe of a fixed list of modules",
	"lvm/tool.go":                  "LVM's tools, with names of devices and volumes from the configuration behind their options",
	"dev/signature/signature.go":   "wipefs and blkid, with the path of a device from the configuration",
	"export/ublk/exporter.go":      "modprobe of one module",
	"export/nbdkernel/modprobe.go": "modprobe of one module",
}

// TestNoShell: no command that the program runs goes through a shell, and no argument of one is made
// by joining text: what carries a name carries it as an argument of its own, or not at all.
func TestNoShell(t *testing.T) {
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	found := 0
	for _, top := range shipped {
		if _, err := os.Stat(filepath.Join(root, top)); os.IsNotExist(err) {
			continue
		}
		err := filepath.WalkDir(filepath.Join(root, top), func(path string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
				return err
			}
			rel, _ := filepath.Rel(root, path)
			if strings.Contains(rel, "/internal/") || strings.HasPrefix(rel, "export/exporttest/") || strings.HasPrefix(rel, "engine/enginetest/") {
				return nil // helpers of tests
			}
			n, err := looksAt(t, path, filepath.ToSlash(rel))
			found += n
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if found < 5 {
		t.Errorf("%d places that start programs were found: the test looks at nothing", found)
	}
}

// looksAt checks one file and counts the programs that it starts.
func looksAt(t *testing.T, path, rel string) (starts int, err error) {
	set := token.NewFileSet()
	f, err := parser.ParseFile(set, path, nil, 0)
	if err != nil {
		return 0, err
	}
	ast.Inspect(f, func(n ast.Node) bool {
		switch v := n.(type) {
		case *ast.CallExpr:
			name := callName(v)
			at := 0
			switch name {
			case "exec.Command":
			case "exec.CommandContext":
				at = 1
			case "os.StartProcess", "syscall.Exec", "unix.Exec", "syscall.ForkExec", "syscall.StartProcess":
				if name == "unix.Exec" || name == "syscall.Exec" {
					if rel == "daemon/process.go" { // itself, once, so that a setting holds for every thread
						return true
					}
				}
				t.Errorf("%s: %s: programs are started with exec.Command", set.Position(v.Pos()), name)
				return true
			default:
				return true
			}
			starts++
			if starters[rel] == "" {
				t.Errorf("%s: starts a program, and is not on the list of those that may", set.Position(v.Pos()))
			}
			for i, a := range v.Args[at:] {
				if bad := composed(a); bad != "" {
					t.Errorf("%s: argument %d is made with %s", set.Position(a.Pos()), i, bad)
				}
			}
		case *ast.BasicLit:
			if v.Kind != token.STRING {
				return true
			}
			s, err := strconv.Unquote(v.Value)
			if err != nil || rel == "cmd/mica/cmd_completion.go" { // which names shells to write for
				return true
			}
			switch s {
			case "sh", "bash", "/bin/sh", "/bin/bash", "/usr/bin/env", "env", "system", "eval":
				t.Errorf("%s: %q", set.Position(v.Pos()), s)
			}
		case *ast.ImportSpec:
			if v.Path.Value == `"plugin"` || v.Path.Value == `"C"` {
				t.Errorf("%s: import %s", set.Position(v.Pos()), v.Path.Value)
			}
		}
		return true
	})
	return starts, nil
}

func callName(c *ast.CallExpr) string {
	s, ok := c.Fun.(*ast.SelectorExpr)
	if !ok {
		return ""
	}
	if x, ok := s.X.(*ast.Ident); ok {
		return x.Name + "." + s.Sel.Name
	}
	return ""
}

// composed says how an argument is put together from text, "" if it is not.
func composed(e ast.Expr) (how string) {
	ast.Inspect(e, func(n ast.Node) bool {
		switch v := n.(type) {
		case *ast.BinaryExpr:
			if v.Op == token.ADD {
				how = "+"
			}
		case *ast.CallExpr:
			if n := callName(v); strings.HasPrefix(n, "fmt.") || n == "strings.Join" {
				how = n
			}
		}
		return how == ""
	})
	return how
}
