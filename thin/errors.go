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
	// ErrNeedsCheck: the pool is marked needs_check; check it first.
	ErrNeedsCheck = errors.New("needs check")
	// ErrReadOnly: the metadata was opened read-only, or an operation on it has failed.
	ErrReadOnly = dev.ErrReadOnly
	// ErrCorrupt: bytes on the metadata device are not what they must be.
	ErrCorrupt = block.ErrCorrupt
)

func checkID(id DevID) error {
	if id > MaxDevID {
		return fmt.Errorf("device id %d does not fit 24 bits (at most %d)", id, MaxDevID)
	}
	return nil
}
