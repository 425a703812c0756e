package pacing

import (
	"testing"
	"time"
)

// TestScore: slow requests that pile up spread the next ones, if there are several; one now and then does not.
func TestScore(t *testing.T) {
	var s Score
	for range 100 {
		s.Note(true)
		for range Slow {
			s.Note(false)
		}
	}
	if s.Spread(true) {
		t.Error("one slow in nine spreads")
	}
	for range Limit / Slow {
		s.Note(true)
	}
	for i := range For {
		if got := s.Spread(i != 5); got != (i != 5) {
			t.Errorf("request %d: spread %v", i, got)
		}
	}
	if s.Spread(true) {
		t.Error("none is tried again")
	}
}

// TestMean: a mean follows its samples, and a stall counts as eight of them at most.
func TestMean(t *testing.T) {
	var m time.Duration
	Mean(&m, 0)
	if m != 1 {
		t.Errorf("a first sample of 0 gives %v: it would look unknown", m)
	}
	m = 0
	Mean(&m, 800)
	Mean(&m, time.Hour)
	if m != 800+(8*800-800)/8 {
		t.Errorf("after a stall the mean is %v", m)
	}
	for range 100 {
		Mean(&m, 80)
	}
	if m > 90 {
		t.Errorf("after 100 samples of 80 ns the mean is %v", m)
	}
}
