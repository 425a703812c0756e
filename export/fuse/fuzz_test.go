package fuse

import (
	"errors"
	"os"
	"testing"

	"mica/dev"
	"mica/internal/mutate"
)

// FuzzRequest gives arbitrary messages to the parser and, if it takes them, to a server.
func FuzzRequest(f *testing.F) { mutate.Fuzz(f, messageSeeds(), dispatchAny(f)) }

// TestRequestMutated is FuzzRequest for a moment. Whatever a message says of sizes, it is served from
// buffers that are there.
func TestRequestMutated(t *testing.T) {
	mutate.Test(t, "FuzzRequest", messageSeeds(), mutate.Options{Inputs: 5000, AllocBase: 4 << 20, AllocPerByte: 32}, dispatchAny(t))
}

func messageSeeds() [][]byte {
	return [][]byte{
		message(opInit, 0, u32(7), u32(44), u32(1<<17), u32(1<<30|1), u32(1<<7), make([]byte, 44)),
		message(opRead, 2, rw(0, 4096)), message(opRead, 2, rw(1<<63, maxIO)), message(opRead, 1, rw(0, 1)),
		message(opWrite, 2, rw(512, 3), "abc"), message(opWrite, 2, rw(1<<64-1, 3), "abc"),
		message(opLookup, 1, "disk\x00"), message(opGetattr, 2, make([]byte, 16)), message(opOpen, 2, u32(2), u32(0)),
		message(opFallocate, 2, u64(1), u64(1<<64-1), u64(1<<64-1), u32(3), u32(0)),
		message(opFallocate, 2, u64(1), u64(4096), u64(1<<64-1), u32(0x10), u32(0)),
		message(opLseek, 2, u64(1), u64(1<<63), u32(3), u32(0)), message(opLseek, 2, u64(1), u64(0), u32(4), u32(0)),
		message(opReaddir, 1, rw(0, 100)), message(opReaddir, 1, rw(1<<64-1, 1<<31)), message(opStatfs, 1),
		message(opForget, 2, u64(1)), message(opInterrupt, 0, u64(1)), message(opDestroy, 0), message(opFsync, 2, make([]byte, 16)),
	}
}

func dispatchAny(f testing.TB) func(*testing.T, []byte) {
	null, err := os.OpenFile("/dev/null", os.O_RDWR, 0)
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { null.Close() })
	o := Options{RunDir: "/nowhere", Logger: quiet()}
	if err := o.check(); err != nil {
		f.Fatal(err)
	}
	const size = 1 << 20
	mem := dev.NewMem(size)
	servers := make([]*server, 0, 3)
	for i, d := range []dev.Device{mem, inline(mem), mem} {
		s, err := newServer(int(null.Fd()), d, i == 2, &o)
		if err != nil {
			f.Fatal(err)
		}
		f.Cleanup(func() { s.close() })
		servers = append(servers, s)
	}
	return func(t *testing.T, msg []byte) {
		if len(msg) > inHeaderLen+writeInLen+maxIO {
			return
		}
		for _, s := range servers {
			b, err := s.bufs.get(maxIO)
			if err != nil {
				t.Fatal(err)
			}
			n := copy(b.in(), msg)
			var r request
			if err := r.parse(b.in()[:n]); err != nil {
				if !errors.Is(err, errMalformed) {
					t.Fatalf("error of another kind: %v", err)
				}
			} else {
				if r.size > maxIO || len(r.data) > n || len(r.name) > n {
					t.Fatalf("out of bounds: %+v", r)
				}
				if b, _ = s.dispatch(&r, b, new(pace), true); b == nil {
					t.Fatal("no buffer to go on with")
				}
				s.workers.Wait()
			}
			s.bufs.put(b)
			if s.bufs.out != 0 || s.held != [2]int{} || s.waiting != [2]int{} {
				t.Fatalf("after %v: %d buffers out, %v bytes held, %v waiting", r.op, s.bufs.out, s.held, s.waiting)
			}
		}
		if mem.Size() != size {
			t.Fatal("the device changed its size")
		}
	}
}
