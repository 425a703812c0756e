package thin

import (
	"errors"
	"fmt"

	"mica/dev"
	"mica/pdata/block"
)

// Conditions that callers branch on. They are wrapped with the ids and numbers.
var (
	// ErrExists: the device id, or a pool on this device, exists already.
	ErrExists = errors.New("exists already")
	// ErrNotFound: there is no such thin device.
	ErrNotFound = errors.New("no such thin device")
	// ErrNoMetaSpace: the metadata device has no room for the change.
	ErrNoMetaSpace = errors.New("out of metadata space")
	// ErrTime: the pool's time cannot be raised; Compact makes room.
	ErrTime = errors.New("the pool's time is at its end")
	// ErrNeedsCheck: the pool is marked needs_check; check it first.
	ErrNeedsCheck = errors.New("needs check")
	// ErrReadOnly: the metadata was opened read-only, or an operation on it has failed.
	ErrReadOnly = dev.ErrReadOnly
	// ErrNoPool: block 0 is all zeros, as on a device that was never formatted.
	ErrNoPool = errors.New("no thin pool here: the superblock (metadata block 0) is " + noPool)
	// ErrCorrupt: bytes on the metadata device are not what they must be.
	ErrCorrupt = block.ErrCorrupt
)

// noPool is what an empty block 0 means, and what to do.
const noPool = "all zeros; make a pool with 'mica pool create', or, if there was one, look for it with 'mica pool repair'"

func checkID(id DevID) error {
	if id > MaxDevID {
		return fmt.Errorf("device id %d does not fit 24 bits (at most %d)", id, MaxDevID)
	}
	return nil
}
