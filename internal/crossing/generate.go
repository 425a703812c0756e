package crossing

import "math/rand/v2"

// A Generator makes random scripts that fit a model, and applies them to it.
type Generator struct {
	Model          *Model
	SizeBytes      int64 // of new devices
	MaxDevs        int
	MaxWrite       int64 // bytes of one write at most
	NoMetadataSnap bool  // scripts hold and release the metadata snapshot themselves
	// NoDelete keeps the devices that exist.
	NoDelete bool
	// NoDiscard is for the kernel with blocks whose size is no power of two: its block layer
	// then cuts discards at places that are no block boundaries, and those blocks stay mapped.
	NoDiscard bool

	rng  *rand.Rand
	next uint32 // next device id
	seed uint32 // last write's seed
}

// NewGenerator returns a generator with a printed seed's random source.
func NewGenerator(m *Model, seed uint64, sizeBytes int64) *Generator {
	return &Generator{Model: m, SizeBytes: sizeBytes, MaxDevs: 8, MaxWrite: 3 * m.BlockBytes,
		rng: rand.New(rand.NewPCG(seed, 0x6d696361))}
}

// Seed returns a number for a write that nobody else uses.
func (g *Generator) Seed() uint32 { g.seed++; return g.seed }

// Script returns n random operations.
func (g *Generator) Script(n int) []Op {
	ops := make([]Op, 0, n)
	for len(ops) < n {
		o := g.op()
		g.Model.Apply(o)
		ops = append(ops, o)
	}
	return ops
}

func (g *Generator) op() Op {
	ids := g.Model.IDs()
	if len(ids) == 0 {
		return g.create()
	}
	dev := ids[g.rng.IntN(len(ids))]
	d := g.Model.Devices[dev]
	switch x := g.rng.IntN(100); {
	case x < 3 && len(ids) < g.MaxDevs:
		return g.create()
	case x < 12 && len(ids) < g.MaxDevs:
		g.next++
		return Op{Kind: CreateSnap, Dev: g.next, Origin: dev}
	case x < 17 && len(ids) > 2 && !g.NoDelete:
		return Op{Kind: Delete, Dev: dev}
	case x < 20:
		old := g.Model.TransactionID
		return Op{Kind: SetTransaction, Old: old, New: old + uint64(g.rng.IntN(5))}
	case x < 22 && !g.NoMetadataSnap:
		if g.Model.Held {
			return Op{Kind: Release}
		}
		return Op{Kind: Reserve}
	case x < 24:
		return Op{Kind: Commit}
	case x < 27:
		return Op{Kind: Flush, Dev: dev}
	case x < 28:
		return Op{Kind: Reopen}
	case x < 40 && !g.NoDiscard:
		off, n := g.extent(d, 12*g.Model.BlockBytes)
		if g.rng.IntN(2) == 0 { // whole blocks, as a file system with large extents discards
			off -= off % g.Model.BlockBytes
			n = min(n+g.Model.BlockBytes, d.SizeBytes-off)
		}
		return Op{Kind: Discard, Dev: dev, Off: off, Len: n}
	case x < 43:
		off, n := g.extent(d, 6*g.Model.BlockBytes)
		return Op{Kind: Zero, Dev: dev, Off: off, Len: n}
	case x < 52: // whole blocks
		b := g.rng.Int64N(d.SizeBytes / g.Model.BlockBytes)
		n := min(1+g.rng.Int64N(3), d.SizeBytes/g.Model.BlockBytes-b)
		return Op{Kind: Write, Dev: dev, Off: b * g.Model.BlockBytes, Len: n * g.Model.BlockBytes, Seed: g.Seed()}
	default:
		off, n := g.extent(d, g.MaxWrite)
		return Op{Kind: Write, Dev: dev, Off: off, Len: n, Seed: g.Seed()}
	}
}

func (g *Generator) create() Op {
	g.next++
	return Op{Kind: CreateThin, Dev: g.next, Size: g.SizeBytes}
}

// extent returns a range of whole sectors in d of up to limit bytes, small ones more often.
func (g *Generator) extent(d *Device, limit int64) (off, n int64) {
	limit >>= g.rng.IntN(8)
	n = SectorSize * (1 + g.rng.Int64N(max(limit/SectorSize, 1)))
	n = min(n, d.SizeBytes)
	off = SectorSize * g.rng.Int64N((d.SizeBytes-n)/SectorSize+1)
	return off, n
}
