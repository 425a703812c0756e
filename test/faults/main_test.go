// Package faults fails every single request of a pool's media once, and looks at what comes of it.
package faults

import (
	"fmt"
	"os"
	"runtime"
	"testing"
	"time"
)

// MICA_FAULTS=all runs every combination of request, error and sequel; else every request fails with
// some of them. MICA_FAULT_SEED is the seed; a failure prints it.
const (
	envAll  = "MICA_FAULTS"
	envSeed = "MICA_FAULT_SEED"
)

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

// bounded runs fn and ends the test binary with all goroutines printed if it hangs.
func bounded(what string, fn func() error) error {
	done := make(chan error, 1)
	go func() { done <- fn() }()
	select {
	case err := <-done:
		return err
	case <-time.After(2 * time.Minute):
		buf := make([]byte, 1<<20)
		panic(fmt.Sprintf("%s hangs:\n%s", what, buf[:runtime.Stack(buf, true)]))
	}
}
