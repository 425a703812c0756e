package fuse

import (
	"runtime"
	"sync"
	"sync/atomic"
)

// A crew is the threads that serve the devices of an exporter, and their buffers. A device takes a
// thread when it has requests and gives it back when there are none for a while, so that what
// an exporter costs depends on how many devices are busy at the same time, not on how many
// there are.
//
// Lock order: a server's mu, then crew.mu.
type crew struct {
	bufs buffers
	late atomic.Int64 // payload bytes of writes that wait for space beyond waiterBytes

	mu    sync.Mutex
	spare []*hand        // guarded by mu; threads that serve nobody, the last one first
	made  int            // guarded by mu; threads that are there, for tests
	ended bool           // guarded by mu
	all   sync.WaitGroup // threads
}

// spareHands is how many threads without work are kept. Each has a buffer of 1 MiB.
const spareHands = 2

// A hand is a goroutine locked to an OS thread, with the buffer that it reads requests to.
type hand struct {
	next chan *server // whom to serve; closed: end
	buf  *buffer      // nil until the first request is read
	pace pace         // of the server at hand
}

// serve lets a thread serve s until there is nothing to do, and then another server.
func (c *crew) serve(s *server) {
	c.mu.Lock()
	if n := len(c.spare); n > 0 {
		h := c.spare[n-1]
		c.spare = c.spare[:n-1]
		c.mu.Unlock()
		h.next <- s
		return
	}
	c.made++
	c.mu.Unlock()
	h := &hand{next: make(chan *server, 1)}
	h.next <- s
	c.all.Add(1)
	go c.work(h)
}

// work is the life of a thread. It ends with the goroutine, because that is never unlocked.
func (c *crew) work(h *hand) {
	defer c.all.Done()
	runtime.LockOSThread()
	for s := range h.next {
		h.pace = pace{}
		s.serve(h)
		if !c.rest(h) {
			break
		}
	}
	if h.buf != nil {
		c.bufs.put(h.buf)
	}
	c.mu.Lock()
	c.made--
	quiet := c.made == len(c.spare)
	c.mu.Unlock()
	if quiet {
		c.bufs.trim()
	}
}

// rest keeps a thread that serves nobody for the next server. False if it is not needed.
func (c *crew) rest(h *hand) bool {
	c.mu.Lock()
	if c.ended || len(c.spare) >= spareHands {
		c.mu.Unlock()
		return false
	}
	c.spare = append(c.spare, h)
	quiet := c.made == len(c.spare)
	c.mu.Unlock()
	if quiet {
		c.bufs.trim()
	}
	return true
}

// close ends the threads; every server has been stopped.
func (c *crew) close() {
	c.mu.Lock()
	if !c.ended {
		c.ended = true
		for _, h := range c.spare {
			close(h.next)
		}
		c.spare = nil
	}
	c.mu.Unlock()
	c.all.Wait()
	c.bufs.trim()
}
