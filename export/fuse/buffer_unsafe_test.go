package fuse

import (
	"encoding/binary"
	"os"
	"testing"
	"unsafe"
)

// TestReadBuffersAreResident: no page of a buffer that the kernel copies requests to has to be
// faulted in. A process that is killed during such a fault loses the request.
func TestReadBuffersAreResident(t *testing.T) {
	var p buffers
	b, err := p.get(maxIO)
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.Open("/proc/self/pagemap")
	if err != nil {
		t.Skipf("SKIPPED: no /proc/self/pagemap here: %v", err)
	}
	defer f.Close()
	pages := make([]byte, 8*len(b.mem)/4096)
	if _, err := f.ReadAt(pages, int64(uintptr(unsafe.Pointer(&b.mem[0]))/4096*8)); err != nil {
		t.Fatal(err)
	}
	absent := 0
	for i := 0; i < len(pages); i += 8 {
		if binary.LittleEndian.Uint64(pages[i:])>>63 == 0 {
			absent++
		}
	}
	if absent > 0 {
		t.Errorf("%d of %d pages of a new buffer are not in memory", absent, len(pages)/8)
	}
	p.put(b)
	p.trim()
}
