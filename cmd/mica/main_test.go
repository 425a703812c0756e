package main

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"mica/internal/vm"
)

var update = flag.Bool("update", false, "rewrite expected outputs and generated documents")

// TestMain lets the test binary be the program: under the name mica in scripts and when the tests
// start it, and as /proc/self/exe when the daemon starts its roles.
func TestMain(m *testing.M) {
	if base := filepath.Base(os.Args[0]); base == "mica" || base == "exe" {
		main()
	}
	testscript.Main(tests{m}, map[string]func(){"mica": main})
}

// tests says at the end how many tests had no machine to run in.
type tests struct{ m *testing.M }

func (t tests) Run() int {
	defer vm.PrintSkipped()
	return t.m.Run()
}

// TestScripts runs testdata/script: the program without a daemon.
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:           filepath.Join("testdata", "script"),
		UpdateScripts: *update,
		Condition: func(cond string) (bool, error) {
			switch cond {
			case "root":
				return os.Geteuid() == 0, nil
			case "fuse":
				_, err := os.Stat("/dev/fuse")
				return err == nil, nil
			}
			return false, fmt.Errorf("unknown condition %q", cond)
		},
		Setup: func(e *testscript.Env) error {
			e.Setenv("MICA_RUN", "")
			e.Setenv("HOME", e.WorkDir)
			return nil
		},
	})
}
