// Package space lets every kind of space run out: data blocks, metadata blocks, the host's disk.
package space

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"testing"
	"time"
)

var ctx = context.Background()

// MICA_SPACE_SEED is the seed; a failure prints it.
const envSeed = "MICA_SPACE_SEED"

func seed(t testing.TB) uint64 {
	s := uint64(time.Now().UnixNano())
	if v := os.Getenv(envSeed); v != "" {
		if _, err := fmt.Sscan(v, &s); err != nil {
			t.Fatalf("%s=%q: %v", envSeed, v, err)
		}
	}
	t.Logf("seed %d (%s)", s, envSeed)
	return s
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// eventually waits until ok, or fails after a generous time.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(60 * time.Second); time.Now().Before(end); time.Sleep(time.Millisecond) {
		if ok() {
			return
		}
	}
	t.Fatalf("timed out: %s", what)
}

func command(t testing.TB, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %v: %v\n%s", name, args, err, out)
	}
}

func shm(t testing.TB) string {
	t.Helper()
	d, err := os.MkdirTemp("/dev/shm", "mica-space-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(d) })
	return d
}
