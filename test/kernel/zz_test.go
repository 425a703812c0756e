package kernel

import (
	"os"
	"testing"
	"time"

	"mica/internal/vm"
)

func TestZZ(t *testing.T) {
	c := exportConfig(t)
	f, _ := os.Create("/tmp/console.txt")
	c.Trace = func(line string) { f.WriteString(line + "\n") }
	m := vm.Start(t, c)
	m.RunTests(t, 4*time.Minute, nil, "/bin/"+os.Getenv("ZZPROG"), "-test.run="+os.Getenv("ZZ"))
}
