package backup

import (
	"errors"
	"fmt"

	"mica/thin"
)

// What has become of a mapping since a backup.
const (
	same   = iota // its data block still holds what it held
	free          // its data block is free
	others        // its data block belongs to somebody else
)

// A judge compares mappings of a backup with the state that the pool has now.
//
// A data block that has been given out again was mapped anew, at the pool's time of that moment,
// which is not before the backup's time. So a mapping of an earlier time that the pool still has is
// the one of the backup. One of just the backup's time may be new; it is taken for the old one
// only if the device that has it now had it then.
type judge struct {
	present *thin.View
	m       *thin.Metadata // the backup
	ids     []thin.DevID   // of the present devices, ascending
	now     map[thin.DevID]thin.Details
	then    map[thin.DevID]thin.Details
	time    uint32 // of the backup
	pages   map[uint64]*[ownerPage]owner
}

const ownerPage = 4096

// An owner is who has a data block now: the mapping's time, and the first device that has it.
type owner struct {
	dev     thin.DevID
	time    uint32
	mapped  bool
	several bool // mappings of different times
}

// newJudge reads the present state. An error says why there is none.
func newJudge(present *thin.View, m *thin.Metadata, devs []thin.DeviceInfo) (*judge, error) {
	if present == nil {
		return nil, errors.New("the present metadata cannot be read")
	}
	j := &judge{present: present, m: m, time: m.Time(), pages: map[uint64]*[ownerPage]owner{},
		now: map[thin.DevID]thin.Details{}, then: map[thin.DevID]thin.Details{}}
	if t := present.Superblock().Time; t < j.time {
		return nil, fmt.Errorf("the pool's time has been compacted since the backup, from %d or more to %d", j.time, t)
	}
	for _, d := range devs {
		j.then[d.ID] = d.Details
	}
	now, err := present.Devices()
	if err != nil {
		return nil, err
	}
	for _, d := range now {
		j.ids = append(j.ids, d.ID)
		j.now[d.ID] = d.Details
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

// look says what has become of a mapping of the backup.
func (j *judge) look(id thin.DevID, e thin.Entry) (int, error) {
	p := j.pages[uint64(e.Block)/ownerPage]
	if p == nil || !p[uint64(e.Block)%ownerPage].mapped {
		return free, nil
	}
	x := p[uint64(e.Block)%ownerPage]
	if !x.several && x.time == e.Time && e.Time < j.time {
		return same, nil
	}
	// The device itself still has it, perhaps at a time that was compacted; or somebody who had it
	// then.
	for _, who := range []thin.DevID{id, x.dev} {
		if who != id && x.time != e.Time || !j.lives(who) {
			continue
		}
		now, err := j.presentAt(who, e.VBlock)
		if err != nil {
			return others, err
		}
		then, ok, err := j.m.Lookup(who, e.VBlock)
		if err != nil {
			return others, err
		}
		if ok && then.Block == e.Block && now.mapped && now.block == e.Block {
			return same, nil
		}
	}
	return others, nil
}

// lives reports whether a device of the backup is still the one of then.
func (j *judge) lives(id thin.DevID) bool {
	then, ok := j.then[id]
	now, still := j.now[id]
	return ok && still && now.TransactionID == then.TransactionID
}

type place struct {
	block  thin.DataBlock
	mapped bool
}

func (j *judge) presentAt(id thin.DevID, vb thin.VBlock) (p place, err error) {
	err = j.present.Walk(id, vb, func(e thin.Entry) bool {
		if e.VBlock == vb {
			p = place{e.Block, true}
		}
		return false
	})
	return p, err
}
