package thin

import (
	"bytes"
	"encoding/binary"
	"strings"
	"testing"

	"mica/dev"
	"mica/pdata/block"
)

// FuzzSuperblock: any block 0 is refused, or opens, or is found wrong; nothing panics or sets
// memory aside that the device could not fill.
func FuzzSuperblock(f *testing.F) {
	f.Add(parseDump(f, workedExample[0].text))
	f.Add(make([]byte, block.Size))
	f.Fuzz(func(t *testing.T, in []byte) {
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
	})
}

// FuzzOpen changes bytes anywhere in a pool, with right checksums: 4 bytes of input say block,
// offset and value.
func FuzzOpen(f *testing.F) {
	f.Add([]byte{1, 0x20, 0, 1})
	f.Add([]byte{2, 0x08, 0, 7, 3, 4, 0, 1})
	f.Add([]byte{7, 0x10, 0, 0xff, 9, 0x10, 0, 0x3c})
	f.Fuzz(func(t *testing.T, in []byte) {
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
	})
}

// FuzzRestoreXML: a dump is refused and leaves block 0 zeroed, or makes a clean pool whose dump
// restores to the same pool.
func FuzzRestoreXML(f *testing.F) {
	f.Add([]byte(dumpOf1x))
	var b strings.Builder
	if err := Dump(goldenPool(f), &b, DumpOptions{}); err != nil {
		f.Fatal(err)
	}
	f.Add([]byte(b.String()))
	f.Add([]byte(`<?xml version="1.0"?><!-- c --><superblock uuid='' time="1" transaction="0" data_block_size="128" nr_data_blocks="9"><device dev_id="1" mapped_blocks="0" transaction="0" creation_time="0" snap_time="0"/></superblock>`))
	f.Fuzz(func(t *testing.T, in []byte) {
		if bytes.Contains(in, []byte("length")) && longRuns(in) {
			t.Skip("runs of a million blocks and more take their time")
		}
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
	})
}

// longRuns reports whether a number of seven digits or more is in the input.
func longRuns(in []byte) bool {
	n := 0
	for _, c := range in {
		if c < '0' || c > '9' {
			n = 0
		} else if n++; n > 6 {
			return true
		}
	}
	return false
}
