package thin

import (
	"bytes"
	"encoding/binary"
	"strings"
	"testing"

	"mica/dev"
	"mica/internal/mutate"
	"mica/pdata/block"
)

// FuzzSuperblock: any block 0 is refused, or opens, or is found wrong; nothing panics or sets
// memory aside that the device could not fill.
func FuzzSuperblock(f *testing.F) { mutate.Fuzz(f, superblockSeeds(f), openSuperblock) }

func TestSuperblockMutated(t *testing.T) {
	mutate.Test(t, "FuzzSuperblock", superblockSeeds(t), mutate.Options{Inputs: 500, MaxBytes: 400, AllocBase: 256 << 20}, openSuperblock)
}

func superblockSeeds(t testing.TB) [][]byte {
	return [][]byte{parseDump(t, workedExample[0].text)[:superblockUsed], make([]byte, superblockUsed)}
}

func openSuperblock(t *testing.T, in []byte) {
	b := make([]byte, block.Size)
	copy(b, in)
	s := DecodeSuperblock(b)
	out := bytes.Clone(b)
	s.Encode(out)
	if !bytes.Equal(out, b) {
		t.Fatal("encoding what was decoded changes the block")
	}
	mem := goldenPool(t)
	block.Seal(b, 0, block.Superblock)
	if _, err := mem.WriteAt(b, 0); err != nil {
		t.Fatal(err)
	}
	if _, err := Check(mem, CheckOptions{}); err != nil {
		t.Fatal(err)
	}
	poke(t, mem)
}

// FuzzOpen changes bytes anywhere in a pool, with right checksums: 4 bytes of input say block,
// offset and value.
func FuzzOpen(f *testing.F) { mutate.Fuzz(f, openSeeds, openChanged) }

func TestOpenMutated(t *testing.T) {
	mutate.Test(t, "FuzzOpen", openSeeds, mutate.Options{Inputs: 700, MaxBytes: 64, AllocBase: 256 << 20}, openChanged)
}

var openSeeds = [][]byte{{1, 0x20, 0, 1}, {2, 0x08, 0, 7, 3, 4, 0, 1}, {7, 0x10, 0, 0xff, 9, 0x10, 0, 0x3c}}

func openChanged(t *testing.T, in []byte) {
	mem := goldenPool(t)
	for ; len(in) >= 4; in = in[4:] {
		g := workedExample[int(in[0])%len(workedExample)]
		patch(t, mem, g.loc, g.kind, func(b []byte) {
			b[4+(int(binary.LittleEndian.Uint16(in[1:])))%(block.Size-4)] = in[3]
		})
	}
	r, err := Check(mem, CheckOptions{})
	if err != nil {
		t.Fatal(err)
	}
	poke(t, mem)
	if !r.Clean() {
		return
	}
	// What passes can be opened, and is still clean after a commit.
	m, err := Open(mem, OpenOptions{})
	if err != nil {
		t.Fatalf("clean, but: %v", err)
	}
	if _, err := m.Commit(nil); err != nil {
		t.Fatal(err)
	}
	if r, err := Check(mem, CheckOptions{}); err != nil || !r.Clean() {
		t.Fatalf("not clean after a commit: %v %v", r.Err(), err)
	}
}

// FuzzRestoreXML: a dump is refused and leaves block 0 zeroed, or makes a clean pool whose dump
// restores to the same pool.
func FuzzRestoreXML(f *testing.F) { mutate.Fuzz(f, xmlSeeds(f), restoreXML) }

func TestRestoreXMLMutated(t *testing.T) {
	mutate.Test(t, "FuzzRestoreXML", xmlSeeds(t), mutate.Options{Inputs: 1500, MaxBytes: 4 << 10, AllocBase: 256 << 20,
		Words: []string{"<device ", "</device>", "<def ", "<ref ", "range_mapping", "single_mapping", "length=", "18446744073709551615", "16777215", "99999999", "<!--", "-->"}}, restoreXML)
}

func xmlSeeds(t testing.TB) [][]byte {
	var b strings.Builder
	if err := Dump(goldenPool(t), &b, DumpOptions{}); err != nil {
		t.Fatal(err)
	}
	return [][]byte{[]byte(dumpOf1x), []byte(b.String()),
		[]byte(`<?xml version="1.0"?><!-- c --><superblock uuid='' time="1" transaction="0" data_block_size="128" nr_data_blocks="9"><device dev_id="1" mapped_blocks="0" transaction="0" creation_time="0" snap_time="0"/></superblock>`)}
}

func restoreXML(t *testing.T, in []byte) {
	mem := dev.NewMem(1 << 20)
	if err := Restore(bytes.NewReader(in), mem, RestoreOptions{}); err != nil {
		if first := readBlock(t, mem, 0); !allZero(first) {
			t.Fatalf("%v, and block 0 is not zero", err)
		}
		return
	}
	r, err := Check(mem, CheckOptions{})
	if err != nil || !r.Clean() || r.Warnings > 0 {
		t.Fatalf("restored, but %v %v", r.Err(), err)
	}
	var xml strings.Builder
	if err := Dump(mem, &xml, DumpOptions{}); err != nil {
		t.Fatal(err)
	}
	again := dev.NewMem(1 << 20)
	if err := Restore(strings.NewReader(xml.String()), again, RestoreOptions{}); err != nil {
		t.Fatalf("the dump of a restored pool: %v", err)
	}
	var second strings.Builder
	if err := Dump(again, &second, DumpOptions{}); err != nil || second.String() != xml.String() {
		t.Fatalf("the second dump differs (%v)", err)
	}
}
