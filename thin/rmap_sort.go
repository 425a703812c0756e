package thin

import (
	"bufio"
	"cmp"
	"container/heap"
	"encoding/binary"
	"io"
	"os"
	"slices"
)

// A rmapSorter sorts ranges by data block in bounded memory: what does not fit is written to an
// unnamed temporary file as sorted chunks, which are merged at the end.
type rmapSorter struct {
	limit  int
	held   []RmapRange
	f      *os.File
	size   int64
	chunks []io.SectionReader
}

// rmapRecord is the length of a stored range.
const rmapRecord = 28

func compareRmap(a, b RmapRange) int {
	return cmp.Or(cmp.Compare(a.Begin, b.Begin), cmp.Compare(a.Device, b.Device), cmp.Compare(a.VBegin, b.VBegin))
}

func (s *rmapSorter) add(r RmapRange) error {
	if r.Len == 0 {
		return nil
	}
	if len(s.held) == s.limit {
		if err := s.spill(); err != nil {
			return err
		}
	}
	s.held = append(s.held, r)
	return nil
}

// spill writes the ranges in memory as one more chunk.
func (s *rmapSorter) spill() error {
	if s.f == nil {
		f, err := os.CreateTemp("", "mica-rmap-*")
		if err != nil {
			return err
		}
		s.f = f
		if err := os.Remove(f.Name()); err != nil {
			return err
		}
	}
	slices.SortFunc(s.held, compareRmap)
	w := bufio.NewWriterSize(s.f, 1<<16)
	var b [rmapRecord]byte
	for _, r := range s.held {
		binary.LittleEndian.PutUint64(b[:], uint64(r.Begin))
		binary.LittleEndian.PutUint64(b[8:], r.Len)
		binary.LittleEndian.PutUint32(b[16:], uint32(r.Device))
		binary.LittleEndian.PutUint64(b[20:], uint64(r.VBegin))
		w.Write(b[:]) // an error comes back from Flush
	}
	if err := w.Flush(); err != nil {
		return err
	}
	n := int64(len(s.held)) * rmapRecord
	s.chunks = append(s.chunks, *io.NewSectionReader(s.f, s.size, n))
	s.size += n
	s.held = s.held[:0]
	return nil
}

// each calls fn for all ranges in order.
func (s *rmapSorter) each(fn func(RmapRange) error) error {
	if s.f == nil {
		slices.SortFunc(s.held, compareRmap)
		for _, r := range s.held {
			if err := fn(r); err != nil {
				return err
			}
		}
		return nil
	}
	if err := s.spill(); err != nil {
		return err
	}
	var h rmapHeap
	for i := range s.chunks {
		c := &rmapChunk{r: bufio.NewReaderSize(&s.chunks[i], 1<<14)}
		if ok, err := c.next(); err != nil {
			return err
		} else if ok {
			h = append(h, c)
		}
	}
	heap.Init(&h)
	for len(h) > 0 {
		if err := fn(h[0].now); err != nil {
			return err
		}
		ok, err := h[0].next()
		if err != nil {
			return err
		}
		if ok {
			heap.Fix(&h, 0)
		} else {
			heap.Pop(&h)
		}
	}
	return nil
}

func (s *rmapSorter) close() {
	if s.f != nil {
		s.f.Close()
	}
}

// A rmapChunk is one chunk while it is merged.
type rmapChunk struct {
	r   *bufio.Reader
	now RmapRange
}

func (c *rmapChunk) next() (bool, error) {
	var b [rmapRecord]byte
	if _, err := io.ReadFull(c.r, b[:]); err == io.EOF {
		return false, nil
	} else if err != nil {
		return false, err
	}
	c.now = RmapRange{DataBlock(binary.LittleEndian.Uint64(b[:])), binary.LittleEndian.Uint64(b[8:]),
		DevID(binary.LittleEndian.Uint32(b[16:])), VBlock(binary.LittleEndian.Uint64(b[20:]))}
	return true, nil
}

type rmapHeap []*rmapChunk

func (h rmapHeap) Len() int           { return len(h) }
func (h rmapHeap) Less(i, j int) bool { return compareRmap(h[i].now, h[j].now) < 0 }
func (h rmapHeap) Swap(i, j int)      { h[i], h[j] = h[j], h[i] }
func (h *rmapHeap) Push(x any)        { *h = append(*h, x.(*rmapChunk)) }
func (h *rmapHeap) Pop() any {
	c := (*h)[len(*h)-1]
	*h = (*h)[:len(*h)-1]
	return c
}
