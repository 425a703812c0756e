package backup

import (
	"errors"
	"fmt"

	"mica/dev"
	"mica/thin"
)

// Why a mapping of a backup is left out.
const (
	othersNow = "the data blocks have been given to others since"
	freeNow   = "the data blocks are free now"
)

// A judge compares mappings of a backup with the state that the pool has now.
//
// A data block that has been given out again was mapped anew, at the pool's time of that moment,
// which is not before the backup's time. So a mapping of an earlier time that the pool still has is
// the one of the backup. One of just the backup's time may be new; it is taken for the old one
// only if the device that has it now had it then.
type judge struct {
	present *thin.View
	backup  *thin.View
	now     map[thin.DevID]thin.Details
	then    map[thin.DevID]thin.Details
	time    uint32 // of the backup
	pages   map[uint64]*[ownerPage]owner
	err     error // that a comparison has met
}

const ownerPage = 4096

// An owner is who has a data block now: the mapping's time, and the first device that has it.
type owner struct {
	dev     thin.DevID
	time    uint32
	mapped  bool
	several bool // mappings of different times
}

// newJudge reads the present state. An error says why there is nothing to compare with.
func newJudge(present *thin.View, from dev.Device) (*judge, error) {
	if present == nil {
		return nil, errors.New("the present metadata cannot be read")
	}
	v, err := thin.OpenView(from)
	if err != nil {
		return nil, fmt.Errorf("the backup is damaged: %w", err)
	}
	j := &judge{present: present, backup: v, time: v.Superblock().Time, pages: map[uint64]*[ownerPage]owner{}}
	if t := present.Superblock().Time; t < j.time {
		return nil, fmt.Errorf("the pool's time has been compacted since the backup, from %d or more to %d", j.time, t)
	}
	if j.now, err = detailsOf(present); err != nil {
		return nil, err
	}
	if j.then, err = detailsOf(v); err != nil {
		return nil, fmt.Errorf("the backup is damaged: %w", err)
	}
	err = present.EachMapping(func(id thin.DevID, e thin.Entry) bool {
		p := j.pages[uint64(e.Block)/ownerPage]
		if p == nil {
			p = new([ownerPage]owner)
			j.pages[uint64(e.Block)/ownerPage] = p
		}
		switch x := &p[uint64(e.Block)%ownerPage]; {
		case !x.mapped:
			*x = owner{id, e.Time, true, false}
		case x.time != e.Time:
			x.several = true
		}
		return true
	})
	if err != nil {
		return nil, err
	}
	return j, nil
}

func detailsOf(v *thin.View) (map[thin.DevID]thin.Details, error) {
	list, err := v.Devices()
	m := make(map[thin.DevID]thin.Details, len(list))
	for _, d := range list {
		m[d.ID] = d.Details
	}
	return m, err
}

// keep says why a mapping of the backup must go, or nothing.
func (j *judge) keep(id thin.DevID, vb thin.VBlock, m thin.Mapping, freed bool) string {
	p := j.pages[uint64(m.Block)/ownerPage]
	if p == nil || !p[uint64(m.Block)%ownerPage].mapped {
		if freed {
			return ""
		}
		return freeNow
	}
	x := p[uint64(m.Block)%ownerPage]
	if !x.several && x.time == m.Time && m.Time < j.time {
		return ""
	}
	// The device itself still has it, perhaps at a time that was compacted; or somebody who had it
	// then.
	for _, who := range []thin.DevID{id, x.dev} {
		if (who == id || x.time == m.Time) && j.lives(who) && j.has(j.present, who, vb, m.Block) && j.has(j.backup, who, vb, m.Block) {
			return ""
		}
	}
	return othersNow
}

// lives reports whether a device of the backup is still the one of then.
func (j *judge) lives(id thin.DevID) bool {
	then, ok := j.then[id]
	now, still := j.now[id]
	return ok && still && now.TransactionID == then.TransactionID
}

// has reports whether a device maps a virtual block to a certain data block in a state.
func (j *judge) has(v *thin.View, id thin.DevID, vb thin.VBlock, b thin.DataBlock) bool {
	m, ok, err := v.Lookup(id, vb)
	switch {
	case err == nil:
	case v == j.backup: // damaged there: then the mapping itself is lost too, or another's
		return false
	case j.err == nil:
		j.err = err
	}
	return ok && m.Block == b
}
