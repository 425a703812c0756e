package nbd

import (
	"testing"
	"time"
)

func TestPace(t *testing.T) {
	const f, s = 3 * time.Microsecond, 100 * time.Microsecond
	every := func(k, n int) []time.Duration { // one slow request in k
		var out []time.Duration
		for i := range n {
			if i%k == 0 {
				out = append(out, s)
			} else {
				out = append(out, f)
			}
		}
		return out
	}
	for name, tt := range map[string]struct {
		took []time.Duration
		want bool
	}{
		"fast":                      {every(1000, 1000)[1:], false},
		"one slow":                  {[]time.Duration{f, s, f, f}, false},
		"three slow":                {[]time.Duration{s, s, s}, true},
		"one in twenty, for long":   {every(20, 10000), false},
		"one in two":                {every(2, 20), true},
		"one in five":               {every(5, 60), true},
		"slow once, then recovered": {append([]time.Duration{s, s}, every(9, 90)[1:]...), false},
	} {
		var p pace
		for _, d := range tt.took {
			p.observe(d, 4096)
		}
		if got := p.Left > 0; got != tt.want {
			t.Errorf("%s: spread %v, want %v", name, got, tt.want)
		}
	}
	var p pace
	for range 10 {
		p.observe(30*time.Microsecond, 64<<10) // long requests may take longer
	}
	if p.Left != 0 {
		t.Error("requests of 64 KiB in 30 us count as slow")
	}
}
