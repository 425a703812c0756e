// Package enginetest is what every engine must do, as tests: the contract of engine.Pool and
// engine.Thin, and the scenarios that those who use thin provisioning in the field test it with.
// engine/user runs it where it is tested, engine/kernel in a machine that has device-mapper.
package enginetest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"mica/dev"
	"mica/engine"
	"mica/thin"
)

// An Engine makes pools of one kind.
type Engine struct {
	Name string
	// New formats an empty pool, closed. What it uses goes with the test.
	New func(t testing.TB, f Format) Store
	// Slow divides the sizes of long scenarios: for a machine in software emulation, or with the
	// race detector. 0 is 1.
	Slow int
}

// Format says what pool to make.
type Format struct {
	BlockSize, DataBytes, MetadataBytes int64
	Faults                              bool // Store.Fail will be called
}

// A Store is one pool, closed or open.
type Store interface {
	Open(o Options) (engine.Pool, error)
	// Metadata opens the metadata device of the closed pool. The caller closes it.
	Metadata(t testing.TB) dev.Device
	// Fail makes writes of metadata fail from now on, or work again.
	Fail(t testing.TB, on bool)
}

// Options are those that engines have in common.
type Options struct {
	ReadOnly       bool
	ErrorIfNoSpace bool
	NoSpaceTimeout time.Duration // 0: 60 s
	LowWaterMark   uint64
}

// A metadataSnapper holds the metadata snapshot for others.
type metadataSnapper interface {
	ReserveMetadataSnap(ctx context.Context) error
	ReleaseMetadataSnap(ctx context.Context) error
}

// Run runs everything.
func Run(t *testing.T, e Engine) {
	e.Slow = max(1, e.Slow)
	for _, c := range []struct {
		name string
		fn   func(*testing.T, Engine)
	}{
		{"device", device}, {"handles", handles}, {"resize", resize}, {"external origin", externalOrigin},
		{"empty thins", emptyThins}, {"ids", ids}, {"errors", errorsOfAdmin}, {"transaction ids", transactionIDs},
		{"block sizes", blockSizes}, {"create and delete", createDelete},
		{"recursive snapshots", recursiveSnapshots}, {"pattern stomping", patternStomping},
		{"snapshots hold prefixes", prefixes}, {"snapshots of one moment", oneMoment}, {"all or none", allOrNone},
		{"delta and usage", deltaAndUsage}, {"readers beside writers", readersBesideWriters},
		{"looks beside commits", looksBesideCommits}, {"trim beside writers", trimBesideWriters},
		{"discards", discards}, {"discards of shared blocks", sharedDiscards}, {"write zeroes", writeZeroes},
		{"out of data space, error", outOfDataErrors}, {"out of data space, queue", outOfDataQueues},
		{"out of data space, time limit", outOfDataTimeout}, {"out of metadata space", outOfMetadata},
		{"low water mark", lowWater}, {"growth", growth}, {"trim", trim},
		{"held root", heldRoot}, {"read-only", readOnly}, {"needs check", needsCheck}, {"close", closing},
	} {
		t.Run(c.name, func(t *testing.T) { c.fn(t, e) })
	}
}

var ctx = context.Background()

const (
	kib = 1 << 10
	mib = 1 << 20
)

// A pool is one store with its open pool. At the end of the test it is closed and checked.
type pool struct {
	testing.TB
	e     Engine
	s     Store
	o     Options
	bs    int64
	p     engine.Pool
	dirty bool // a fault was injected: closing may fail
	open  []engine.Thin
}

// small is a pool of 1,024 blocks of 64 KiB.
var small = Format{BlockSize: 64 * kib, DataBytes: 64 * mib, MetadataBytes: 4 * mib}

func newPool(t *testing.T, e Engine, f Format, o Options) *pool {
	t.Helper()
	p := &pool{TB: t, e: e, s: e.New(t, f), o: o, bs: f.BlockSize}
	p.reopen()
	t.Cleanup(func() {
		p.close()
		p.check()
	})
	return p
}

// reopen opens the pool, and closes it first if it is open.
func (p *pool) reopen() {
	p.Helper()
	p.close()
	var err error
	if p.p, err = p.s.Open(p.o); err != nil {
		p.Fatalf("open the pool: %v", err)
	}
}

func (p *pool) close() {
	p.Helper()
	for _, d := range p.open {
		if err := d.Close(); err != nil && !p.dirty {
			p.Errorf("close thin %d: %v", d.ID(), err)
		}
	}
	p.open = nil
	if p.p == nil {
		return
	}
	err := p.p.Close()
	p.p = nil
	if err != nil && !p.dirty {
		p.Fatalf("close the pool: %v", err)
	}
}

// check looks for damage in the closed pool. The kernel may leave blocks that count as used and
// are not, after a failure.
func (p *pool) check() *thin.Report {
	p.Helper()
	d := p.s.Metadata(p)
	defer d.Close()
	r, err := thin.Check(d, thin.CheckOptions{})
	if err != nil {
		p.Fatalf("check: %v", err)
	}
	if r.Fatals > 0 || r.Leaks > 0 && !p.dirty {
		p.Errorf("the closed pool is damaged: %v", r.Findings)
	}
	return r
}

func (p *pool) must(err error) {
	p.Helper()
	if err != nil {
		p.Fatal(err)
	}
}

func (p *pool) wantErr(err, want error, what string) {
	p.Helper()
	if !errors.Is(err, want) {
		p.Errorf("%s: got %v, want %v", what, err, want)
	}
}

func (p *pool) create(ids ...thin.DevID) {
	p.Helper()
	for _, id := range ids {
		p.must(p.p.CreateThin(ctx, id))
	}
}

func (p *pool) snap(id, origin thin.DevID) {
	p.Helper()
	p.must(p.p.CreateSnap(ctx, id, origin))
}

func (p *pool) remove(id thin.DevID) {
	p.Helper()
	p.must(p.p.Delete(ctx, id))
}

// thin opens a device for writing, until the pool is closed or the device is.
func (p *pool) thin(id thin.DevID, size int64) engine.Thin {
	p.Helper()
	return p.with(id, engine.OpenOptions{SizeBytes: size})
}

func openSize(size int64) engine.OpenOptions { return engine.OpenOptions{SizeBytes: size} }

// view opens it read-only.
func (p *pool) view(id thin.DevID, size int64) engine.Thin {
	p.Helper()
	return p.with(id, engine.OpenOptions{SizeBytes: size, ReadOnly: true})
}

func (p *pool) with(id thin.DevID, o engine.OpenOptions) engine.Thin {
	p.Helper()
	d, err := p.p.Open(ctx, id, o)
	if err != nil {
		p.Fatal(err)
	}
	p.open = append(p.open, d)
	return d
}

// done closes a device before the end of the test.
func (p *pool) done(d engine.Thin) {
	p.Helper()
	p.must(d.Close())
}

func (p *pool) status() engine.Status {
	p.Helper()
	s, err := p.p.Status(ctx)
	p.must(err)
	return s
}

// used is how many data blocks are mapped, everything committed and nothing under way.
func (p *pool) used() uint64 {
	p.Helper()
	p.must(p.p.Commit(ctx))
	return p.status().DataUsed
}

func (p *pool) write(d dev.Device, c byte, n, off int64) {
	p.Helper()
	if _, err := d.WriteAt(bytes.Repeat([]byte{c}, int(n)), off); err != nil {
		p.Fatalf("write %d bytes at %d: %v", n, off, err)
	}
}

// want fails unless n bytes at off are all c.
func (p *pool) want(d dev.Device, c byte, n, off int64) {
	p.Helper()
	b := make([]byte, n)
	if _, err := d.ReadAt(b, off); err != nil {
		p.Fatalf("read %d bytes at %d: %v", n, off, err)
	}
	for i, got := range b {
		if got != c {
			p.Fatalf("byte %d is %#x, want %#x", off+int64(i), got, c)
		}
	}
}

// wantMode waits for a mode: some changes of it come with the next commit.
func (p *pool) wantMode(mode string) {
	p.Helper()
	p.eventually("mode "+mode, func() bool {
		p.p.Commit(ctx)
		return p.status().Mode == mode
	})
}

func (p *pool) eventually(what string, ok func() bool) {
	p.Helper()
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if ok() {
			return
		}
	}
	p.Fatalf("timed out: %s; status %+v", what, p.status())
}

// random is a generator whose seed is printed.
func random(t testing.TB) *rand.Rand {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	return rand.New(rand.NewPCG(seed, 0))
}

func idList(list []thin.DeviceInfo) string {
	s := ""
	for _, d := range list {
		s += fmt.Sprintf("%d ", d.ID)
	}
	return s
}
