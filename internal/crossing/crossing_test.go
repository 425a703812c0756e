package crossing

import (
	"bytes"
	"maps"
	"testing"
)

// memPool runs scripts on plain memory in the most obvious way, beside the model.
type memPool struct {
	block int64
	tid   uint64
	held  bool
	devs  map[uint32][]byte
	sizes map[uint32]int64
}

func (p *memPool) CreateThin(id uint32) error { p.devs[id] = nil; return nil }
func (p *memPool) CreateSnap(id, origin uint32) error {
	p.devs[id] = bytes.Clone(p.devs[origin])
	return nil
}
func (p *memPool) Delete(id uint32) error { delete(p.devs, id); return nil }
func (p *memPool) SetTransactionID(_, next uint64) error {
	p.tid = next
	return nil
}
func (p *memPool) ReserveMetadataSnap() error { p.held = true; return nil }
func (p *memPool) ReleaseMetadataSnap() error { p.held = false; return nil }
func (p *memPool) Commit() error              { return nil }
func (p *memPool) GrowData(int64) error       { return nil }
func (p *memPool) GrowMetadata(int64) error   { return nil }
func (p *memPool) Open(id uint32, size int64) (Thin, error) {
	if p.devs[id] == nil {
		p.devs[id] = make([]byte, size)
	}
	return memThin{p, id}, nil
}

type memThin struct {
	p  *memPool
	id uint32
}

func (t memThin) ReadAt(b []byte, off int64) (int, error)  { return copy(b, t.p.devs[t.id][off:]), nil }
func (t memThin) WriteAt(b []byte, off int64) (int, error) { return copy(t.p.devs[t.id][off:], b), nil }
func (t memThin) Flush() error                             { return nil }
func (t memThin) Close() error                             { return nil }
func (t memThin) WriteZeroes(off, n int64) error {
	clear(t.p.devs[t.id][off : off+n])
	return nil
}

func (t memThin) Discard(off, n int64) error {
	first, last := (off+t.p.block-1)/t.p.block, (off+n)/t.p.block
	if first < last {
		clear(t.p.devs[t.id][first*t.p.block : last*t.p.block])
	}
	return nil
}

// TestRunnerAgreesWithModel: script, runner and model mean the same.
func TestRunnerAgreesWithModel(t *testing.T) {
	const block, size = 64 << 10, 1 << 20
	for seed := uint64(1); seed <= 20; seed++ {
		m := NewModel(block, 1<<30, 1<<22)
		ops := NewGenerator(m, seed, size).Script(300)
		p := &memPool{block: block, devs: map[uint32][]byte{}}
		r := NewRunner(p, nil, make([]byte, 40<<10))
		if err := r.Run(ops); err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
		if p.tid != m.TransactionID || p.held != m.Held {
			t.Errorf("seed %d: transaction id %d held %v, want %d %v", seed, p.tid, p.held, m.TransactionID, m.Held)
		}
		want := make([]byte, size)
		for id, d := range m.Devices {
			d.Read(want, 0)
			got := p.devs[id]
			if got == nil {
				got = make([]byte, size)
			}
			if !bytes.Equal(got, want) {
				t.Fatalf("seed %d: device %d differs", seed, id)
			}
		}
		if err := r.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

func TestScriptsCoverEverything(t *testing.T) {
	m := NewModel(64<<10, 1<<30, 1<<22)
	kinds := map[string]int{}
	for _, o := range NewGenerator(m, 1, 1<<20).Script(1000) {
		kinds[o.Kind]++
	}
	for _, k := range []string{CreateThin, CreateSnap, Delete, Write, Discard, Zero, Flush, Commit, SetTransaction, Reserve, Release, Reopen} {
		if kinds[k] < 3 {
			t.Errorf("%s %d times in 1000 operations", k, kinds[k])
		}
	}
}

func TestDescribe(t *testing.T) {
	p := make([]byte, 2*SectorSize)
	Fill(p, 9, 5*SectorSize)
	for _, c := range []struct {
		sector []byte
		want   string
	}{
		{p[SectorSize:], "write 9 of sector 6"},
		{make([]byte, SectorSize), "zeros"},
	} {
		if got := Describe(c.sector); got != c.want {
			t.Errorf("got %q, want %q", got, c.want)
		}
	}
	p[100] ^= 1
	if got := Describe(p[:SectorSize]); got == "write 9 of sector 5" {
		t.Error("a damaged sector passes for a whole one")
	}
}

func TestParseDump(t *testing.T) {
	d, err := ParseDump([]byte(`<superblock uuid="" time="2" transaction="5" flags="0" version="2" data_block_size="128" nr_data_blocks="25">
  <device dev_id="1" mapped_blocks="4" transaction="0" creation_time="1" snap_time="1">
    <range_mapping origin_begin="0" data_begin="0" length="3" time="0"/>
    <single_mapping origin_block="5" data_block="3" time="1"/>
  </device>
  <device dev_id="2" mapped_blocks="0" transaction="0" creation_time="2" snap_time="2">
  </device>
</superblock>`))
	if err != nil {
		t.Fatal(err)
	}
	if d.Transaction != 5 || d.DataBlocks != 25 || len(d.Devices) != 2 || d.Devices[0].Mapped != 4 || d.Devices[1].SnapTime != 2 {
		t.Errorf("got %+v", d)
	}
	if dev, ok := d.Device(1); !ok || len(dev.Mappings) != 2 || dev.Mappings[1] != (DumpRun{5, 3, 1, 1}) {
		t.Errorf("got %+v", dev)
	}
	// Through the mappings: virtual blocks 0..2 are data blocks 0..2, 3 and 4 zeros, 5 is 3.
	data := make([]byte, 4*2)
	for i := range data {
		data[i] = byte(i + 1)
	}
	got := make([]byte, 12)
	dev, _ := d.Device(1)
	if _, err := (DumpReader{Data: bytes.NewReader(data), BlockBytes: 2, Device: dev}).ReadAt(got, 0); err != nil {
		t.Fatal(err)
	}
	if want := []byte{1, 2, 3, 4, 5, 6, 0, 0, 0, 0, 7, 8}; !bytes.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

func TestSnapshotIsIndependentInTheModel(t *testing.T) {
	m := NewModel(1024, 0, 0)
	m.Apply(Op{Kind: CreateThin, Dev: 1, Size: 4096}, Op{Kind: Write, Dev: 1, Off: 0, Len: 512, Seed: 1},
		Op{Kind: CreateSnap, Dev: 2, Origin: 1}, Op{Kind: Write, Dev: 1, Off: 2048, Len: 1024, Seed: 2},
		Op{Kind: Discard, Dev: 2, Off: 0, Len: 1536})
	if !maps.Equal(m.Devices[1].Mapped, map[int64]bool{0: true, 2: true}) || len(m.Devices[2].Mapped) != 0 {
		t.Errorf("got %v and %v", m.Devices[1].Mapped, m.Devices[2].Mapped)
	}
	if m.Devices[2].Seeds[0] != 0 || m.Devices[1].Seeds[0] != 1 {
		t.Error("a discard of the snapshot reached the origin")
	}
}
