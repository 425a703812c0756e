package lint

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"strings"
	"testing"
)

const module = "mica"

type goPackage struct {
	ImportPath string
	Imports    []string
}

func listPackages(t *testing.T) []goPackage {
	t.Helper()
	cmd := exec.Command("go", "list", "-e", "-json=ImportPath,Imports", module+"/...")
	cmd.Dir = root(t)
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	var pkgs []goPackage
	for dec := json.NewDecoder(bytes.NewReader(out)); ; {
		var p goPackage
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			return pkgs
		} else if err != nil {
			t.Fatal(err)
		}
		pkgs = append(pkgs, p)
	}
}

// matches: does a pattern of Layers cover a package (both relative to the module)?
func matches(pattern, pkg string) bool {
	if base, ok := strings.CutSuffix(pattern, "/..."); ok {
		return pkg == base || strings.HasPrefix(pkg, base+"/")
	}
	return pkg == pattern
}

// violation returns why pkg must not import dep, or "".
func violation(pkg, dep string) string {
	for _, l := range Layers {
		if !matches(l.Package, pkg) {
			continue
		}
		own := strings.TrimSuffix(l.Package, "/...")
		if l.Package != own && matches(l.Package, dep) && !strings.HasPrefix(pkg, "internal/") {
			return "" // inside one part
		}
		for _, may := range l.May {
			if matches(may, dep) {
				return ""
			}
		}
		return pkg + " imports " + dep + ": the layer " + l.Package + " may import only " + strings.Join(l.May, " ")
	}
	return pkg + ": no layer in internal/lint covers this package"
}

func TestImportsPointDown(t *testing.T) {
	pkgs := listPackages(t)
	if len(pkgs) < 5 {
		t.Fatalf("go list names %d packages only", len(pkgs))
	}
	for _, p := range pkgs {
		pkg := strings.TrimPrefix(p.ImportPath, module+"/")
		if strings.HasSuffix(pkg, ".test") {
			continue
		}
		if why := violation(pkg, pkg+"/self"); strings.Contains(why, "no layer") {
			t.Error(why)
			continue
		}
		for _, imp := range p.Imports {
			if dep, ok := strings.CutPrefix(imp, module+"/"); ok {
				if why := violation(pkg, dep); why != "" {
					t.Error(why)
				}
			}
		}
	}
}

func TestViolation(t *testing.T) {
	for _, c := range []struct {
		pkg, dep string
		bad      bool
	}{
		{"thin", "pdata/btree", false},
		{"thin", "engine", true},
		{"engine/user", "export", true},
		{"engine/user", "thin", false},
		{"export/nbd", "dev", false},
		{"export/nbd", "engine", true},
		{"export/fuse", "export/loop", false},
		{"layer/catalog", "layer", false},
		{"pdata/txn", "pdata/btree", true},
		{"daemon", "internal/vm", true},
		{"layer", "image", true},
		{"cmd/mica", "engine/user", false},
		{"engine/kernel", "internal/dmioctl", false},
		{"engine/user", "internal/dmioctl", true},
		{"somewhere/new", "dev", true},
	} {
		if why := violation(c.pkg, c.dep); (why != "") != c.bad {
			t.Errorf("%s -> %s: got %q, want a violation: %v", c.pkg, c.dep, why, c.bad)
		}
	}
}
