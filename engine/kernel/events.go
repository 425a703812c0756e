package kernel

import (
	"fmt"
	"sync"
	"sync/atomic"

	"mica/engine"
	"mica/internal/dmioctl"
)

// events are those of a pool, and what it was like at the last one.
type events struct {
	engine.Events
	poller *dmioctl.Poller
	// lossy counts the times at which the pool was seen in a state in which writes fail.
	lossy atomic.Int64
	// before says that there were events of the pool before this process watched it.
	before bool

	mu   sync.Mutex
	last dmioctl.PoolStatus // that was not Fail; guarded by mu
	mode string             // guarded by mu
	low  bool               // the low water event has been sent; guarded by mu
}

func (e *events) lastGood() dmioctl.PoolStatus {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.last
}

// start begins to watch the pool.
func (p *Pool) start() error {
	poller, err := dmioctl.NewPoller()
	if err != nil {
		return err
	}
	p.events.poller = poller
	p.trim.init()
	p.lookForEvents()
	p.loops.Add(2)
	go p.watchLoop()
	go p.trimLoop()
	return nil
}

// stopWatch ends watchLoop.
func (e *events) stopWatch() { e.poller.Stop() }

// watchLoop looks at the pool whenever anything happened in device-mapper.
func (p *Pool) watchLoop() {
	defer p.loops.Done()
	e := &p.events
	defer e.poller.Close()
	seen := uint32(0)
	for {
		if err := e.poller.Arm(); err != nil {
			p.log.Error("events of device-mapper", "error", err)
			return
		}
		if info, err := p.dm.Info(p.name); err == nil && info.Event != seen {
			seen = info.Event
			p.lookForEvents()
		}
		more, err := e.poller.Next()
		if err != nil {
			p.log.Error("events of device-mapper", "error", err)
		}
		if !more {
			return
		}
	}
}

// lookForEvents compares the pool with what it was at the last look.
func (p *Pool) lookForEvents() {
	st, err := p.poolStatus(true)
	if err != nil {
		return
	}
	e := &p.events
	e.mu.Lock()
	defer e.mu.Unlock()
	mode := st.Mode
	if st.Failed {
		mode = engine.ModeFail.String()
	} else {
		e.last = st
	}
	was := e.mode
	e.mode = mode
	if mode == engine.ModeFail.String() || mode == "ro" || mode == "out_of_data_space" && st.NoSpace == "error_if_no_space" {
		e.lossy.Add(1)
	}
	free := st.DataSize - st.DataUsed
	switch {
	case was == mode || was == "" && mode == "rw":
	case mode == "out_of_data_space":
		e.Send(engine.EventNoSpace, fmt.Sprintf("no free data block of %d", st.DataSize))
	case mode == "rw" && was == "out_of_data_space":
		e.Send(engine.EventSpaceAgain, fmt.Sprintf("%d data blocks free", free))
	default:
		detail := mode
		if st.NeedsCheck {
			detail += ": needs_check"
		}
		e.Send(engine.EventMode, detail)
	}
	if mark := p.opts.LowWaterMark; mark > 0 && !st.Failed {
		low := free <= mark
		if low && !e.low {
			e.Send(engine.EventLowWater, fmt.Sprintf("%d of %d data blocks free", free, st.DataSize))
		}
		e.low = low
	}
}

// Events returns a channel of events from now on. It is closed by cancel or with the pool.
func (p *Pool) Events() (<-chan engine.Event, func()) { return p.events.Subscribe() }
