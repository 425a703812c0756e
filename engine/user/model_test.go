package user

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"mica/dev"
	"mica/engine"
	"mica/thin"
)

var (
	modelOps  = flag.Int("model.ops", 100_000, "operations of the model test, all configurations together")
	modelSeed = flag.Uint64("model.seed", 0, "seed of the model test, 0: by time")
)

// image is what a device must hold: pages of 4 KiB that are never changed once made, so that a
// snapshot copies pointers only. A nil page is zeros.
type image struct {
	pages  []*[partBytes]byte
	origin []byte // external origin, shown where blocks are not mapped; nil: none
}

func newImage(size int64) *image {
	return &image{pages: make([]*[partBytes]byte, (size+partBytes-1)/partBytes)}
}

func (m *image) clone() *image {
	return &image{pages: append([]*[partBytes]byte(nil), m.pages...)}
}

func (m *image) write(p []byte, off int64) {
	for len(p) > 0 {
		in := off % partBytes
		n := min(int64(len(p)), partBytes-in)
		pg := new([partBytes]byte)
		if old := m.pages[off/partBytes]; old != nil {
			*pg = *old
		}
		copy(pg[in:], p[:n])
		m.pages[off/partBytes] = pg
		p, off = p[n:], off+n
	}
}

func (m *image) zero(off, n int64) {
	for n > 0 {
		c := min(n, partBytes-off%partBytes)
		if c == partBytes {
			m.pages[off/partBytes] = nil
		} else {
			m.write(zeroBuf[:c], off)
		}
		off, n = off+c, n-c
	}
}

func (m *image) read(p []byte, off int64) {
	for len(p) > 0 {
		in := off % partBytes
		n := min(int64(len(p)), partBytes-in)
		if pg := m.pages[off/partBytes]; pg != nil {
			copy(p[:n], pg[in:])
		} else {
			clear(p[:n])
		}
		p, off = p[n:], off+n
	}
}

type modelConfig struct {
	bs      int64
	opts    Options
	weight  int // share of the operations
	devSize int64
}

// TestModel runs random operations on a pool and on a map in memory.
func TestModel(t *testing.T) {
	seed := *modelSeed
	if seed == 0 {
		seed = uint64(time.Now().UnixNano())
	}
	ms := time.Millisecond
	configs := []modelConfig{
		{64 << 10, Options{CommitInterval: ms}, 5, 24*64<<10 + 512},
		{64 << 10, Options{CommitInterval: time.Hour, TableCacheBytes: 1, MaxPending: 20}, 4, 1100 * 64 << 10},
		{64 << 10, Options{NoDiscardPassdown: true}, 3, 24 * 64 << 10},
		{128 << 10, Options{}, 4, 20*128<<10 + 1536},
		{512 << 10, Options{CommitInterval: ms}, 2, 6*512<<10 + 4096},
		{192 << 10, Options{MaxPending: 1}, 2, 10 * 192 << 10},
	}
	total := 0
	for _, c := range configs {
		total += c.weight
	}
	for i, c := range configs {
		t.Run(fmt.Sprintf("%d-bs=%dKiB", i, c.bs>>10), func(t *testing.T) {
			runModel(t, c, *modelOps/slow*c.weight/total+1, seed+uint64(i))
		})
	}
}

type model struct {
	t    *testing.T
	c    modelConfig
	tp   *testPool
	rng  *rand.Rand
	devs map[thin.DevID]*image
	open map[thin.DevID]*Thin
	log  []string
	buf  []byte
	want []byte
	next thin.DevID
}

const modelDevs = 8

func runModel(t *testing.T, c modelConfig, ops int, seed uint64) {
	t.Logf("seed %d, %d operations", seed, ops)
	c.opts.ErrorIfNoSpace = true
	c.opts.Logger = quiet
	blocks := uint64((c.devSize+c.bs-1)/c.bs)*modelDevs + 4
	if c.devSize > 64<<20 {
		blocks = 800
	}
	m := &model{t: t, c: c, rng: rand.New(rand.NewPCG(seed, 1)), devs: map[thin.DevID]*image{}, open: map[thin.DevID]*Thin{},
		tp:  newPool(t, poolSize{bs: c.bs, dataBlocks: blocks, metaBlocks: 2048}, c.opts),
		buf: make([]byte, 4*c.bs), want: make([]byte, 4*c.bs), next: 1}
	defer func() {
		for _, h := range m.open {
			h.Close()
		}
	}()
	for i := range ops {
		what, err := m.step(i)
		if what != "" {
			m.log = append(m.log, fmt.Sprintf("%d %s", i, what))
		}
		if err != nil {
			t.Fatalf("seed %d, operation %d (%s): %v\nlast operations: %q", seed, i, what, err, m.log[max(0, len(m.log)-30):])
		}
	}
	m.verifyAll()
	for id := range m.devs {
		m.closeDev(id)
		must(t, m.tp.p.Delete(ctx, id))
	}
	must(t, m.tp.p.Commit(ctx))
	if s := m.tp.status(); s.DataUsed != 0 || s.DataReserved != 0 || s.DataFreeing != 0 || s.Devices != 0 {
		t.Errorf("after deletion of everything: %+v", s)
	}
	if p := m.tp.p.pending.Load(); p != 0 {
		t.Errorf("%d changes are still admitted", p)
	}
	if host, _ := m.tp.dataMem.HostBytes(); host != 0 && !c.opts.NoDiscardPassdown {
		t.Errorf("after deletion of everything the data device holds %d bytes", host)
	}
}

func (m *model) pick() (thin.DevID, *image) {
	n := m.rng.IntN(len(m.devs))
	for id := thin.DevID(1); ; id++ {
		if d := m.devs[id]; d != nil {
			if n == 0 {
				return id, d
			}
			n--
		}
	}
}

func (m *model) handle(id thin.DevID) (*Thin, error) {
	if h := m.open[id]; h != nil {
		return h, nil
	}
	h, err := m.tp.p.Open(ctx, id, engine.OpenOptions{SizeBytes: m.c.devSize})
	if err != nil {
		return nil, err
	}
	m.open[id] = h.(*Thin)
	return m.open[id], nil
}

func (m *model) closeDev(id thin.DevID) {
	if h := m.open[id]; h != nil {
		must(m.t, h.Close())
		delete(m.open, id)
	}
}

// span picks a range: odd or aligned, mostly small, sometimes several blocks.
func (m *model) span() (off, n int64) {
	size := m.c.devSize
	switch m.rng.IntN(8) {
	case 0, 1, 2:
		n = 1 + m.rng.Int64N(9000)
	case 3, 4:
		n = 4096 * (1 + m.rng.Int64N(4))
	case 5:
		n = m.c.bs
	default:
		n = 1 + m.rng.Int64N(3*m.c.bs)
	}
	n = min(n, size)
	if size > 64<<20 { // a large device: stay in a few places
		off = m.rng.Int64N(6)*181*m.c.bs + m.rng.Int64N(12*m.c.bs)
		off = min(off, size-n)
	} else {
		off = m.rng.Int64N(size - n + 1)
	}
	switch m.rng.IntN(3) {
	case 0:
		off = off &^ 4095
	case 1:
		off = off / m.c.bs * m.c.bs
	}
	return off, n
}

func (m *model) step(i int) (what string, err error) {
	if len(m.devs) == 0 || len(m.devs) < modelDevs && m.rng.IntN(200) == 0 {
		id := m.next
		m.next++
		m.devs[id] = newImage(m.c.devSize)
		return fmt.Sprintf("create %d", id), m.tp.p.CreateThin(ctx, id)
	}
	id, img := m.pick()
	h, err := m.handle(id)
	if err != nil {
		return "open", err
	}
	off, n := m.span()
	switch k := m.rng.IntN(1000); {
	case k < 400:
		what = fmt.Sprintf("write %d: %d +%d", id, off, n)
		p := m.buf[:n]
		switch m.rng.IntN(6) {
		case 0:
			clear(p)
		default:
			for j := range p {
				p[j] = byte(i + j*7 + j>>8)
			}
		}
		if m.rng.IntN(3) == 0 && h.TryWriteAt(p, off) == nil {
			what = "try-" + what
		} else if _, err = h.WriteAt(p, off); err != nil {
			return what, err
		}
		img.write(p, off)
	case k < 640:
		what = fmt.Sprintf("read %d: %d +%d", id, off, n)
		err = m.compare(h, img, off, n)
	case k < 760:
		keep := m.rng.IntN(4) == 0
		what = fmt.Sprintf("zero %d: %d +%d keep=%v", id, off, n, keep)
		err = h.WriteZeroes(off, n, keep)
		img.zero(off, n)
	case k < 850:
		what = fmt.Sprintf("discard %d: %d +%d", id, off, n)
		err = h.Discard(off, n)
		begin, end := (off+m.c.bs-1)/m.c.bs*m.c.bs, (off+n)/m.c.bs*m.c.bs
		if begin < end {
			img.zero(begin, end-begin)
		}
	case k < 890:
		what, err = m.snapshot(id, img)
	case k < 910 && len(m.devs) > 2:
		what = fmt.Sprintf("delete %d", id)
		m.closeDev(id)
		delete(m.devs, id)
		err = m.tp.p.Delete(ctx, id)
	case k < 935:
		what = fmt.Sprintf("flush %d", id)
		err = h.Flush()
	case k < 945:
		what = "commit"
		err = m.tp.p.Commit(ctx)
	case k < 960:
		what = fmt.Sprintf("close %d", id)
		m.closeDev(id)
	case k < 970:
		what = "extents"
		err = m.extents(h, img)
	case k < 972:
		what = "trim"
		_, err = m.tp.p.Trim(ctx)
	case k < 974:
		what = "usage"
		_, err = m.tp.p.Usage(ctx)
	case k < 980:
		what = "status"
		_, err = m.tp.p.Status(ctx)
	case k == 980:
		what = "reopen the pool"
		for id := range m.open {
			m.closeDev(id)
		}
		m.tp.reopen()
		m.verifyAll()
	}
	return what, err
}

func (m *model) snapshot(id thin.DevID, img *image) (string, error) {
	if len(m.devs) >= modelDevs {
		return "", nil
	}
	pairs := []engine.SnapPair{{ID: m.next, Origin: id}}
	imgs := []*image{img.clone()}
	if m.rng.IntN(3) == 0 && len(m.devs) < modelDevs-1 {
		o, oi := m.pick()
		pairs = append(pairs, engine.SnapPair{ID: m.next + 1, Origin: o})
		imgs = append(imgs, oi.clone())
	}
	for i, p := range pairs {
		m.devs[p.ID] = imgs[i]
		m.next++
	}
	return fmt.Sprintf("snapshot %v", pairs), m.tp.p.CreateSnaps(ctx, pairs)
}

func (m *model) compare(h *Thin, img *image, off, n int64) error {
	p, w := m.buf[:n], m.want[:n]
	if m.rng.IntN(3) != 0 || h.TryReadAt(p, off) != nil {
		if _, err := h.ReadAt(p, off); err != nil {
			return err
		}
	}
	img.read(w, off)
	if !bytes.Equal(p, w) {
		for i := range p {
			if p[i] != w[i] {
				return fmt.Errorf("thin %d: byte %d is %#x, want %#x", h.ID(), off+int64(i), p[i], w[i])
			}
		}
	}
	return nil
}

// extents compares what is called zero with the model.
func (m *model) extents(h *Thin, img *image) error {
	for off := int64(0); off < m.c.devSize; {
		es, err := h.Extents(off, m.c.devSize-off)
		if err != nil || len(es) == 0 {
			return fmt.Errorf("extents at %d: %d, %v", off, len(es), err)
		}
		for _, e := range es {
			if e.Off != off || e.Len <= 0 {
				return fmt.Errorf("extent %+v at %d", e, off)
			}
			for p := e.Off / partBytes; e.Zero && p < (e.Off+e.Len)/partBytes; p++ {
				if pg := img.pages[p]; pg != nil && *pg != [partBytes]byte{} {
					return fmt.Errorf("extent %+v is called zero, page %d is not", e, p)
				}
			}
			off += e.Len
		}
	}
	return nil
}

func (m *model) verifyAll() {
	m.t.Helper()
	for id, img := range m.devs {
		h, err := m.handle(id)
		must(m.t, err)
		for off := int64(0); off < m.c.devSize; off += int64(len(m.buf)) {
			if err := m.compare(h, img, off, min(int64(len(m.buf)), m.c.devSize-off)); err != nil {
				m.t.Fatalf("%v\nlast operations: %q", err, m.log[max(0, len(m.log)-30):])
			}
		}
		m.closeDev(id)
	}
}

// TestExternalOriginModel does the same on one device over an external origin that is shorter
// than it, and on its snapshots.
func TestExternalOriginModel(t *testing.T) {
	seed := *modelSeed
	if seed == 0 {
		seed = uint64(time.Now().UnixNano())
	}
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 2))
	const bs, size, originSize = 64 << 10, 20*64<<10 + 512, 9*64<<10 + 5*4096 + 512
	tp := newPool(t, poolSize{bs: bs, dataBlocks: 64}, Options{ErrorIfNoSpace: true})
	origin := dev.NewMem(originSize)
	ob := make([]byte, originSize)
	for i := range ob {
		ob[i] = byte(i*13 + i>>9)
	}
	write(t, origin, ob, 0)
	tp.create(1)
	h := tp.thinWith(1, engine.OpenOptions{SizeBytes: size, ExternalOrigin: origin})
	want := make([]byte, size)
	copy(want, ob)
	p := make([]byte, 3*bs)
	for i := range 4000 {
		n := 1 + rng.Int64N(3*bs)
		off := rng.Int64N(size - n + 1)
		if rng.IntN(2) == 0 {
			off, n = off/bs*bs, (n+bs-1)/bs*bs
			n = min(n, size-off)
		}
		switch rng.IntN(7) {
		case 0, 1:
			for j := range p[:n] {
				p[j] = byte(i + j)
			}
			write(t, h, p[:n], off)
			copy(want[off:], p[:n])
		case 2:
			must(t, h.WriteZeroes(off, n, rng.IntN(2) == 0))
			clear(want[off : off+n])
		case 3:
			if rng.IntN(4) != 0 {
				break
			}
			must(t, h.Discard(off, n))
			begin, end := (off+bs-1)/bs*bs, (off+n)/bs*bs
			for o := begin; o < end; o++ { // the origin shows again
				want[o] = 0
				if o < originSize {
					want[o] = ob[o]
				}
			}
		case 4:
			if rng.IntN(50) == 0 {
				must(t, h.Close())
				tp.reopen()
				h = tp.thinWith(1, engine.OpenOptions{SizeBytes: size, ExternalOrigin: origin})
			}
		case 5:
			if rng.IntN(20) == 0 {
				if err := tp.p.Delete(ctx, 2); err != nil && !errors.Is(err, thin.ErrNotFound) {
					t.Fatal(err)
				}
				tp.snap(2, 1)
			}
		default:
			if got := read(t, h, int(n), off); !bytes.Equal(got, want[off:off+n]) {
				t.Fatalf("seed %d, operation %d: read %d +%d differs", seed, i, off, n)
			}
		}
	}
	if got := read(t, h, size, 0); !bytes.Equal(got, want) {
		t.Fatalf("seed %d: contents differ at the end", seed)
	}
	if got := read(t, origin, originSize, 0); !bytes.Equal(got, ob) {
		t.Fatal("the external origin was changed")
	}
}
