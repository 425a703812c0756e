package backup

import (
	"bufio"
	"fmt"
	"io"

	"mica/dev"
	"mica/thin"
)

// A Device is what became of one device of a backup.
type Device struct {
	ID     thin.DevID `json:"id"`
	Mapped uint64     `json:"mapped_blocks"` // in the backup
	Reused uint64     `json:"reused_blocks"` // whose data blocks have been given to others since
	Freed  uint64     `json:"freed_blocks"`  // whose data blocks are free now
	Kept   uint64     `json:"kept_blocks"`
}

// A Report says what a pool is after it has been put back to a backup.
type Report struct {
	TransactionID uint64 `json:"transaction_id"` // of the backup, and of the pool from then on
	// Compared: the pool's present metadata could be read, and blocks that it says are somebody
	// else's now are left out. Otherwise nobody can tell.
	Compared bool   `json:"compared"`
	Why      string `json:"why,omitempty"` // why not
	// Present is the transaction id of the present metadata, if compared.
	Present uint64 `json:"present_transaction_id"`
	// Newer are the devices that are in the pool now and not in the backup: they are lost.
	Newer   []thin.DevID `json:"newer_devices,omitempty"`
	Devices []Device     `json:"devices"`
}

// Lost counts mappings that are in the backup and are not put back.
func (r *Report) Lost() (blocks uint64) {
	for _, d := range r.Devices {
		blocks += d.Mapped - d.Kept
	}
	return blocks
}

// RestoreOptions say how a backup is put back.
type RestoreOptions struct {
	// KeepFreed keeps mappings to data blocks that are free now. They hold zeros if the pool
	// punches or discards what is freed; else what was there, if nobody else has used them in
	// between.
	KeepFreed bool
	Progress  func(mappings uint64) error
}

// Restore writes the state that a dump describes onto a metadata device whose first block is all
// zeros. present, if not nil, is the state that the pool has now: a data block that somebody else
// has now is not given back to its old owner, who would read another's data; it reads as zeros.
// After an error there is no pool on out, or one that must not be used.
func Restore(dump io.Reader, present *thin.View, out dev.Device, o RestoreOptions) (*Report, error) {
	if err := thin.Restore(bufio.NewReaderSize(dump, 1<<16), out, thin.RestoreOptions{Progress: o.Progress}); err != nil {
		return nil, err
	}
	m, err := thin.Open(keepOpen{out}, thin.OpenOptions{})
	if err != nil {
		return nil, err
	}
	defer m.Close()
	r := &Report{TransactionID: m.TransactionID(), Why: "nothing to compare with"}
	devs, err := m.Devices()
	if err != nil {
		return nil, err
	}
	j, err := newJudge(present, m, devs)
	if err != nil {
		r.Why = err.Error()
	}
	for _, d := range devs {
		line := Device{ID: d.ID, Mapped: d.MappedBlocks, Kept: d.MappedBlocks}
		if j != nil {
			if err := j.prune(d.ID, &line, o.KeepFreed); err != nil {
				return nil, err
			}
		}
		r.Devices = append(r.Devices, line)
	}
	if j == nil {
		return r, nil
	}
	r.Compared, r.Why, r.Present = true, "", present.Superblock().TransactionID
	for _, id := range j.ids {
		if _, ok := j.then[id]; !ok {
			r.Newer = append(r.Newer, id)
		}
	}
	// The pool may have grown since the backup.
	if n := present.Superblock().DataMap.NrBlocks; n > m.DataBlocks() {
		if err := m.GrowData(n); err != nil {
			return nil, fmt.Errorf("the pool has grown to %d data blocks since the backup: %w", n, err)
		}
	}
	_, err = m.Commit(nil)
	return r, err
}

type keepOpen struct{ dev.Device }

func (keepOpen) Close() error { return nil }

// pruneStep is how many mappings are looked at between two commits.
const pruneStep = 4096

// prune takes the mappings away that are not the device's any more.
func (j *judge) prune(id thin.DevID, line *Device, keepFreed bool) error {
	for next, more := thin.VBlock(0), true; more; {
		var batch []thin.Entry
		more = false
		if err := j.m.LookupRange(id, next, 1<<63, func(e thin.Entry) bool {
			batch = append(batch, e)
			more = len(batch) == pruneStep
			return !more
		}); err != nil {
			return err
		}
		changed := false
		for _, e := range batch {
			next = e.VBlock + 1
			v, err := j.look(id, e)
			if err != nil {
				return err
			}
			switch {
			case v == same, v == free && keepFreed:
				if v == free {
					line.Freed++
				}
				continue
			case v == free:
				line.Freed++
			default:
				line.Reused++
			}
			line.Kept--
			changed = true
			if _, _, _, err := j.m.Remove(id, e.VBlock, e.VBlock+1, 0); err != nil {
				return err
			}
		}
		if changed {
			if _, err := j.m.Commit(nil); err != nil {
				return err
			}
		}
	}
	return nil
}
