package repair

import (
	"encoding/binary"
	"sync"
	"testing"

	"mica/dev"
	"mica/internal/mutate"
	"mica/pdata/block"
	"mica/thin"
)

// fuzzPool is a small pool with snapshots, of which FuzzRepair changes bytes.
var fuzzPool = sync.OnceValue(func() *dev.Mem {
	p := newPool(quietTB{}, 50, 128, 3000)
	p.must(p.m.CreateThin(1))
	p.write(1, 0, 400, 2)
	p.must(p.m.CreateSnap(2, 1))
	p.write(2, 100, 30, 1)
	p.must(p.m.CreateThin(3))
	p.commit()
	return p.mem
})

// quietTB is for a pool that outlives the test which makes it.
type quietTB struct{ testing.TB }

func (quietTB) Helper()             {}
func (quietTB) Logf(string, ...any) {}
func (quietTB) Fatal(args ...any)   { panic(args) }

var repairSeeds = [][]byte{
	{0, 0, 0x40, 0, 7}, // the superblock
	{0, 0, 0, 0, 0, 9, 0, 16, 0, 200, 5, 0, 20, 0, 255, 12, 1, 8, 0, 0}, // several blocks
	{40, 1, 32, 0, 1, 41, 1, 32, 0, 1},
}

// repairChanged changes bytes anywhere in a pool: five bytes of input say block, whether its
// checksum is made right, offset and value. A repair ends with an error or a sound pool.
func repairChanged(t *testing.T, in []byte) {
	mem := fuzzPool().Clone()
	for ; len(in) >= 5; in = in[5:] {
		loc := block.Loc(in[0]) % block.Loc(mem.Size()/block.Size)
		b := readBlock(t, mem, loc)
		kind, known := block.Identify(b)
		b[4+int(binary.LittleEndian.Uint16(in[2:]))%(block.Size-4)] = in[4]
		if known && in[1]%4 != 0 {
			binary.LittleEndian.PutUint32(b, block.Checksum(b, kind))
		}
		writeBlock(t, mem, loc, b)
	}
	out := dev.NewMem(mem.Size())
	r, err := Repair(mem, out, Options{DataBlockSize: blockSize, DataBytes: 3000 * blockSize})
	if err != nil {
		return
	}
	c, err := thin.Check(out, thin.CheckOptions{})
	if err != nil || !c.Clean() || c.Warnings > 0 {
		t.Fatalf("not clean: %v %v\n%s", c.Err(), err, text(t, r))
	}
	oneWriter(t, out)
}

func FuzzRepair(f *testing.F) { mutate.Fuzz(f, repairSeeds, repairChanged) }

func TestRepairMutated(t *testing.T) {
	mutate.Test(t, "FuzzRepair", repairSeeds, mutate.Options{Inputs: 600 / slow, MaxBytes: 100, AllocBase: 256 << 20}, repairChanged)
}
