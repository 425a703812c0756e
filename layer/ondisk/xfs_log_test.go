package ondisk

import (
	"encoding/binary"
	"fmt"
	"math/rand"
	"os"
	"testing"
	"time"

	"mica/dev"
)

// A logWriter plays the part of XFS that writes its log.
type logWriter struct {
	t     *testing.T
	rng   *rand.Rand
	d     dev.Device
	size  int64 // sectors
	head  int64 // sector
	round uint32
}

// sector writes one sector of the ring, at a position that may lie beyond its end.
func (w *logWriter) sector(at int64, header bool, back uint32) {
	b, be := make([]byte, xfsSector), binary.BigEndian
	b[40], b[500] = byte(w.rng.Int()), 1
	round := w.round + uint32(at/w.size) - back
	at %= w.size
	if header {
		be.PutUint32(b, xfsRecord)
		be.PutUint32(b[4:], round)
		be.PutUint32(b[8:], 2)
		be.PutUint64(b[16:], uint64(round)<<32|uint64(at))
		be.PutUint32(b[40:], 7)
		be.PutUint32(b[320:], 256<<10)
	} else {
		be.PutUint32(b, round)
	}
	if _, err := w.d.WriteAt(b, at*xfsSector); err != nil {
		w.t.Fatal(err)
	}
}

// record writes a record of n sectors with its header, or leaves it out, as a crash does.
func (w *logWriter) record(n int64, out bool) {
	for i := range n {
		if !out {
			w.sector(w.head+i, i == 0, 0)
		}
	}
	if w.head += n; w.head >= w.size {
		w.head -= w.size
		w.round++
	}
}

// mount clears what is ahead: headers of the round before.
func (w *logWriter) mount() {
	for i := range int64(2<<20) / xfsSector {
		w.sector(w.head+i, true, 1)
	}
}

// readBytes counts what is read.
type readBytes struct {
	dev.Device
	n int64
}

func (d *readBytes) ReadAt(p []byte, off int64) (int, error) {
	d.n += int64(len(p))
	return d.Device.ReadAt(p, off)
}

// TestNewestRecord: where the rounds meet lies the same newest record that a look through all of the log
// finds, after any number of rounds, mounts and crashes, and much less is read for it.
func TestNewestRecord(t *testing.T) {
	seed := time.Now().UnixNano()
	if v := os.Getenv("MICA_SEED"); v != "" {
		fmt.Sscan(v, &seed)
	}
	t.Logf("again with MICA_SEED=%d", seed)
	rng := rand.New(rand.NewSource(seed))
	quick := 0
	for i := range 12 {
		const length = 20 << 20
		f := &readBytes{Device: dev.NewMem(length)}
		w := &logWriter{t: t, rng: rng, d: f, size: length / xfsSector, round: 1}
		w.record(2, false)
		for range rng.Intn(260) {
			w.record(1+rng.Int63n(512), false)
			if rng.Intn(40) == 0 {
				w.mount()
			}
		}
		if i%2 == 0 {
			w.mount()
		}
		if i%3 == 0 { // the last ones were under way
			for range 1 + rng.Intn(7) {
				w.record(1+rng.Int63n(512), rng.Intn(2) == 0)
			}
		}
		l := xfsLog{f, 0, length}
		want := xfsFound{off: -1}
		if err := l.scan(0, length, &want); err != nil {
			t.Fatal(err)
		}
		before := f.n
		got, err := l.newest()
		if err != nil || got != want {
			t.Errorf("case %d, round %d, head %d: found %+v, %v; want %+v", i, w.round, w.head*xfsSector, got, err, want)
		}
		if f.n-before < length/2 {
			quick++
		}
	}
	if quick < 8 {
		t.Errorf("only %d of 12 logs were not read through", quick)
	}
}
