package thin

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"mica/dev"
)

// TestXMLAgainstTools: on random pools Dump writes what thin_dump writes, WriteDelta what
// thin_delta writes, and dumps go through both restores and come back the same.
func TestXMLAgainstTools(t *testing.T) {
	for seed := int64(11); seed <= 14; seed++ {
		t.Run(fmt.Sprint("seed=", seed), func(t *testing.T) {
			t.Parallel()
			p := newTestPool(t, seed, 8192, 40000)
			for range 60 {
				p.step()
			}
			p.commit()
			compareXML(t, p)
			p.must(p.m.ReserveMetadataSnap())
			p.commit()
			for range 10 {
				p.step()
			}
			p.commit()
			compareXML(t, p)
			compareHeld(t, p)
			roundTrip(t, p)
		})
	}
}

func compareXML(t *testing.T, p *testPool) {
	t.Helper()
	path := p.file()
	var got bytes.Buffer
	p.must(Dump(p.mem, &got, DumpOptions{}))
	if want, ok := tool(t, "thin_dump", path); ok && !bytes.Equal(got.Bytes(), want) {
		t.Fatalf("Dump differs from thin_dump:\n%s", firstDiff(got.Bytes(), want))
	}
	v := p.m.Pin()
	defer v.Unpin()
	ids := p.committed.ids()
	for range 4 {
		l, r := ids[p.rng.Intn(len(ids))], ids[p.rng.Intn(len(ids))]
		for _, verbose := range []bool{false, true} {
			got.Reset()
			p.must(v.WriteDelta(&got, l, r, DeltaOptions{Verbose: verbose}))
			args := []string{"--snap1", fmt.Sprint(l), "--snap2", fmt.Sprint(r), path}
			if verbose {
				args = append([]string{"--verbose"}, args...)
			}
			if want, ok := tool(t, "thin_delta", args...); ok && !bytes.Equal(got.Bytes(), want) {
				t.Fatalf("WriteDelta %d %d verbose=%v differs from thin_delta:\n%s", l, r, verbose, firstDiff(got.Bytes(), want))
			}
		}
	}
	compareLs(t, p, path)
}

func compareLs(t *testing.T, p *testPool, path string) {
	t.Helper()
	v, err := OpenView(p.mem)
	p.must(err)
	list, err := v.Ls()
	p.must(err)
	var got bytes.Buffer
	for _, l := range list {
		fmt.Fprintln(&got, l.ID, l.Mapped, l.Exclusive, l.Mapped-l.Exclusive, l.TransactionID, l.CreationTime, l.SnapshottedTime)
	}
	out, ok := tool(t, "thin_ls", "--no-headers", "-o", "DEV,MAPPED_BLOCKS,EXCLUSIVE_BLOCKS,SHARED_BLOCKS,TRANSACTION,CREATE_TIME,SNAP_TIME", path)
	if !ok {
		return
	}
	var want bytes.Buffer
	for _, line := range strings.Split(strings.TrimSpace(string(out)), "\n") {
		fmt.Fprintln(&want, strings.Join(strings.Fields(line), " "))
	}
	if !bytes.Equal(got.Bytes(), want.Bytes()) {
		t.Fatalf("Ls differs from thin_ls:\n%s", firstDiff(got.Bytes(), want.Bytes()))
	}
}

func compareHeld(t *testing.T, p *testPool) {
	t.Helper()
	var got bytes.Buffer
	p.must(Dump(p.mem, &got, DumpOptions{MetadataSnap: true}))
	if want, ok := tool(t, "thin_dump", "-m", p.file()); ok && !bytes.Equal(got.Bytes(), want) {
		t.Fatalf("Dump of the metadata snapshot differs from thin_dump -m:\n%s", firstDiff(got.Bytes(), want))
	}
}

// roundTrip restores a dump by ourselves and by thin_restore; both pools hold the same, can be
// changed, and pass both checkers.
func roundTrip(t *testing.T, p *testPool) {
	t.Helper()
	var xml bytes.Buffer
	p.must(Dump(p.mem, &xml, DumpOptions{}))

	ours := dev.NewMem(32 << 20)
	p.must(Restore(bytes.NewReader(xml.Bytes()), ours, RestoreOptions{step: uint64(1 + p.rng.Intn(20000))}))
	r, err := Check(ours, CheckOptions{})
	p.must(err)
	mustClean(t, r)
	path := devFile(t, ours)
	tool(t, "thin_check", path)
	sameDump(t, ours, xml.Bytes())
	changeRestored(t, p, ours)

	in := filepath.Join(t.TempDir(), "xml")
	p.must(os.WriteFile(in, xml.Bytes(), 0o600))
	if _, ok := tool(t, "thin_restore", "-i", in, "-o", path); !ok {
		return
	}
	b, err := os.ReadFile(path)
	p.must(err)
	theirs := dev.NewMem(int64(len(b)))
	_, err = theirs.WriteAt(b, 0)
	p.must(err)
	r, err = Check(theirs, CheckOptions{})
	p.must(err)
	if !r.Clean() {
		var b bytes.Buffer
		r.WriteText(&b)
		t.Fatalf("pool of thin_restore:\n%s", b.String())
	}
	sameDump(t, theirs, xml.Bytes())
	changeRestored(t, p, theirs)
}

func sameDump(t *testing.T, d dev.Device, want []byte) {
	t.Helper()
	var got bytes.Buffer
	if err := Dump(d, &got, DumpOptions{}); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got.Bytes(), want) {
		t.Fatalf("restored pool dumps differently:\n%s", firstDiff(got.Bytes(), want))
	}
}

// changeRestored goes on with a restored pool as with the original.
func changeRestored(t *testing.T, p *testPool, mem *dev.Mem) {
	t.Helper()
	q := &testPool{t: t, rng: p.rng, d: mem, mem: mem, committed: p.committed.clone()}
	q.reopen()
	q.compare()
	for range 20 {
		q.step()
		q.commit()
	}
	q.compare()
	r, err := Check(mem, CheckOptions{})
	q.must(err)
	if !r.Clean() {
		t.Fatal(r.Err())
	}
	q.thinCheck()
}

// firstDiff shows where two texts part.
func firstDiff(got, want []byte) string {
	g, w := strings.Split(string(got), "\n"), strings.Split(string(want), "\n")
	for i := range g {
		if i >= len(w) || g[i] != w[i] {
			return fmt.Sprintf("line %d:\n got %q\nwant %q", i+1, g[i:min(i+3, len(g))], w[min(i, len(w)):min(i+3, len(w))])
		}
	}
	return fmt.Sprintf("got ends at line %d of %d", len(g), len(w))
}

const dumpOf1x = `<superblock uuid="" time="2" transaction="5" version="2" data_block_size="128" nr_data_blocks="100">
  <def name="a">
    <range_mapping origin_begin="0" data_begin="10" length="3" time="0"/>
    <single_mapping origin_block="5" data_block="3" time="1"/>
  </def>
  <!-- shared by both -->
  <device dev_id="1" mapped_blocks="5" transaction="0" creation_time="0" snap_time="2">
    <ref name="a"/>
    <single_mapping origin_block="9" data_block="99" time="2"/>
  </device>
  <device dev_id="2" mapped_blocks="4" transaction="0" creation_time="2" snap_time="2">
    <ref name="a"/>
  </device>
</superblock>`

func TestRestoreExpandsRefs(t *testing.T) {
	mem := dev.NewMem(1 << 20)
	if err := Restore(strings.NewReader(dumpOf1x), mem, RestoreOptions{}); err != nil {
		t.Fatal(err)
	}
	want := `<superblock uuid="" time="2" transaction="5" flags="0" version="2" data_block_size="128" nr_data_blocks="100">
  <device dev_id="1" mapped_blocks="5" transaction="0" creation_time="0" snap_time="2">
    <range_mapping origin_begin="0" data_begin="10" length="3" time="0"/>
    <single_mapping origin_block="5" data_block="3" time="1"/>
    <single_mapping origin_block="9" data_block="99" time="2"/>
  </device>
  <device dev_id="2" mapped_blocks="4" transaction="0" creation_time="2" snap_time="2">
    <range_mapping origin_begin="0" data_begin="10" length="3" time="0"/>
    <single_mapping origin_block="5" data_block="3" time="1"/>
  </device>
</superblock>
`
	sameDump(t, mem, []byte(want))
	r, err := Check(mem, CheckOptions{})
	if err != nil {
		t.Fatal(err)
	}
	mustClean(t, r)
}

func TestRestoreRefuses(t *testing.T) {
	const super = `<superblock uuid="" time="2" transaction="5" flags="0" version="2" data_block_size="128" nr_data_blocks="100">`
	const device = `<device dev_id="1" mapped_blocks="0" transaction="0" creation_time="0" snap_time="2">`
	for _, c := range []struct{ name, in, want string }{
		{"nothing", "", "no <superblock>"},
		{"no XML", "hello", `line 1: unexpected 'h'`},
		{"another root", "<cache/>", "line 1: <cache> where <superblock>"},
		{"cut in a tag", super + "\n<device dev_id=", "line 2: the input ends within a tag"},
		{"cut in a device", super + "\n" + device + "\n", "line 3: the input ends before </device>"},
		{"cut before the end", super + "\n" + device + "</device>", "line 2: the input ends before </superblock>"},
		{"time too large", strings.Replace(super, `time="2"`, `time="16777216"`, 1), `time="16777216"`},
		{"block size", strings.Replace(super, `"128"`, `"100"`, 1), "data block size 51200 bytes"},
		{"no number", strings.Replace(super, `"100"`, `"1x"`, 1), `nr_data_blocks="1x"`},
		{"device twice", super + device + "</device>\n" + device, "line 2: <device>: dev_id 1 twice"},
		{"id of 25 bits", super + strings.Replace(device, `"1"`, `"16777216"`, 1), `dev_id="16777216", want a number of at most 16777215`},
		{"snapshot of the future", super + strings.Replace(device, `snap_time="2"`, `snap_time="3"`, 1), `snap_time="3", want a number of at most 2`},
		{"created after its snapshot", super + strings.Replace(device, `creation_time="0" snap_time="2"`, `creation_time="2" snap_time="1"`, 1), `creation_time="2"`},
		{"unknown attribute", super + strings.Replace(device, `dev_id`, `x="1" dev_id`, 1), `unknown attribute "x"`},
		{"attribute twice", super + strings.Replace(device, `dev_id`, `dev_id="1" dev_id`, 1), "attribute dev_id twice"},
		{"attribute missing", super + strings.Replace(device, `transaction="0" `, ``, 1), "attribute transaction is missing"},
		{"unknown element", super + device + "<mapping/>", "<mapping> inside <device>"},
		{"wrong end", super + device + "</superblock>", "</superblock> inside <device>"},
		{"data block beyond the end", super + device + "\n" + `<single_mapping origin_block="0" data_block="100" time="0"/>`, "line 2: <single_mapping>: data blocks [100, 101) of 100"},
		{"data range beyond the end", super + device + `<range_mapping origin_begin="0" data_begin="99" length="2" time="0"/>`, "data blocks [99, 101) of 100"},
		{"empty range", super + device + `<range_mapping origin_begin="0" data_begin="9" length="0" time="0"/>`, "length 0"},
		{"mapping of the future", super + device + `<single_mapping origin_block="0" data_block="1" time="3"/>`, `time="3"`},
		{"virtual block twice", super + device + `<range_mapping origin_begin="0" data_begin="9" length="5" time="0"/>` + "\n" + `<single_mapping origin_block="4" data_block="1" time="0"/>`, "line 2: <single_mapping>: virtual block 4 of device 1 is mapped twice or out of order"},
		{"beyond 64 bits", super + device + `<range_mapping origin_begin="18446744073709551615" data_begin="9" length="2" time="0"/>`, "2 virtual blocks from 18446744073709551615 on"},
		{"after the last block", super + device + `<single_mapping origin_block="18446744073709551615" data_block="1" time="0"/><single_mapping origin_block="0" data_block="2" time="0"/>`, "twice or out of order"},
		{"unknown ref", super + device + `<ref name="q"/>`, `no def is named "q"`},
		{"two owners of a data block", super + device + `<single_mapping origin_block="0" data_block="1" time="2"/></device>` + "\n" +
			strings.Replace(device, `"1"`, `"2"`, 1) + `<single_mapping origin_block="0" data_block="1" time="0"/>`, "line 2: <single_mapping>: data block 1 is mapped more than once, but a device's times say that it alone has it"},
		{"an owner of a shared data block", super + device + `<single_mapping origin_block="0" data_block="1" time="0"/></device>` + "\n" +
			strings.Replace(device, `"1"`, `"2"`, 1) + `<single_mapping origin_block="0" data_block="1" time="2"/>`, "data block 1 is mapped more than once"},
		{"def twice", super + `<def name="q"></def><def name="q"></def>`, `name "q" twice`},
		{"something after the end", super + "</superblock><device/>", "<device> after </superblock>"},
		{"a huge tag", super + "<device " + strings.Repeat("a", 10000), "a tag of more than 4096 bytes"},
	} {
		t.Run(c.name, func(t *testing.T) {
			mem := dev.NewMem(1 << 20)
			err := Restore(strings.NewReader(c.in), mem, RestoreOptions{})
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v, want %q", err, c.want)
			}
			first := make([]byte, 4096)
			mem.ReadAt(first, 0)
			if !allZero(first) {
				t.Error("block 0 is not zero after a restore that failed")
			}
		})
	}
}

func TestRestoreOverwritesOnlyByForce(t *testing.T) {
	p := newTestPool(t, 1, 256, 100)
	if err := Restore(strings.NewReader(dumpOf1x), p.mem, RestoreOptions{}); !errors.Is(err, ErrExists) {
		t.Fatalf("restore over a pool: %v, want ErrExists", err)
	}
	if err := Restore(strings.NewReader(dumpOf1x+"<x/>"), p.mem, RestoreOptions{Force: true}); err == nil {
		t.Fatal("a broken dump was restored")
	}
	if err := Restore(strings.NewReader(dumpOf1x), p.mem, RestoreOptions{}); err != nil {
		t.Fatalf("restore after a failed one: %v", err)
	}
	tx, blocks := uint64(77), uint64(200)
	if err := Restore(strings.NewReader(dumpOf1x), p.mem, RestoreOptions{Force: true, TransactionID: &tx, DataBlocks: &blocks, DataBlockSize: 1 << 20}); err != nil {
		t.Fatal(err)
	}
	m, err := Open(p.mem, OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if m.TransactionID() != 77 || m.DataBlocks() != 200 || m.DataBlockSize() != 1<<20 {
		t.Errorf("transaction id %d, %d blocks of %d bytes; want the overrides", m.TransactionID(), m.DataBlocks(), m.DataBlockSize())
	}
}

// TestRestoreRunsOut: a device that is too small ends in a clean error at any size.
func TestRestoreRunsOut(t *testing.T) {
	p := newTestPool(t, 3, 8192, 60000)
	p.create(1)
	p.insert(1, 0, 30000, 3)
	for id := DevID(2); id < 20; id++ {
		p.create(id)
	}
	p.commit()
	var xml bytes.Buffer
	p.must(Dump(p.mem, &xml, DumpOptions{}))
	failed, fit := 0, 0
	for blocks := int64(16); blocks < 1024; blocks += blocks / 3 {
		mem := dev.NewMem(blocks * 4096)
		err := Restore(bytes.NewReader(xml.Bytes()), mem, RestoreOptions{step: 10000})
		switch {
		case err == nil:
			fit++
			r, err := Check(mem, CheckOptions{})
			p.must(err)
			mustClean(t, r)
		case errors.Is(err, ErrNoMetaSpace):
			failed++
		default:
			t.Fatalf("%d blocks: %v, want ErrNoMetaSpace", blocks, err)
		}
	}
	if failed == 0 || fit == 0 {
		t.Errorf("%d sizes failed, %d fit: both must occur", failed, fit)
	}
}
