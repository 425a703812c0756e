// Package power cuts the power of pools, file systems on them and layer stores, by the ten
// thousand, and looks at what is left.
package power

import (
	"fmt"
	"os"
	"strconv"
	"testing"
	"time"
)

// MICA_POWER_CUTS is how many power cuts TestPool makes, MICA_POWER_SEED the seed of everything;
// a failure prints it. MICA_POWER_OPS names a file with operations, as a failure prints them, to
// be run instead of random ones.
const (
	envCuts = "MICA_POWER_CUTS"
	envSeed = "MICA_POWER_SEED"
	envOps  = "MICA_POWER_OPS"
)

func cuts(t testing.TB) int {
	n := 10_000
	if raceEnabled {
		n = 800
	}
	if v := os.Getenv(envCuts); v != "" {
		var err error
		if n, err = strconv.Atoi(v); err != nil {
			t.Fatalf("%s=%q: %v", envCuts, v, err)
		}
	}
	return n
}

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
