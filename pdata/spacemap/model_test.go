package spacemap

import (
	"errors"
	"flag"
	"fmt"
	"maps"
	"math/rand"
	"slices"
	"testing"

	"mica/dev"
	"mica/pdata/block"
	"mica/pdata/btree"
	"mica/pdata/txn"
)

var modelSteps = flag.Int("model.steps", 60, "commits of each space map model test")

// TestBitmapWorkedExample holds the bit order against the format description: the byte with
// the counts 0, 1, 2, 3, and the data bitmap of its worked example.
func TestBitmapWorkedExample(t *testing.T) {
	b := make([]byte, block.Size)
	for e, n := range []uint32{0, 1, 2, 3} {
		SetBitmapEntry(b, e, n)
	}
	if b[16] != 0xD8 {
		t.Errorf("counts 0, 1, 2, 3 are %#x, want 0xD8", b[16])
	}
	for e := range 4 {
		SetBitmapEntry(b, e, 700)
		SetBitmapEntry(b, e, uint32(3-e))
	}
	for e := range 4 {
		if got := BitmapEntry(b, e); got != uint8(3-e) {
			t.Errorf("entry %d: %d, want %d", e, got, 3-e)
		}
	}

	c := newCounts("data")
	c.grow(25)
	copy(b[16:], []byte{0xfb, 0x09})
	over := c.decodeBitmap(0, b)
	if !slices.Equal(over, []uint64{0, 2, 3}) {
		t.Errorf("overflow entries of %v, want 0, 2, 3", over)
	}
	for _, o := range over {
		c.load(o, 3)
	}
	for i, want := range []uint32{3, 1, 3, 3, 2, 1, 0} {
		if got := c.Count(uint64(i)); got != want {
			t.Errorf("block %d: count %d, want %d", i, got, want)
		}
	}
	out := make([]byte, block.Size)
	e := c.encodeBitmap(0, out)
	if out[16] != 0xfb || out[17] != 0x09 || e.NrFree != 16314 || e.NoneFreeBefore != 6 {
		t.Errorf("encoded as % x, nr_free %d, none_free_before %d", out[16:18], e.NrFree, e.NoneFreeBefore)
	}
}

func TestIndexLimits(t *testing.T) {
	if EntriesPerBitmap != 16320 || MaxIndexEntries != 255 || MaxMetaBlocks != 4161600 {
		t.Errorf("%d entries, %d bitmaps, %d blocks; want 16320, 255, 4161600", EntriesPerBitmap, MaxIndexEntries, MaxMetaBlocks)
	}
}

// A mapsTest is a metadata and a data map beside plain maps.
type mapsTest struct {
	t    *testing.T
	rng  *rand.Rand
	d    *dev.Mem
	tm   *txn.Manager
	meta *Meta
	data *Data

	mroot, droot Root
	user         map[block.Loc]uint32 // metadata blocks in use that are not the maps' own
	counts       map[uint64]uint32    // data blocks
	reserved     map[uint64]bool
	frozen       map[uint64]bool    // freed since the commit
	kept         map[block.Loc]bool // metadata blocks of the committed state
	pins         []pinned
}

type pinned struct {
	p    *Pin
	kept map[block.Loc]bool
}

func newMapsTest(t *testing.T, seed int64, metaBlocks, dataBlocks uint64) *mapsTest {
	m := &mapsTest{t: t, rng: rand.New(rand.NewSource(seed)), d: dev.NewMem(int64(metaBlocks) * block.Size),
		user: map[block.Loc]uint32{0: 1}, counts: map[uint64]uint32{}, reserved: map[uint64]bool{}, frozen: map[uint64]bool{}}
	m.tm = txn.New(m.d, block.NewCache(m.d, 1<<20))
	var err error
	m.meta, err = FormatMeta(m.tm, metaBlocks)
	m.must(err)
	m.data, err = FormatData(m.tm, dataBlocks)
	m.must(err)
	m.commit()
	return m
}

func (m *mapsTest) must(err error) {
	if err != nil {
		m.t.Helper()
		m.t.Fatal(err)
	}
}

func (m *mapsTest) commit() {
	m.t.Helper()
	var err error
	m.droot, err = m.data.Finish()
	m.must(err)
	m.mroot, err = m.meta.Finish()
	m.must(err)
	if m.meta.Changed() || m.data.Changed() {
		m.t.Fatal("the maps have changes left after Finish")
	}
	m.must(m.tm.Close().Write())
	freed, data := m.meta.CloseTxn(), m.data.CloseTxn()
	m.meta.Committed(freed)
	if len(data) != len(m.frozen) {
		m.t.Fatalf("%d data blocks freed, want %d", len(data), len(m.frozen))
	}
	for _, b := range data {
		if !m.frozen[b] {
			m.t.Fatalf("data block %d is said to be freed", b)
		}
		m.data.Thaw(b, 1)
	}
	clear(m.frozen)
	m.kept = m.used()
}

// used are all metadata blocks of the current state.
func (m *mapsTest) used() map[block.Loc]bool {
	u := map[block.Loc]bool{}
	for b := uint64(0); b < m.meta.Len(); b++ {
		if m.meta.Count(block.Loc(b)) > 0 {
			u[block.Loc(b)] = true
		}
	}
	return u
}

// verify reads both maps from the medium and holds them against the model.
func (m *mapsTest) verify() {
	m.t.Helper()
	tm := txn.New(m.d, block.NewCache(m.d, 1<<20))
	meta, err := OpenMeta(tm, m.mroot, uint64(m.d.Size()/block.Size))
	m.must(err)
	data, err := OpenData(tm, m.droot)
	m.must(err)
	used := uint64(0)
	for b := uint64(0); b < data.c.Len(); b++ {
		want := m.counts[b]
		if got := data.Count(b); got != want {
			m.t.Fatalf("data block %d: count %d on the medium, want %d", b, got, want)
		}
		if want > 0 {
			used++
		}
	}
	if m.droot.NrAllocated != used || data.Space().Mapped != used {
		m.t.Fatalf("data nr_allocated %d, want %d", m.droot.NrAllocated, used)
	}
	// Every metadata block in use is the user's or one of the maps' own, which count 1.
	own := map[block.Loc]uint32{m.mroot.BitmapRoot: 1}
	for i := range meta.index {
		own[meta.index[i].Block]++
	}
	for i := range data.index {
		own[data.index[i].Block]++
	}
	m.nodes(tm, m.mroot.Overflow, overflowSize, own)
	m.nodes(tm, m.droot.Overflow, overflowSize, own)
	m.nodes(tm, m.droot.BitmapRoot, IndexEntrySize, own)
	for b := uint64(0); b < meta.Len(); b++ {
		loc := block.Loc(b)
		want := m.user[loc] + own[loc]
		if got := meta.Count(loc); got != want {
			m.t.Fatalf("metadata block %d: count %d on the medium, want %d (%d by the maps)", b, got, want, own[loc])
		}
		if m.user[loc] > 0 && own[loc] > 0 || own[loc] > 1 {
			m.t.Fatalf("metadata block %d is used twice", b)
		}
	}
	if m.mroot.NrAllocated != meta.Used() {
		m.t.Fatalf("metadata nr_allocated %d, want %d", m.mroot.NrAllocated, meta.Used())
	}
	ib, err := tm.Read(m.mroot.BitmapRoot, block.Index)
	m.must(err)
	for i := len(meta.index); i < MaxIndexEntries; i++ {
		if MetaIndexEntry(ib, i) != (IndexEntry{}) {
			m.t.Fatalf("unused index entry %d is not zero", i)
		}
	}
	for i, e := range append(slices.Clone(meta.index), data.index...) {
		b, err := tm.Read(e.Block, block.Bitmap)
		m.must(err)
		used, first := uint32(0), -1
		for j := range EntriesPerBitmap {
			if BitmapEntry(b, j) != 0 {
				used++
			} else if first < 0 {
				first = j
			}
		}
		if e.NrFree != EntriesPerBitmap-used || first >= 0 && int(e.NoneFreeBefore) > first {
			m.t.Fatalf("index entry %d: nr_free %d none_free_before %d, want %d and at most %d", i, e.NrFree, e.NoneFreeBefore, EntriesPerBitmap-used, first)
		}
	}
}

func (m *mapsTest) nodes(tm *txn.Manager, loc block.Loc, size int, own map[block.Loc]uint32) {
	own[loc]++
	b, err := tm.Read(loc, block.Node)
	m.must(err)
	n, err := btree.ParseNode(b, loc, size)
	m.must(err)
	for i := 0; !n.Leaf() && i < n.Len(); i++ {
		m.nodes(tm, n.Child(i), size, own)
	}
}

// noReuse: a block handed out is free in the committed state and in every pinned one.
func (m *mapsTest) noReuse(loc block.Loc) {
	m.t.Helper()
	if m.kept[loc] {
		m.t.Fatalf("metadata block %d is handed out, the committed state uses it", loc)
	}
	for _, p := range m.pins {
		if p.kept[loc] {
			m.t.Fatalf("metadata block %d is handed out, a pinned state uses it", loc)
		}
	}
}

func (m *mapsTest) metaStep() {
	var have []block.Loc
	for b := range m.user {
		if b != 0 {
			have = append(have, b)
		}
	}
	slices.Sort(have)
	switch n := m.rng.Intn(10); {
	case n < 4 || len(have) == 0:
		if m.meta.Free() < 500 {
			return
		}
		loc, _, err := m.tm.Alloc(block.Node)
		m.must(err)
		m.noReuse(loc)
		m.user[loc] = 1
	case n < 6: // counts above 3, some above 255
		b := have[m.rng.Intn(len(have))]
		for range 1 + m.rng.Intn(5)*m.rng.Intn(60) {
			m.must(m.tm.Inc(b))
			m.user[b]++
		}
	default:
		b := have[m.rng.Intn(len(have))]
		for range min(uint32(1+m.rng.Intn(8)*m.rng.Intn(60)), m.user[b]) {
			m.must(m.tm.Dec(b))
			m.user[b]--
		}
		if m.user[b] == 0 {
			delete(m.user, b)
		}
	}
}

func (m *mapsTest) dataStep() {
	total := m.data.Space().Total
	switch n := m.rng.Intn(10); {
	case n < 4:
		hint, want := uint64(m.rng.Int63n(int64(total+10))), uint64(1+m.rng.Intn(200))
		begin, got := m.data.Alloc(hint, want)
		if got > want {
			m.t.Fatalf("asked for %d blocks, got %d", want, got)
		}
		for b := begin; b < begin+got; b++ {
			if m.counts[b] > 0 || m.reserved[b] || m.frozen[b] {
				m.t.Fatalf("data block %d is handed out: count %d reserved %v freed %v", b, m.counts[b], m.reserved[b], m.frozen[b])
			}
			m.reserved[b] = true
		}
	case n < 6:
		for _, b := range slices.Sorted(maps.Keys(m.reserved)) {
			if m.rng.Intn(4) == 0 {
				m.data.Unreserve(b, 1)
			} else {
				m.must(m.data.Map(b))
				m.counts[b] = 1
			}
			delete(m.reserved, b)
		}
	default:
		have := slices.Sorted(maps.Keys(m.counts))
		for range min(50, len(have)) {
			b := have[m.rng.Intn(len(have))]
			if m.counts[b] == 0 {
				continue // went a moment ago
			}
			if m.rng.Intn(2) == 0 {
				for range 1 + m.rng.Intn(4)*m.rng.Intn(100) {
					m.must(m.data.Inc(b))
					m.counts[b]++
				}
				continue
			}
			for range min(uint32(1+m.rng.Intn(4)*m.rng.Intn(100)), m.counts[b]) {
				m.must(m.data.Dec(b))
				m.counts[b]--
			}
			if m.counts[b] == 0 {
				delete(m.counts, b)
				m.frozen[b] = true
			}
		}
	}
}

// TestSpaceMapsAgainstModel does random operations on both maps, with growth over bitmap
// borders, and reads what each commit has written.
func TestSpaceMapsAgainstModel(t *testing.T) {
	for seed := int64(1); seed <= 4; seed++ {
		t.Run(fmt.Sprint("seed=", seed), func(t *testing.T) {
			t.Parallel()
			m := newMapsTest(t, seed, 3000, 10000)
			for range *modelSteps {
				for range m.rng.Intn(60) {
					m.metaStep()
					m.dataStep()
				}
				switch m.rng.Intn(8) {
				case 0:
					m.data.Grow(m.data.Space().Total + uint64(5000+m.rng.Intn(15000)))
				case 1:
					if m.meta.Len() > 50000 {
						break
					}
					n := m.meta.Len() + uint64(4000+m.rng.Intn(5000))
					m.must(m.d.Resize(int64(n) * block.Size))
					m.meta.Grow(n)
				case 2:
					if len(m.pins) < 3 {
						m.pins = append(m.pins, pinned{m.meta.Pin(), m.kept})
					}
				case 3:
					if len(m.pins) > 0 {
						i := m.rng.Intn(len(m.pins))
						m.meta.Unpin(m.pins[i].p)
						m.pins = append(m.pins[:i], m.pins[i+1:]...)
					}
				}
				m.commit()
				m.verify()
			}
			if m.data.c.Len() < 2*EntriesPerBitmap || m.meta.Len() < EntriesPerBitmap {
				t.Errorf("%d data and %d metadata blocks: growth has not crossed a bitmap", m.data.c.Len(), m.meta.Len())
			}
		})
	}
}

func TestMisuseIsAnError(t *testing.T) {
	m := newMapsTest(t, 1, 100, 100)
	for name, err := range map[string]error{
		"dec of a free data block":       m.data.Dec(5),
		"inc of a free data block":       m.data.Inc(5),
		"map of a block not allocated":   m.data.Map(5),
		"inc beyond the end":             m.data.Inc(100),
		"inc of a free metadata block":   m.meta.Inc(90),
		"inc beyond the metadata device": m.meta.Inc(100),
	} {
		if !errors.Is(err, block.ErrCorrupt) {
			t.Errorf("%s: %v, want ErrCorrupt", name, err)
		}
	}
	if _, err := m.meta.Dec(90); !errors.Is(err, block.ErrCorrupt) {
		t.Errorf("dec of a free metadata block: %v, want ErrCorrupt", err)
	}
	if n := m.data.Count(1000); n != 0 {
		t.Errorf("count beyond the end: %d", n)
	}
}

func TestOutOfMetadataBlocks(t *testing.T) {
	m := newMapsTest(t, 1, 40, 100)
	var err error
	n := 0
	for ; err == nil; n++ {
		_, _, err = m.tm.Alloc(block.Node)
	}
	if !errors.Is(err, ErrNoSpace) || m.meta.Free() != 0 {
		t.Errorf("after %d blocks: %v, %d free; want ErrNoSpace, 0", n, err, m.meta.Free())
	}
	if _, err := m.meta.Finish(); !errors.Is(err, ErrNoSpace) {
		t.Errorf("finish of a full map: %v, want ErrNoSpace", err)
	}
}

// TestAllocPrefersRuns: a long run is found behind a few short ones, and what is left over is
// used in the end.
func TestAllocPrefersRuns(t *testing.T) {
	m := newMapsTest(t, 1, 200, 1000)
	if b, n := m.data.Alloc(0, 1000); b != 0 || n != 1000 {
		t.Fatalf("all of an empty map: [%d, +%d)", b, n)
	}
	for b := uint64(0); b < 20; b += 2 {
		m.data.Unreserve(b, 1)
	}
	m.data.Unreserve(500, 64)
	if b, n := m.data.Alloc(0, 64); b != 500 || n != 64 {
		t.Errorf("64 blocks: [%d, +%d), want [500, +64)", b, n)
	}
	got := uint64(0)
	for {
		_, n := m.data.Alloc(700, 64)
		if n == 0 {
			break
		}
		got += n
	}
	if got != 10 {
		t.Errorf("%d single blocks handed out, want the 10 that were free", got)
	}
}
