package dev

import "fmt"

// forward passes the extras of a device on for a decorator; where the device lacks one the
// answer is ErrUnsupported.
type forward struct{ Device }

func (f forward) Discard(off, n int64) error {
	if d, ok := f.Device.(Discarder); ok {
		return d.Discard(off, n)
	}
	return fmt.Errorf("discard: %w", ErrUnsupported)
}

func (f forward) WriteZeroes(off, n int64, keepAllocated bool) error {
	if d, ok := f.Device.(Zeroer); ok {
		return d.WriteZeroes(off, n, keepAllocated)
	}
	return fmt.Errorf("write zeroes: %w", ErrUnsupported)
}

func (f forward) Extents(off, n int64) ([]Extent, error) {
	if d, ok := f.Device.(Extenter); ok {
		return d.Extents(off, n)
	}
	return nil, fmt.Errorf("extents: %w", ErrUnsupported)
}

func (f forward) Resize(sizeBytes int64) error {
	if d, ok := f.Device.(Resizer); ok {
		return d.Resize(sizeBytes)
	}
	return fmt.Errorf("resize: %w", ErrUnsupported)
}

func (f forward) Allocate(off, n int64) error {
	if d, ok := f.Device.(Allocator); ok {
		return d.Allocate(off, n)
	}
	return fmt.Errorf("allocate: %w", ErrUnsupported)
}

func (f forward) HostBytes() (int64, error) {
	if d, ok := f.Device.(HostByter); ok {
		return d.HostBytes()
	}
	return 0, fmt.Errorf("host bytes: %w", ErrUnsupported)
}

func (f forward) DiscardZeroes() bool {
	d, ok := f.Device.(DiscardZeroer)
	return ok && d.DiscardZeroes()
}
