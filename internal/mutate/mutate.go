// Package mutate runs fuzz targets in ordinary tests: a fixed number of inputs, made from the
// target's seeds and its corpus by a seeded generator, so that every run of the tests does some
// fuzzing and a failure can be repeated.
//
//	func FuzzThing(f *testing.F)   { mutate.Fuzz(f, seeds, property) }
//	func TestThingMutated(t *testing.T) { mutate.Test(t, "FuzzThing", seeds, mutate.Options{}, property) }
//
// MICA_MUTATIONS multiplies the number of inputs; MICA_MUTATE_SEED chooses the generator's seed.
package mutate

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime/metrics"
	"strconv"
	"strings"
	"testing"
	"time"
)

// Options of one test. Zero values mean the defaults named.
type Options struct {
	Inputs   int      // how many; 2000. Under the race detector an eighth of that
	MaxBytes int      // longest input; 64 KiB
	Words    []string // that the format has; mixed into the inputs
	// AllocBase and AllocPerByte bound what one input may allocate: base and a number for each
	// byte of input. 0: not looked at. Nothing else may run in the process meanwhile. The runtime counts
	// small objects in batches, so a base of less than 1 MiB is not met.
	AllocBase, AllocPerByte int64
	// Limit is the longest time that one input may take. 10 s, which only a hang takes.
	Limit time.Duration
}

// Fuzz runs property under the fuzzer with seeds.
func Fuzz(f *testing.F, seeds [][]byte, property func(*testing.T, []byte)) {
	for _, s := range seeds {
		f.Add(s)
	}
	f.Fuzz(property)
}

// Test runs property on the seeds, on the corpus in testdata/fuzz/target, and on mutations of both.
func Test(t *testing.T, target string, seeds [][]byte, o Options, property func(*testing.T, []byte)) {
	t.Helper()
	if o.Inputs == 0 {
		o.Inputs = 2000
	}
	if o.MaxBytes == 0 {
		o.MaxBytes = 64 << 10
	}
	if o.Limit == 0 {
		o.Limit = 10 * time.Second
	}
	o.Inputs = max(o.Inputs*times(t)/slower, 1)
	seed := seed(t)
	pool := append(append([][]byte{}, seeds...), corpus(t, target)...)
	if len(pool) == 0 {
		t.Fatal("no seeds")
	}
	r := rand.New(rand.NewPCG(seed, 1))
	for i := range o.Inputs {
		in := pool[i%len(pool)]
		if i >= len(pool) {
			in = Mutate(r, in, pool, o)
		}
		if !one(t, in, o, property) {
			t.Fatalf("input %d of seed %d (MICA_MUTATE_SEED=%d):\ngo test fuzz v1\n[]byte(%q)", i, seed, seed, cut(in))
		}
	}
}

// one runs property on one input in a goroutine of its own, so that a hang is found.
func one(t *testing.T, in []byte, o Options, property func(*testing.T, []byte)) bool {
	t.Helper()
	done := make(chan any, 1)
	before := allocated()
	keep := bytes.Clone(in)
	go func() {
		finished := false
		defer func() {
			v := recover()
			if v == nil && !finished {
				v = "the property ended its goroutine (t.Fatal or t.Skip)"
				if !t.Failed() {
					v = nil
				}
			}
			done <- v
		}()
		property(t, in)
		finished = true
	}()
	timer := time.NewTimer(o.Limit)
	defer timer.Stop()
	select {
	case v := <-done:
		if v != nil {
			t.Errorf("%v", v)
		}
	case <-timer.C:
		t.Errorf("not over after %v", o.Limit)
	}
	if limit := o.AllocBase + o.AllocPerByte*int64(len(in)); limit > 0 && !t.Failed() {
		if n := allocated() - before; n > limit {
			t.Errorf("%d bytes allocated for an input of %d, at most %d", n, len(in), limit)
		}
	}
	if !bytes.Equal(in, keep) {
		t.Errorf("the input was changed")
	}
	return !t.Failed()
}

var sample = []metrics.Sample{{Name: "/gc/heap/allocs:bytes"}}

func allocated() int64 {
	metrics.Read(sample)
	return int64(sample[0].Value.Uint64())
}

func times(t *testing.T) int {
	v := os.Getenv("MICA_MUTATIONS")
	if v == "" {
		return 1
	}
	n, err := strconv.Atoi(v)
	if err != nil || n < 1 {
		t.Fatalf("MICA_MUTATIONS is %q, want a number from 1", v)
	}
	return n
}

func seed(t *testing.T) uint64 {
	if v := os.Getenv("MICA_MUTATE_SEED"); v != "" {
		n, err := strconv.ParseUint(v, 10, 64)
		if err != nil {
			t.Fatalf("MICA_MUTATE_SEED is %q, want a number", v)
		}
		return n
	}
	return uint64(time.Now().UnixNano())
}

func cut(b []byte) []byte {
	const most = 4096
	if len(b) > most {
		return append(bytes.Clone(b[:most]), fmt.Sprintf("... (%d bytes)", len(b))...)
	}
	return b
}

// corpus reads the inputs of one []byte that the fuzzer has kept.
func corpus(t *testing.T, target string) [][]byte {
	t.Helper()
	files, err := filepath.Glob(filepath.Join("testdata", "fuzz", target, "*"))
	if err != nil {
		t.Fatal(err)
	}
	var out [][]byte
	for _, f := range files {
		text, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(text)) {
			q, ok := strings.CutPrefix(strings.TrimSpace(line), "[]byte(")
			if !ok {
				continue
			}
			if s, err := strconv.Unquote(strings.TrimSuffix(q, ")")); err == nil {
				out = append(out, []byte(s))
			}
		}
	}
	return out
}

// Mutate returns a changed copy of in.
func Mutate(r *rand.Rand, in []byte, pool [][]byte, o Options) []byte {
	b := bytes.Clone(in)
	for range 1 + r.IntN(4) {
		b = step(r, b, pool, o)
	}
	return b[:min(len(b), o.MaxBytes)]
}

// Numbers that parsers stumble over.
var numbers = []uint64{0, 1, 2, 127, 128, 255, 256, 511, 512, 4095, 4096, 32767, 32768, 65535, 65536, 1<<31 - 1, 1 << 31, 1<<32 - 1, 1 << 32, 1<<40 + 1, 1<<63 - 1, 1 << 63, 1<<64 - 512, 1<<64 - 1}

func step(r *rand.Rand, b []byte, pool [][]byte, o Options) []byte {
	at := func() int { return r.IntN(len(b) + 1) }
	insert := func(i int, p []byte) []byte {
		return append(append(append([]byte{}, b[:i]...), p...), b[i:]...)
	}
	kind := r.IntN(10)
	if len(b) == 0 {
		kind = 7
	}
	switch kind {
	case 0: // a bit
		b[r.IntN(len(b))] ^= 1 << r.IntN(8)
	case 1: // a byte
		b[r.IntN(len(b))] = byte(r.Uint32())
	case 2: // an end
		b = b[:at()]
	case 3: // a hole
		i := at()
		b = append(b[:i:i], b[min(len(b), i+1+r.IntN(16)):]...)
	case 4: // a piece twice, or many times
		i := at()
		p := b[i:min(len(b), i+1+r.IntN(64))]
		b = insert(at(), bytes.Repeat(p, 1+r.IntN(1+r.IntN(20))))
	case 5, 6: // a number
		n := numbers[r.IntN(len(numbers))] + uint64(r.IntN(3)) - 1
		w := 1 << r.IntN(4)
		if i := r.IntN(len(b)); i+w <= len(b) {
			var e [8]byte
			if r.IntN(2) == 0 {
				binary.BigEndian.PutUint64(e[:], n)
				copy(b[i:i+w], e[8-w:])
			} else {
				binary.LittleEndian.PutUint64(e[:], n)
				copy(b[i:i+w], e[:w])
			}
		}
	case 7: // a word, or a number as text
		w := strconv.FormatUint(numbers[r.IntN(len(numbers))], 10)
		if len(o.Words) > 0 && r.IntN(3) > 0 {
			w = o.Words[r.IntN(len(o.Words))]
		}
		i := at()
		if r.IntN(2) == 0 {
			b = insert(i, []byte(w))
		} else {
			b = append(b[:i:i], append([]byte(w), b[min(len(b), i+len(w)):]...)...)
		}
	case 8: // the end of another
		p := pool[r.IntN(len(pool))]
		b = append(b[:at()], p[min(len(p), r.IntN(len(p)+1)):]...)
	case 9: // two pieces change places
		if len(b) > 8 {
			n := 1 + r.IntN(min(64, len(b)/2))
			i, j := r.IntN(len(b)-n+1), r.IntN(len(b)-n+1)
			p := bytes.Clone(b[i : i+n])
			copy(b[i:], b[j:j+n])
			copy(b[j:], p)
		}
	}
	return b
}
