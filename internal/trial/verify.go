package trial

import (
	"errors"
	"fmt"

	"mica/dev"
	"mica/engine/user"
	"mica/thin"
)

// CheckImages judges what a power cut at a time has left: the metadata is clean, the pool opens,
// and every device holds what its history allows. The images are changed.
func (t *Trial) CheckImages(meta, data *dev.Mem, cut int) error {
	rep, err := thin.Check(meta, thin.CheckOptions{})
	if err != nil {
		return fmt.Errorf("check: %w", err)
	}
	if len(rep.Findings) > 0 {
		return fmt.Errorf("check: %d findings, the first: %s: %s", len(rep.Findings), rep.Findings[0].Severity, rep.Findings[0].String())
	}
	o := t.Setup.Options
	o.Logger = Quiet
	p, err := user.New(meta, data, o)
	if err != nil {
		return fmt.Errorf("open: %w", err)
	}
	if err := t.Verify(p, cut); err != nil {
		p.Close()
		return err
	}
	return p.Close()
}

// Verify judges the devices of a pool that was opened after a cut.
func (t *Trial) Verify(p *user.Pool, cut int) error {
	st, err := p.Status(ctx)
	if err != nil {
		return err
	}
	if err := between("transaction id", st.TransactionID, t.txids, cut); err != nil {
		return err
	}
	if err := between("data blocks", st.DataBlocks, t.sizes, cut); err != nil {
		return err
	}
	list, err := p.Devices(ctx)
	if err != nil {
		return err
	}
	found := map[thin.DevID]bool{}
	for _, i := range list {
		found[i.ID] = true
	}
	buf := make([]byte, t.Setup.Sectors*SectorBytes)
	opts := t.openOptions(true)
	for _, d := range t.all {
		d.mu.Lock()
		created, deleted, maybe := d.created, d.deleted, d.maybe
		sure := d.durableBefore(cut)
		d.mu.Unlock()
		if created.begin > cut || deleted.end != 0 && deleted.end <= cut {
			continue
		}
		must := created.end != 0 && created.end <= cut && (deleted.begin == 0 || deleted.begin > cut)
		if !found[d.ID] {
			if must && !maybe {
				return fmt.Errorf("thin %d (#%d) is gone: it was created at %d", d.ID, d.serial, created.end)
			}
			continue
		}
		h, err := p.Open(ctx, d.ID, opts)
		if err != nil {
			return err
		}
		_, err = h.ReadAt(buf, 0)
		if err := errors.Join(err, h.Close()); err != nil {
			return err
		}
		err = d.check(buf, 0, sure, cut, deleted.begin != 0 && deleted.begin <= cut)
		if err != nil && !maybe && !must && t.successor(d, cut) {
			continue // an uncertain deletion, then an uncertain creation
		}
		if err != nil {
			return err
		}
		delete(found, d.ID)
	}
	for id := range found {
		return fmt.Errorf("thin %d is there: it was deleted, or nobody made it", id)
	}
	return nil
}

// successor reports whether another device with the id may be there instead.
func (t *Trial) successor(d *Device, cut int) bool {
	for _, e := range t.all {
		if e != d && e.ID == d.ID && e.serial > d.serial && e.created.begin <= cut {
			return true
		}
	}
	return false
}

// between checks that a value is the last acknowledged one or one begun since.
func between(what string, got uint64, marks []mark, cut int) error {
	lo, hi := uint64(0), uint64(0)
	for _, m := range marks {
		if m.end != 0 && m.end <= cut {
			lo = max(lo, m.value)
		}
		if m.begin <= cut {
			hi = max(hi, m.value)
		}
	}
	if got < lo || got > hi && hi > 0 {
		return fmt.Errorf("%s %d, want %d to %d", what, got, lo, hi)
	}
	return nil
}
