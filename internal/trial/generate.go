package trial

import (
	"math/rand/v2"

	"mica/engine/user"
)

// SectorBytes is the unit of histories.
const SectorBytes = 512

// chunk is the unit of sectors in which workers share a device.
const chunk = 8

// A Setup is the shape of a pool and of its load. It prints as Go does, and is part of what
// repeats a run.
type Setup struct {
	BlockSize     int64 // bytes
	DataBlocks    uint64
	MaxDataBlocks uint64 // how far the data device may grow
	MetaBlocks    int64
	MaxMetaBlocks int64
	Workers       int
	Private       int    // slots of each worker
	Shared        int    // slots that all workers write at the same time, each its own sectors
	Sectors       int64  // of a device
	Origin        bool   // all devices lie over an external origin
	Hints         bool   // a discard may do nothing (metadata may run short)
	Jitter        uint64 // not 0: requests of the media take their time, by this seed
	Options       user.Options
}

// slots is the number of all slots: those of worker 0, of worker 1, ..., the shared ones.
func (s *Setup) slots() int { return s.Workers*s.Private + s.Shared }

func (s *Setup) shared(slot int) bool { return slot >= s.Workers*s.Private }

// Generate makes about n operations.
func Generate(rng *rand.Rand, s Setup, n int) Ops {
	var l Ops
	live := make([]map[int]bool, s.Workers)
	for w := range live {
		live[w] = map[int]bool{}
	}
	held := false
	for range n {
		w := rng.IntN(s.Workers)
		o := Op{Worker: w}
		own := func(want bool) (int, bool) { // a random slot of the worker that is live, or is not
			first := rng.IntN(s.Private)
			for i := range s.Private {
				slot := w*s.Private + (first+i)%s.Private
				if live[w][slot] == want {
					return slot, true
				}
			}
			return 0, false
		}
		any := func() (int, bool) { // one to write to
			if s.Shared > 0 && rng.IntN(3) == 0 {
				return s.Workers*s.Private + rng.IntN(s.Shared), true
			}
			return own(true)
		}
		ok := true
		switch rng.IntN(34) {
		case 0, 1:
			if o.Slot, ok = any(); ok {
				o.Kind = Snap
				if o.Other, ok = own(false); ok {
					live[w][o.Other] = true
					if o.Third, _ = own(false); rng.IntN(3) == 0 && o.Third != 0 && !live[w][o.Third] {
						o.Kind = Snap2
						live[w][o.Third] = true
					}
				}
			}
		case 2:
			if o.Slot, ok = own(true); ok && len(live[w]) > 1 {
				o.Kind = Delete
				delete(live[w], o.Slot)
			} else {
				ok = false
			}
		case 3:
			o.Kind = Reopen
			o.Slot, ok = own(true)
		case 4, 5, 6:
			o.Kind = Flush
			o.Slot, ok = any()
		case 7:
			o.Kind = Commit
		case 8:
			o.Kind, o.N = GrowData, 1+rng.Int64N(4)
			ok = rng.IntN(3) == 0 && s.MaxDataBlocks > s.DataBlocks
		case 9:
			o.Kind, o.N = GrowMeta, 1+rng.Int64N(16)
			ok = rng.IntN(3) == 0 && s.MaxMetaBlocks > s.MetaBlocks
		case 10:
			switch rng.IntN(4) {
			case 0:
				o.Kind = TxID
			case 1:
				o.Kind = Trim
			default:
				if o.Kind = Hold; held {
					o.Kind = Unhold
				}
				held = !held
			}
		case 11, 12:
			o.Kind = Read
			s.span(rng, &o, any, &ok)
		case 13, 14:
			o.Kind = Discard
			if o.Slot, ok = own(true); ok {
				s.private(rng, &o)
			}
		case 15:
			o.Kind = Zero
			s.span(rng, &o, any, &ok)
		case 16:
			o.Kind = ZeroKeep
			s.span(rng, &o, any, &ok)
		case 17, 18:
			o.Kind = Peek
			o.Slot = rng.IntN(s.slots())
			o.Off = rng.Int64N(s.Sectors)
			o.N = min(s.Sectors-o.Off, 1+rng.Int64N(200))
		case 19, 20:
			o.Kind = FUA
			s.span(rng, &o, any, &ok)
		default:
			o.Kind = Write
			s.span(rng, &o, any, &ok)
		}
		if !ok || len(live[w]) == 0 {
			o = Op{Worker: w, Kind: Create}
			if o.Slot, ok = own(false); !ok {
				continue
			}
			live[w][o.Slot] = true
		}
		l = append(l, o)
	}
	return l
}

func (s *Setup) span(rng *rand.Rand, o *Op, pick func() (int, bool), ok *bool) {
	if o.Slot, *ok = pick(); !*ok {
		return
	}
	if !s.shared(o.Slot) {
		s.private(rng, o)
		return
	}
	// A part of one of the worker's chunks.
	all := s.Sectors / chunk / int64(s.Workers)
	at := (rng.Int64N(all)*int64(s.Workers) + int64(o.Worker)) * chunk
	from := rng.Int64N(chunk)
	o.Off, o.N = at+from, 1+rng.Int64N(chunk-from)
}

func (s *Setup) private(rng *rand.Rand, o *Op) {
	block := s.BlockSize / SectorBytes
	o.Off = rng.Int64N(s.Sectors)
	o.N = 1 + rng.Int64N(40)
	switch rng.IntN(10) {
	case 0, 1: // a block
		o.Off = o.Off / block * block
		o.N = block
	case 2: // some blocks and parts of others
		o.N = 1 + rng.Int64N(3*block)
	case 3: // a page
		o.Off = o.Off / chunk * chunk
		o.N = chunk
	}
	o.N = min(o.N, s.Sectors-o.Off)
}
