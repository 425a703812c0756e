package backup

import (
	"fmt"
	"maps"
	"slices"

	"mica/dev"
	"mica/thin"
	"mica/thin/repair"
)

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
	Newer []thin.DevID `json:"newer_devices,omitempty"`
	// Backup says what could be taken of the backup: what is damaged in it, and what is left out
	// because its data blocks are somebody else's, or free.
	Backup *repair.Report `json:"backup"`
}

// RestoreOptions say how a backup is put back.
type RestoreOptions struct {
	// KeepFreed keeps mappings to data blocks that are free now. They hold zeros if the pool
	// punches or discards what is freed; else what was there, if nobody else has used them in
	// between.
	KeepFreed bool
	Progress  func(what string, done, total uint64) error
}

// Restore makes a pool on out of the metadata device of a backup (see Unpack), as a repair does: what
// is damaged in it is left out, what devices share stays shared. present, if not nil, is the state
// that the pool has now: a data block that somebody else has now is not given back to its old owner,
// who would read another's data; it reads as zeros.
//
// out is at least as long as the backup, and its first block all zeros. After an error there is no
// pool on it, or one that must not be used.
func Restore(from dev.Device, present *thin.View, out dev.Device, o RestoreOptions) (*Report, error) {
	r := &Report{}
	ro := repair.Options{Progress: o.Progress}
	j, err := newJudge(present, from)
	if err != nil {
		r.Why = err.Error()
	} else {
		r.Compared, r.Present = true, present.Superblock().TransactionID
		ro.Keep = func(id thin.DevID, vb thin.VBlock, m thin.Mapping) string { return j.keep(id, vb, m, o.KeepFreed) }
	}
	if r.Backup, err = repair.Repair(from, out, ro); err != nil {
		return nil, err
	}
	if j != nil && j.err != nil {
		return nil, fmt.Errorf("compare with the present metadata: %w", j.err)
	}
	r.TransactionID = r.Backup.TransactionID
	if j == nil {
		return r, nil
	}
	for _, d := range r.Backup.Devices {
		delete(j.now, d.ID)
	}
	r.Newer = slices.Sorted(maps.Keys(j.now))
	return r, grow(out, present.Superblock().DataMap.NrBlocks)
}

// grow gives a pool the length that it has now: it may have grown since the backup.
func grow(out dev.Device, blocks uint64) error {
	m, err := thin.Open(keepOpen{out}, thin.OpenOptions{})
	if err != nil {
		return err
	}
	defer m.Close()
	if blocks <= m.DataBlocks() {
		return nil
	}
	if err := m.GrowData(blocks); err != nil {
		return fmt.Errorf("the pool has grown to %d data blocks since the backup: %w", blocks, err)
	}
	_, err = m.Commit(nil)
	return err
}

type keepOpen struct{ dev.Device }

func (keepOpen) Close() error { return nil }
