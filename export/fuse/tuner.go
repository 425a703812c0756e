package fuse

import (
	"sync"
	"sync/atomic"
	"time"
)

// A tuner finds out whether a second thread makes a busy device faster. Where there are processors to
// spare it does. Where there are none, it only takes turns with the first one, with who writes the
// requests, and with the kernel's own threads: 4 KiB requests on two processors are a tenth faster
// without it. So both are tried, for some ten milliseconds while requests never stop, and the better
// one is kept for a while.
type tuner struct {
	two   atomic.Bool   // a second thread may help
	waits atomic.Uint64 // of threads for a request

	mu      sync.Mutex
	begin   time.Duration    // guarded by mu, as are the others; of the window, since epoch
	from    uint64           // requests served before the window
	waited  uint64           // waits before it
	as      bool             // how many threads it began with: two
	cost    [2]time.Duration // of a request, with one thread and with two; 0: not known
	best    bool             // two are better
	trial   int              // windows that the other way is still tried
	quiet   int              // windows until it is tried again
	settled bool             // the window is not the first after a change
}

const (
	// tuneEvery is how many requests go by between two looks at the clock; a power of two.
	tuneEvery = 256
	// tuneWindow is how long a window is at least.
	tuneWindow = 20 * time.Millisecond
	// tuneTrial is how many windows a trial has: the first one is not counted.
	tuneTrial = 3
	// tuneQuiet is how many windows go by between two trials.
	tuneQuiet = 32
	// A window in which threads wait more often than once for so many requests tells nothing.
	tuneBusy = 32
)

// look is called by the thread that has served the n-th request, a multiple of tuneEvery.
func (t *tuner) look(n uint64, alone bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	now := time.Since(epoch)
	if now-t.begin < tuneWindow {
		return
	}
	requests, waits := n-t.from, t.waits.Load()
	busy := requests > 0 && (waits-t.waited)*tuneBusy <= requests && now-t.begin < 50*tuneWindow
	same := t.as == !alone && t.settled
	t.window(busy && same, !alone, (now-t.begin)/time.Duration(max(requests, 1)))
	t.begin, t.from, t.waited, t.as = now, n, waits, !alone
}

// window takes note of a window with one thread or with two, and says how to go on.
func (t *tuner) window(counts, two bool, cost time.Duration) {
	i := index(two)
	if counts {
		if t.cost[i] == 0 || t.trial > 0 {
			t.cost[i] = cost
		} else {
			t.cost[i] += (cost - t.cost[i]) / 4
		}
	}
	t.settled = true
	switch {
	case t.trial > 0:
		if t.trial--; t.trial > 0 {
			return
		}
		// The other way is taken if it is better by more than chance.
		if a, b := t.cost[index(t.best)], t.cost[index(!t.best)]; a > 0 && b > 0 && b < a-a/32 {
			t.best = !t.best
		}
		t.quiet = tuneQuiet
		t.change(t.best)
	case counts:
		if t.quiet--; t.quiet <= 0 {
			t.trial, t.cost[index(!t.best)] = tuneTrial, 0
			t.change(!t.best)
		}
	}
}

func (t *tuner) change(two bool) {
	if t.two.Swap(two) != two {
		t.settled = false
	}
}

func index(two bool) int {
	if two {
		return 1
	}
	return 0
}
