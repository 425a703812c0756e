package crossing

import "fmt"

// A Runner runs scripts on one pool. It keeps devices open between operations, as a user of the
// pool does, and closes them when they are deleted. Not safe for concurrent use.
type Runner struct {
	pool  Pool
	sizes map[uint32]int64
	open  map[uint32]Thin
	buf   []byte
}

// NewRunner returns a runner; sizes are those of the devices that exist already. buf is what
// writes are made of (its length bounds one write); callers that need aligned memory bring it.
func NewRunner(p Pool, sizes map[uint32]int64, buf []byte) *Runner {
	r := &Runner{pool: p, sizes: map[uint32]int64{}, open: map[uint32]Thin{}, buf: buf}
	for id, size := range sizes {
		r.sizes[id] = size
	}
	return r
}

// Device opens a device, or returns it if it is open.
func (r *Runner) Device(id uint32) (Thin, error) {
	if t := r.open[id]; t != nil {
		return t, nil
	}
	size, ok := r.sizes[id]
	if !ok {
		return nil, fmt.Errorf("the size of device %d is unknown", id)
	}
	t, err := r.pool.Open(id, size)
	if err != nil {
		return nil, fmt.Errorf("open device %d: %w", id, err)
	}
	r.open[id] = t
	return t, nil
}

// Close flushes and closes all open devices.
func (r *Runner) Close() error {
	var first error
	for id, t := range r.open {
		if err := t.Flush(); err != nil && first == nil {
			first = fmt.Errorf("flush device %d: %w", id, err)
		}
		if err := t.Close(); err != nil && first == nil {
			first = fmt.Errorf("close device %d: %w", id, err)
		}
		delete(r.open, id)
	}
	return first
}

// Run runs the operations in order and stops at the first that fails.
func (r *Runner) Run(ops []Op) error {
	for i, o := range ops {
		if err := r.run(o); err != nil {
			return fmt.Errorf("operation %d of %d: %v: %w", i, len(ops), o, err)
		}
	}
	return nil
}

func (r *Runner) run(o Op) error {
	switch o.Kind {
	case CreateThin:
		if err := r.pool.CreateThin(o.Dev); err != nil {
			return err
		}
		r.sizes[o.Dev] = o.Size
		return nil
	case CreateSnap:
		if err := r.pool.CreateSnap(o.Dev, o.Origin); err != nil {
			return err
		}
		r.sizes[o.Dev] = r.sizes[o.Origin]
		return nil
	case Delete:
		if t := r.open[o.Dev]; t != nil {
			delete(r.open, o.Dev)
			if err := t.Close(); err != nil {
				return err
			}
		}
		delete(r.sizes, o.Dev)
		return r.pool.Delete(o.Dev)
	case Commit:
		return r.pool.Commit()
	case SetTransaction:
		return r.pool.SetTransactionID(o.Old, o.New)
	case Reserve, Release, GrowData, GrowMetadata:
		if err := r.Close(); err != nil {
			return err
		}
		switch o.Kind {
		case Reserve:
			return r.pool.ReserveMetadataSnap()
		case Release:
			return r.pool.ReleaseMetadataSnap()
		case GrowData:
			return r.pool.GrowData(o.Size)
		}
		return r.pool.GrowMetadata(o.Size)
	case Reopen:
		return r.Close()
	}
	t, err := r.Device(o.Dev)
	if err != nil {
		return err
	}
	switch o.Kind {
	case Write:
		return r.write(t, o.Off, o.Len, o.Seed)
	case Scatter:
		for i := int64(0); i < o.Count; i++ {
			if err := r.write(t, o.Off+i*o.Stride, o.Len, o.Seed); err != nil {
				return err
			}
		}
		return nil
	case Discard:
		return t.Discard(o.Off, o.Len)
	case Zero:
		return t.WriteZeroes(o.Off, o.Len)
	case Flush:
		return t.Flush()
	}
	return fmt.Errorf("unknown operation")
}

func (r *Runner) write(t Thin, off, n int64, seed uint32) error {
	for n > 0 {
		p := r.buf[:min(n, int64(len(r.buf)))]
		Fill(p, seed, off)
		if _, err := t.WriteAt(p, off); err != nil {
			return fmt.Errorf("write of %d bytes at %d: %w", len(p), off, err)
		}
		off += int64(len(p))
		n -= int64(len(p))
	}
	return nil
}

// A Job is what the program in the guest is asked to do: activate a pool, run a script, read
// every device named in Sizes (as it is after the script), deactivate.
type Job struct {
	Data, Metadata string // paths of block devices
	DataBytes      int64  // how much of them the pool uses at first
	MetadataBytes  int64
	BlockBytes     int64
	Features       []string
	Sizes          map[uint32]int64 // devices before the script
	Ops            []Op
	Hash           map[uint32]int64 // devices to read afterwards, with their sizes
	Dump           map[uint32]int64 // device -> byte offset of one block to return, for messages
}

// A Report is its answer.
type Report struct {
	Hashes  map[uint32][]uint64 // per block
	Mapped  map[uint32]int64    // blocks, from the device's status line
	Dumps   map[uint32][]byte
	Status  string // the pool's status line at the end
	Seconds float64
}
