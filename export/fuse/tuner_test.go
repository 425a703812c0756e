package fuse

import (
	"testing"
	"time"
)

// TestTuner: of one thread and two, what is faster is found and kept, and found again when it changes.
func TestTuner(t *testing.T) {
	var u tuner
	costs := [2]time.Duration{10 * time.Microsecond, 11 * time.Microsecond}
	windows := func(n int) (with [2]int) {
		for range n {
			two := u.two.Load()
			with[index(two)]++
			u.mu.Lock()
			u.window(u.settled, two, costs[index(two)])
			u.mu.Unlock()
		}
		return with
	}
	if with := windows(200); with[1] > 30 || u.best {
		t.Errorf("two are slower, and had %d of 200 windows", with[1])
	}
	costs[1] = 7 * time.Microsecond
	windows(2 * tuneQuiet)
	if with := windows(200); with[0] > 30 || !u.best {
		t.Errorf("two are faster, and one had %d of 200 windows", with[0])
	}
	costs[1] = 9900 * time.Nanosecond // as good as one
	windows(2 * tuneQuiet)
	if !u.best {
		t.Error("changed for chance")
	}
	costs[1] = 30 * time.Microsecond
	windows(2 * tuneQuiet)
	if u.best {
		t.Error("two have become slower, and stay")
	}
}

// TestTunerNothing: windows that tell nothing change nothing, but for the end of a trial.
func TestTunerNothing(t *testing.T) {
	var u tuner
	u.mu.Lock()
	defer u.mu.Unlock()
	u.window(true, false, time.Microsecond) // begins the first trial
	if !u.two.Load() {
		t.Fatal("nothing is tried")
	}
	for range tuneTrial {
		u.window(false, true, time.Nanosecond)
	}
	if u.two.Load() || u.best {
		t.Error("a trial of which nothing is known was a success")
	}
}
