package faults

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"golang.org/x/sys/unix"

	"mica/dev"
	"mica/engine"
	"mica/engine/user"
	"mica/internal/trial"
	"mica/thin"
)

var ctx = context.Background()

// final reports whether the failure of a request takes the pool out of service: a sync of the data,
// or a write or a sync of the metadata. Whether a failed read of metadata does depends on who read.
func final(h trial.Hit) bool {
	return h.Op == dev.OpFlush || h.Meta && h.Op != dev.OpRead
}

// stillOpen looks at the pool after the load: its mode is the one that belongs to what has failed;
// once the media work again, reads go on, and nothing that failed for good succeeds.
func stillOpen(t *trial.Trial, p *trial.Plan) (r result, err error) {
	hit, any := p.First()
	st, err := t.Pool.Status(ctx)
	if err != nil {
		return r, err
	}
	if r.failed = st.FailReason != ""; r.failed && unmarkable(p) {
		// The mark is tried behind the caller's back.
		for end := time.Now().Add(20 * time.Second); st.Mode != "Fail" && time.Now().Before(end); time.Sleep(time.Millisecond) {
			if st, err = t.Pool.Status(ctx); err != nil {
				return r, err
			}
		}
		if st.Mode != "Fail" {
			return r, fmt.Errorf("mode %s, though needs_check cannot be written", st.Mode)
		}
	}
	r.mode = st.Mode
	mayFail := any && (final(hit) || hit.Meta || p.Then != trial.Once)
	switch {
	case any && final(hit) && p.Then != trial.Once && !r.failed && hit.Op == dev.OpFlush:
		return r, fmt.Errorf("a failed sync left the pool in mode %s", st.Mode)
	case any && final(hit) && !r.failed && !grows(hit):
		return r, fmt.Errorf("%v left the pool in mode %s", hit, st.Mode)
	case r.failed && !mayFail:
		return r, fmt.Errorf("%v took the pool out of service: %s", hit, st.FailReason)
	case r.failed && st.Mode != "ro" && !(st.Mode == "Fail" && hit.Meta):
		return r, fmt.Errorf("a failed pool says mode %s", st.Mode)
	case !r.failed && st.Mode == "Fail":
		return r, errors.New("mode Fail without a reason")
	case !r.failed && st.Mode != "rw" && !(st.Mode == "out_of_data_space" && errors.Is(p.Err, unix.ENOSPC)):
		return r, fmt.Errorf("%v left the pool in mode %s", hit, st.Mode)
	}
	p.Repair()
	if err := t.CheckLive(); err != nil {
		return r, fmt.Errorf("after the media were repaired: %w", err)
	}
	if !r.failed {
		// Whatever waited or was refused goes on.
		return r, t.EachOpen(func(h engine.Thin) error { return h.Flush() })
	}
	err = t.EachOpen(func(h engine.Thin) error {
		for range 2 {
			if err := h.Flush(); !errors.Is(err, engine.ErrFailed) {
				return fmt.Errorf("flush of thin %d after the failure: %v, want ErrFailed", h.ID(), err)
			}
		}
		if _, err := h.WriteAt(make([]byte, 512), 0); !errors.Is(err, engine.ErrFailed) {
			return fmt.Errorf("write to thin %d after the failure: %v, want ErrFailed", h.ID(), err)
		}
		return nil
	})
	if err != nil {
		return r, err
	}
	for what, err := range map[string]error{
		"commit":         t.Pool.Commit(ctx),
		"create":         t.Pool.CreateThin(ctx, 999),
		"grow data":      t.Pool.GrowData(ctx, 1<<40),
		"transaction id": t.Pool.SetTransactionID(ctx, st.TransactionID, st.TransactionID+1),
		"snapshot":       t.Pool.CreateSnap(ctx, 998, 1),
	} {
		if !errors.Is(err, engine.ErrFailed) {
			return r, fmt.Errorf("%s after the failure: %v, want ErrFailed", what, err)
		}
	}
	return r, nil
}

// unmarkable reports whether needs_check could not be written: the metadata device does not take
// writes or syncs any more.
func unmarkable(p *trial.Plan) bool {
	hit, _ := p.First()
	return hit.Meta && (p.Then == trial.Dead || p.Then == trial.SameKind && (hit.Op == dev.OpWrite || hit.Op == dev.OpFlush))
}

// grows: what fails while the device is made longer only fails the growth.
func grows(h trial.Hit) bool { return h.Meta && h.Op == dev.OpWrite && h.Off >= 512*4096 }

func closed(t *trial.Trial, p *trial.Plan, r result) error {
	if err := t.CloseDevices(); err != nil {
		return err
	}
	err := t.Pool.Close()
	switch {
	case r.failed && !errors.Is(err, engine.ErrFailed):
		return fmt.Errorf("close of a failed pool: %v, want ErrFailed", err)
	case !r.failed && err != nil:
		return fmt.Errorf("close: %w", err)
	}
	return nil
}

// afterwards opens what is on the media, as it is and as a power cut at the end may have left it,
// and goes the documented way back: check, clear needs_check, open.
func afterwards(s trial.Setup, t *trial.Trial, meta, data *dev.Mem, p *trial.Plan, r result) error {
	if t == nil { // the pool did not even open
		return wayBack(s, meta.Clone(), data.Clone(), nil, 0)
	}
	now := t.Log.Now()
	c := t.Log.Cursor()
	c.Seek(now)
	rng := rand.New(rand.NewPCG(uint64(p.At), 7))
	for i, mode := range []dev.CrashMode{dev.CrashKeep, dev.CrashLose, dev.AnyCrashMode(rng), dev.AnyCrashMode(rng)} {
		m, d := c.Image(t.Meta, mode, dev.UnitMetadata, rng), c.Image(t.Data, mode, dev.Unit512, rng)
		if i >= 2 {
			d = c.Image(t.Data, dev.AnyCrashMode(rng), dev.Unit512, rng)
		}
		rep, err := thin.Check(m.Clone(), thin.CheckOptions{})
		if err != nil {
			return fmt.Errorf("unflushed writes %v: %w", mode, err)
		}
		for _, f := range rep.Findings {
			return fmt.Errorf("unflushed writes %v: check: %s", mode, f.String())
		}
		if hit, _ := p.First(); i == 0 && rep.NeedsCheck != r.failed && !(hit.Meta && p.Then != trial.Once) {
			return fmt.Errorf("needs_check is %v, the pool failed: %v", rep.NeedsCheck, r.failed)
		}
		if err := wayBack(s, m, d, t, now); err != nil {
			return fmt.Errorf("unflushed writes %v: %w", mode, err)
		}
	}
	return nil
}

// wayBack brings a pool back into service. t says what must be in it.
func wayBack(s trial.Setup, m, d *dev.Mem, t *trial.Trial, cut int) error {
	rep, err := thin.Check(m, thin.CheckOptions{})
	if err != nil {
		return err
	}
	o := s.Options
	o.Logger = trial.Quiet
	if rep.NeedsCheck {
		p, err := user.New(m.Clone(), d.Clone(), o)
		if err != nil {
			return err
		}
		if st, err := p.Status(ctx); err != nil || st.Mode != "ro" || !st.NeedsCheck {
			return fmt.Errorf("a pool that needs a check opens in mode %s: %v", st.Mode, err)
		}
		if err := p.CreateThin(ctx, 999); !errors.Is(err, thin.ErrNeedsCheck) {
			return fmt.Errorf("create in a pool that needs a check: %v, want ErrNeedsCheck", err)
		}
		if err := p.Close(); err != nil {
			return err
		}
		if rep, err = thin.Check(m, thin.CheckOptions{ClearNeedsCheck: true}); err != nil || !rep.NeedsCheckCleared {
			return fmt.Errorf("needs_check was not cleared: %v", err)
		}
	}
	p, err := user.New(m, d, o)
	if err != nil {
		return err
	}
	if t != nil {
		if err := t.Verify(p, cut); err != nil {
			p.Close()
			return err
		}
	}
	list, err := p.Devices(ctx)
	for _, i := range list {
		if err != nil {
			break
		}
		var h engine.Thin
		if h, err = p.Open(ctx, i.ID, engine.OpenOptions{SizeBytes: s.Sectors * trial.SectorBytes}); err == nil {
			_, err = h.WriteAt(make([]byte, 4096), 0)
			if errors.Is(err, dev.ErrNoSpace) && !errors.Is(err, unix.ENOSPC) {
				err = nil // the pool was full before
			}
			err = errors.Join(err, h.Flush(), h.Close())
		}
	}
	return errors.Join(err, p.Close())
}
