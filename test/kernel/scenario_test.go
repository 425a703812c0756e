package kernel

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"mica/dev"
	"mica/internal/crossing"
	"mica/thin"
)

// A scenario is one pool that goes back and forth between the engines. After every phase each
// device's contents are compared with the model as the kernel, mica, and a reader of thin_dump's
// output see them, and both checkers must be content.
type scenario struct {
	t     *testing.T
	rig   *rig
	model *crossing.Model
	gen   *crossing.Generator
	last  string // who wrote last
}

func newScenario(t *testing.T, seed uint64, blockBytes, dataBytes, metadataBytes, deviceBytes int64) *scenario {
	t.Helper()
	r := machine(t)
	r.format(t)
	model := crossing.NewModel(blockBytes, dataBytes, metadataBytes)
	t.Logf("seed %d", seed)
	return &scenario{t: t, rig: r, model: model, gen: crossing.NewGenerator(model, seed, deviceBytes)}
}

// sizes are those of the model's devices.
func sizes(m *crossing.Model) map[uint32]int64 {
	s := map[uint32]int64{}
	for id, d := range m.Devices {
		s[id] = d.SizeBytes
	}
	return s
}

// script collects operations: random ones and chosen ones, in one list that fits the model.
type script struct {
	*crossing.Generator
	ops []crossing.Op
}

// do appends chosen operations.
func (s *script) do(ops ...crossing.Op) {
	s.Model.Apply(ops...)
	s.ops = append(s.ops, ops...)
}

// random appends n random ones.
func (s *script) random(n int) { s.ops = append(s.ops, s.Script(n)...) }

// kernel runs a script on the kernel's engine, then verifies.
func (s *scenario) kernel(write func(*script)) {
	s.t.Helper()
	job := crossing.Job{DataBytes: s.model.DataBytes, MetadataBytes: s.model.MetadataBytes,
		BlockBytes: s.model.BlockBytes, Sizes: sizes(s.model)}
	sc := &script{Generator: s.gen}
	write(sc)
	job.Ops = sc.ops
	s.rig.resize(s.t, s.model.DataBytes, s.model.MetadataBytes)
	report, err := s.rig.kernel(job)
	if err != nil {
		s.t.Fatalf("kernel: %v", err)
	}
	s.last = "kernel"
	s.t.Logf("kernel: %d operations in %.1f s; status %s", len(sc.ops), report.Seconds, report.Status)
	s.verify()
}

// A side is one of mica's engines on the files of the rig.
type side struct {
	name string
	open func(data, metadata string) (hostPool, error)
}

// A hostPool is a pool that mica has open; Close commits.
type hostPool interface {
	crossing.Pool
	Close() error
}

var (
	thinSide = side{"thin", func(data, metadata string) (hostPool, error) { return openThinPool(data, metadata) }}
	userSide = side{"engine/user", func(data, metadata string) (hostPool, error) { return openUserPool(data, metadata) }}
)

// format makes the pool with mica. Without it the kernel formats at its first activation.
func (s *scenario) format() {
	s.t.Helper()
	if err := formatThin(s.rig.data, s.rig.meta, s.model.BlockBytes, s.model.DataBytes, s.model.MetadataBytes); err != nil {
		s.t.Fatal(err)
	}
}

// mica runs a script on one of mica's engines, then verifies.
func (s *scenario) mica(e side, write func(*script)) {
	s.t.Helper()
	begin, existing := time.Now(), sizes(s.model)
	sc := &script{Generator: s.gen}
	write(sc)
	p, err := e.open(s.rig.data, s.rig.meta)
	if err != nil {
		s.t.Fatalf("%s opens the pool: %v", e.name, err)
	}
	r := crossing.NewRunner(p, existing, make([]byte, max(1<<20, s.model.BlockBytes)))
	err = r.Run(sc.ops)
	err = errors.Join(err, r.Close(), p.Close())
	if err != nil {
		s.t.Fatalf("%s: %v", e.name, err)
	}
	s.last = e.name
	s.t.Logf("%s: %d operations in %.1f s", e.name, len(sc.ops), time.Since(begin).Seconds())
	s.verify()
}

// restore writes the metadata anew from a dump of itself, with thin_restore of
// thin-provisioning-tools or with mica's.
func (s *scenario) restore(tool string) {
	s.t.Helper()
	if s.model.Held {
		s.t.Fatal("a dump has no metadata snapshot")
	}
	xml, err := exec.Command("thin_dump", s.rig.meta).Output()
	if err != nil {
		s.t.Fatalf("thin_dump: %v", err)
	}
	if err := errors.Join(os.Truncate(s.rig.meta, 0), os.Truncate(s.rig.meta, s.model.MetadataBytes)); err != nil {
		s.t.Fatal(err)
	}
	if tool == "thin_restore" {
		dump := filepath.Join(s.t.TempDir(), "dump.xml")
		if err := os.WriteFile(dump, xml, 0o600); err != nil {
			s.t.Fatal(err)
		}
		if out, err := exec.Command("thin_restore", "-i", dump, "-o", s.rig.meta).CombinedOutput(); err != nil {
			s.t.Fatalf("thin_restore: %v\n%s", err, out)
		}
	} else {
		f, err := dev.OpenFile(s.rig.meta, dev.OpenOptions{})
		if err != nil {
			s.t.Fatal(err)
		}
		if err := errors.Join(thin.Restore(bytes.NewReader(xml), f, thin.RestoreOptions{}), f.Close()); err != nil {
			s.t.Fatal(err)
		}
	}
	s.last = tool
	s.verify()
}

// verify compares everything with the model after a phase.
func (s *scenario) verify() {
	s.t.Helper()
	begin := time.Now()
	if err := crossing.ThinCheck(s.rig.meta); err != nil {
		s.t.Fatalf("after %s: %v", s.last, err)
	}
	dump, err := crossing.ThinDump(s.rig.meta)
	if err != nil {
		s.t.Fatalf("after %s: %v", s.last, err)
	}
	s.verifyDump(dump)
	s.verifyMetadata(dump)
	s.verifyMica(userSide)
	s.verifyKernel()
	if s.t.Failed() {
		s.t.FailNow()
	}
	s.t.Logf("verified %d devices, %d mapped blocks, in %.1f s", len(s.model.Devices), mappedBlocks(dump), time.Since(begin).Seconds())
}

func mappedBlocks(d *crossing.Dump) (n int64) {
	for _, dev := range d.Devices {
		n += dev.Mapped
	}
	return n
}

// verifyDump compares thin_dump's view: ids, transaction id, mapped blocks, and the contents read
// through its mappings.
func (s *scenario) verifyDump(dump *crossing.Dump) {
	s.t.Helper()
	var ids []uint32
	for _, dev := range dump.Devices {
		ids = append(ids, dev.ID)
	}
	if want := s.model.IDs(); !slices.Equal(ids, want) {
		s.t.Fatalf("after %s: thin_dump has devices %v, want %v", s.last, ids, want)
	}
	if dump.Transaction != s.model.TransactionID || dump.BlockSecs*crossing.SectorSize != s.model.BlockBytes ||
		dump.DataBlocks != s.model.DataBytes/s.model.BlockBytes {
		s.t.Errorf("after %s: thin_dump has transaction %d, block size %d sectors, %d data blocks; want %d, %d bytes, %d bytes of data",
			s.last, dump.Transaction, dump.BlockSecs, dump.DataBlocks, s.model.TransactionID, s.model.BlockBytes, s.model.DataBytes)
	}
	data, err := os.Open(s.rig.data)
	if err != nil {
		s.t.Fatal(err)
	}
	defer data.Close()
	for _, dev := range dump.Devices {
		mapped := map[int64]bool{}
		for _, m := range dev.Mappings {
			for i := int64(0); i < m.Length; i++ {
				mapped[m.Origin+i] = true
			}
		}
		if int64(len(mapped)) != dev.Mapped {
			s.t.Errorf("after %s: device %d maps %d blocks, its details say %d", s.last, dev.ID, len(mapped), dev.Mapped)
		}
		if s.last != "kernel" {
			// mica may map less: it unmaps blocks that became zeros, the kernel never does. What it
			// must map is shown by the contents; from here on this is what is mapped.
			s.model.Devices[dev.ID].Mapped = mapped
		} else if !maps.Equal(mapped, s.model.Devices[dev.ID].Mapped) {
			s.t.Errorf("after %s: device %d maps %d blocks, want %d: %s", s.last, dev.ID, len(mapped),
				len(s.model.Devices[dev.ID].Mapped), firstDifference(mapped, s.model.Devices[dev.ID].Mapped))
		}
		s.compare("thin_dump", dev.ID, crossing.DumpReader{Data: data, BlockBytes: s.model.BlockBytes, Device: dev})
	}
}

func firstDifference(got, want map[int64]bool) string {
	var keys []int64
	for b := range got {
		if !want[b] {
			keys = append(keys, b)
		}
	}
	for b := range want {
		if !got[b] {
			keys = append(keys, b)
		}
	}
	slices.Sort(keys)
	return fmt.Sprintf("block %d mapped: %v", keys[0], got[keys[0]])
}

// compare reads a device whole and compares every byte with the model.
func (s *scenario) compare(reader string, id uint32, r interface {
	ReadAt([]byte, int64) (int, error)
}) {
	s.t.Helper()
	d := s.model.Devices[id]
	got, want := make([]byte, s.model.BlockBytes), make([]byte, s.model.BlockBytes)
	for off := int64(0); off < d.SizeBytes; off += s.model.BlockBytes {
		n := min(s.model.BlockBytes, d.SizeBytes-off)
		if _, err := r.ReadAt(got[:n], off); err != nil {
			s.t.Errorf("after %s: %s reads device %d at %d: %v", s.last, reader, id, off, err)
			return
		}
		d.Read(want[:n], off)
		if string(got[:n]) != string(want[:n]) {
			s.reportBlock(reader, id, off, got[:n], want[:n])
			return
		}
	}
}

// reportBlock names the first wrong sector of a block.
func (s *scenario) reportBlock(reader string, id uint32, off int64, got, want []byte) {
	s.t.Helper()
	for i := 0; i < len(want); i += crossing.SectorSize {
		g, w := got[i:i+crossing.SectorSize], want[i:i+crossing.SectorSize]
		if string(g) != string(w) {
			s.t.Errorf("after %s: %s reads device %d block %d sector %d: got %s, want %s", s.last, reader, id,
				off/s.model.BlockBytes, (off+int64(i))/crossing.SectorSize, crossing.Describe(g), crossing.Describe(w))
			return
		}
	}
}

// verifyMetadata compares what mica reads in the metadata with thin_dump: every mapping with its
// time, every detail.
func (s *scenario) verifyMetadata(dump *crossing.Dump) {
	s.t.Helper()
	f, err := dev.OpenFile(s.rig.meta, dev.OpenOptions{ReadOnly: true})
	if err != nil {
		s.t.Fatal(err)
	}
	m, err := thin.Open(f, thin.OpenOptions{ReadOnly: true})
	if err != nil {
		s.t.Fatalf("after %s: mica opens the metadata: %v", s.last, err)
	}
	defer m.Close()
	rep, err := thin.Check(f, thin.CheckOptions{})
	if err != nil {
		s.t.Fatalf("after %s: check: %v", s.last, err)
	}
	// The kernel may leave a block that was allocated and never mapped. mica may not. thin_restore
	// 0.9 leaves a wrong hint in the metadata space map, which is worth a warning.
	if rep.Fatals > 0 || rep.Warnings > 0 && s.last != "thin_restore" || rep.Leaks > 0 && s.last != "kernel" {
		var text strings.Builder
		rep.WriteText(&text)
		s.t.Errorf("after %s: check found:\n%s", s.last, text.String())
	}
	var xml bytes.Buffer
	if err := thin.Dump(f, &xml, thin.DumpOptions{}); err != nil {
		s.t.Fatalf("after %s: dump: %v", s.last, err)
	}
	if ours, err := crossing.ParseDump(xml.Bytes()); err != nil {
		s.t.Errorf("after %s: our dump: %v", s.last, err)
	} else if d := cmp.Diff(dump, ours); d != "" {
		s.t.Errorf("after %s: thin_dump and we differ (-thin_dump +mica):\n%s", s.last, d)
	}
	if (m.HeldRoot() != 0) != s.model.Held || m.TransactionID() != dump.Transaction || m.Time() != dump.Time {
		s.t.Errorf("after %s: mica reads held root %d, transaction %d, time %d; want held %v, %d, %d",
			s.last, m.HeldRoot(), m.TransactionID(), m.Time(), s.model.Held, dump.Transaction, dump.Time)
	}
	v := m.Pin()
	defer v.Unpin()
	list, err := v.Devices()
	if err != nil || len(list) != len(dump.Devices) {
		s.t.Fatalf("after %s: mica lists %d devices (%v), want %d", s.last, len(list), err, len(dump.Devices))
	}
	for i, d := range dump.Devices {
		want := thin.DeviceInfo{ID: thin.DevID(d.ID), Details: thin.Details{MappedBlocks: uint64(d.Mapped),
			TransactionID: d.Transaction, CreationTime: d.Created, SnapshottedTime: d.SnapTime}}
		if list[i] != want {
			s.t.Errorf("after %s: mica reads %+v, want %+v", s.last, list[i], want)
		}
		var entries []thin.Entry
		for _, r := range d.Mappings {
			for k := int64(0); k < r.Length; k++ {
				entries = append(entries, thin.Entry{VBlock: thin.VBlock(r.Origin + k),
					Mapping: thin.Mapping{Block: thin.DataBlock(r.Data + k), Time: r.Time}})
			}
		}
		n := 0
		err := v.Walk(want.ID, 0, func(e thin.Entry) bool {
			if n >= len(entries) || e != entries[n] {
				s.t.Errorf("after %s: device %d entry %d: mica reads %+v, thin_dump otherwise", s.last, d.ID, n, e)
				return false
			}
			n++
			return true
		})
		if err != nil || n != len(entries) {
			s.t.Errorf("after %s: device %d: mica walks %d mappings (%v), thin_dump has %d", s.last, d.ID, n, err, len(entries))
		}
	}
}

// verifyMica has one of mica's engines read every device.
func (s *scenario) verifyMica(e side) {
	s.t.Helper()
	p, err := e.open(s.rig.data, s.rig.meta)
	if err != nil {
		s.t.Fatalf("after %s: %s opens the pool: %v", s.last, e.name, err)
	}
	for _, id := range s.model.IDs() {
		d, err := p.Open(id, s.model.Devices[id].SizeBytes)
		if err != nil {
			s.t.Fatalf("after %s: %s opens device %d: %v", s.last, e.name, id, err)
		}
		s.compare(e.name, id, d)
		if err := d.Close(); err != nil {
			s.t.Error(err)
		}
	}
	if err := p.Close(); err != nil {
		s.t.Fatalf("after %s: %s closes the pool: %v", s.last, e.name, err)
	}
}

// verifyKernel has the kernel read every device and compares block hashes.
func (s *scenario) verifyKernel() {
	s.t.Helper()
	s.rig.resize(s.t, s.model.DataBytes, s.model.MetadataBytes)
	job := crossing.Job{DataBytes: s.model.DataBytes, MetadataBytes: s.model.MetadataBytes,
		BlockBytes: s.model.BlockBytes, Sizes: sizes(s.model), Hash: sizes(s.model)}
	report, err := s.rig.kernel(job)
	if err != nil {
		s.t.Fatalf("after %s: kernel activates and reads the pool: %v", s.last, err)
	}
	buf := make([]byte, max(1<<20, s.model.BlockBytes))
	for _, id := range s.model.IDs() {
		d := s.model.Devices[id]
		want, err := crossing.HashBlocks(d, d.SizeBytes, s.model.BlockBytes, buf)
		if err != nil {
			s.t.Fatal(err)
		}
		got := report.Hashes[id]
		if len(got) != len(want) {
			s.t.Errorf("after %s: kernel reads %d blocks of device %d, want %d", s.last, len(got), id, len(want))
			continue
		}
		for b := range want {
			if got[b] == want[b] {
				continue
			}
			off := int64(b) * s.model.BlockBytes
			job.Dump = map[uint32]int64{id: off}
			job.Hash = map[uint32]int64{id: d.SizeBytes}
			again, err := s.rig.kernel(job)
			if err != nil {
				s.t.Errorf("after %s: device %d block %d differs as the kernel reads it (%v)", s.last, id, b, err)
				break
			}
			block := make([]byte, len(again.Dumps[id]))
			d.Read(block, off)
			s.reportBlock("kernel", id, off, again.Dumps[id], block)
			break
		}
	}
}
