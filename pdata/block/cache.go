package block

import (
	"fmt"
	"sync"

	"mica/dev"
)

// A Cache reads verified blocks of a device and keeps a bounded number of them. Buffers that it
// hands out are shared and must not be changed.
//
// Blocks that a commit has closed but not yet written are pinned in it (Hold, Drop), so that
// readers find them before the medium has them.
//
// Safe for concurrent use.
type Cache struct {
	d dev.Device

	perMax int // entries a shard may keep
	shards [cacheShards]shard
}

const cacheShards = 16

type shard struct {
	mu   sync.Mutex
	m    map[Loc]*entry // guarded by mu
	ring []*entry       // clock order; guarded by mu
	hand int            // guarded by mu
	held map[Loc]*entry // guarded by mu
}

type entry struct {
	loc  Loc
	kind Kind
	buf  []byte
	used bool
}

// NewCache makes a cache of about bytes over d.
func NewCache(d dev.Device, bytes int64) *Cache {
	c := &Cache{d: d, perMax: max(int(bytes/Size/cacheShards), 8)}
	for i := range c.shards {
		c.shards[i].m = make(map[Loc]*entry)
		c.shards[i].held = make(map[Loc]*entry)
	}
	return c
}

func (c *Cache) shard(loc Loc) *shard { return &c.shards[loc%cacheShards] }

// Read returns the block at loc, verified as kind k. The buffer must not be changed.
func (c *Cache) Read(loc Loc, k Kind) ([]byte, error) {
	s := c.shard(loc)
	s.mu.Lock()
	e := s.held[loc]
	if e == nil {
		e = s.m[loc]
	}
	if e != nil {
		e.used = true
		buf, kind := e.buf, e.kind
		s.mu.Unlock()
		if kind != k {
			return nil, Corruptf(loc, "is used as a %s and as a %s", kind, k)
		}
		return buf, nil
	}
	s.mu.Unlock()
	buf := make([]byte, Size)
	if err := ReadInto(c.d, buf, loc, k); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if h := s.held[loc]; h != nil { // written anew while the old one was read
		return h.buf, nil
	}
	if e := s.m[loc]; e != nil && e.kind == k {
		return e.buf, nil
	}
	s.insertLocked(&entry{loc: loc, kind: k, buf: buf}, c.perMax)
	return buf, nil
}

// ReadInto reads and verifies one block without a cache.
func ReadInto(d dev.Device, buf []byte, loc Loc, k Kind) error {
	if n := Loc(d.Size() / Size); loc >= n {
		return Corruptf(loc, "%s lies beyond the device of %d blocks", k, n)
	}
	if _, err := d.ReadAt(buf[:Size], int64(loc)*Size); err != nil {
		return fmt.Errorf("read metadata block %d: %w", loc, err)
	}
	return Verify(buf, loc, k)
}

func (s *shard) insertLocked(e *entry, limit int) {
	if old := s.m[e.loc]; old != nil {
		old.kind, old.buf, old.used = e.kind, e.buf, true
		return
	}
	if len(s.ring) < limit {
		s.ring = append(s.ring, e)
		s.m[e.loc] = e
		return
	}
	for s.ring[s.hand].used {
		s.ring[s.hand].used = false
		s.hand = (s.hand + 1) % len(s.ring)
	}
	delete(s.m, s.ring[s.hand].loc)
	s.ring[s.hand] = e
	s.m[e.loc] = e
	s.hand = (s.hand + 1) % len(s.ring)
}

// Hold makes buf what Read returns for loc until Drop: a closed block that is not on the medium
// yet. What was cached for loc before is forgotten.
func (c *Cache) Hold(loc Loc, k Kind, buf []byte) {
	s := c.shard(loc)
	s.mu.Lock()
	s.held[loc] = &entry{loc: loc, kind: k, buf: buf}
	s.mu.Unlock()
}

// Drop ends a Hold, after the block was written; it stays in the cache as an ordinary entry.
func (c *Cache) Drop(loc Loc) {
	s := c.shard(loc)
	s.mu.Lock()
	if e := s.held[loc]; e != nil {
		delete(s.held, loc)
		s.insertLocked(e, c.perMax)
	}
	s.mu.Unlock()
}
