package thin

import (
	"fmt"
	"io"
	"math/rand"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"mica/dev"
)

// bigPool makes a pool file with two devices of half the mappings each, in runs of random
// length, and a snapshot of each that has changed in a tenth of its blocks.
func bigPool(b testing.TB, mappings int) string {
	b.Helper()
	dir := "/dev/shm"
	if _, err := os.Stat(dir); err != nil {
		dir = ""
	}
	dir, err := os.MkdirTemp(dir, "mica-bench-*")
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { os.RemoveAll(dir) })
	path := filepath.Join(dir, "meta")
	mem := dev.NewMem(int64(mappings/60+4096) * 4096)
	p := newTestPoolOn(quiet{b}, 1, mem, mem, uint64(2*mappings))
	p.rng = rand.New(rand.NewSource(1))
	next := DataBlock(0)
	fill := func(id DevID, vb VBlock, n int) {
		var es []Entry
		for range n {
			r, ok := p.m.AllocData(next, 1)
			if !ok {
				b.Fatal("no data block")
			}
			next = r.Begin + 1
			if p.rng.Intn(20) == 0 {
				next += DataBlock(p.rng.Intn(8))
				vb += VBlock(p.rng.Intn(8))
			}
			es = append(es, Entry{vb, Mapping{r.Begin, p.m.Time()}})
			vb++
		}
		p.must(p.m.Insert(id, es))
	}
	for id := DevID(1); id <= 2; id++ {
		p.must(p.m.CreateThin(id))
		for i := 0; i < mappings/2; i += 10000 {
			fill(id, VBlock(2*i), 10000)
			_, err := p.m.Commit(nil)
			p.must(err)
		}
		p.must(p.m.CreateSnap(id+10, id))
		for i := 0; i < mappings/2; i += 10000 {
			fill(id+10, VBlock(2*i), 100)
		}
		_, err := p.m.Commit(nil)
		p.must(err)
	}
	buf := make([]byte, mem.Size())
	if _, err := mem.ReadAt(buf, 0); err != nil {
		b.Fatal(err)
	}
	p.must(os.WriteFile(path, buf, 0o600))
	return path
}

// quiet is a testing.TB whose Helper costs nothing in inner loops.
type quiet struct{ testing.TB }

func (quiet) Helper() {}

func openBench(b testing.TB, path string) dev.Device {
	d, err := dev.OpenFile(path, dev.OpenOptions{ReadOnly: true})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { d.Close() })
	return d
}

// BenchmarkAgainstTools runs check and dump beside thin-provisioning-tools on the same file and
// reports how much longer the tool takes.
func BenchmarkAgainstTools(b *testing.B) {
	for _, n := range []int{2000000} {
		path := bigPool(b, n)
		d := openBench(b, path)
		for _, c := range []struct {
			name string
			ours func() error
			tool []string
		}{
			{"check", func() error {
				r, err := Check(d, CheckOptions{})
				if err == nil {
					err = r.Err()
				}
				return err
			}, []string{"thin_check", "-q", path}},
			{"dump", func() error { return Dump(d, io.Discard, DumpOptions{}) }, []string{"thin_dump", path}},
			{"ls", func() error {
				v, err := OpenView(d)
				if err == nil {
					_, err = v.Ls()
				}
				return err
			}, []string{"thin_ls", "-o", "DEV,EXCLUSIVE", path}},
			{"delta", func() error {
				v, err := OpenView(d)
				if err == nil {
					err = v.WriteDelta(io.Discard, 1, 11, DeltaOptions{})
				}
				return err
			}, []string{"thin_delta", "--snap1", "1", "--snap2", "11", path}},
		} {
			b.Run(fmt.Sprintf("op=%s/mappings=%d", c.name, n), func(b *testing.B) {
				b.ReportAllocs()
				for b.Loop() {
					if err := c.ours(); err != nil {
						b.Fatal(err)
					}
				}
				ours := b.Elapsed() / time.Duration(b.N)
				if _, err := exec.LookPath(c.tool[0]); err != nil {
					b.Logf("%s is not installed: no comparison", c.tool[0])
					return
				}
				begin := time.Now()
				if out, err := exec.Command(c.tool[0], c.tool[1:]...).Output(); err != nil {
					b.Fatalf("%s: %v\n%.200s", strings.Join(c.tool, " "), err, out)
				}
				b.ReportMetric(float64(time.Since(begin))/float64(ours), "x-tool")
			})
		}
	}
}

// BenchmarkOpen is what a start of the engine costs.
func BenchmarkOpen(b *testing.B) {
	d := openBench(b, bigPool(b, 1000000))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := Open(d, OpenOptions{ReadOnly: true}); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkInsert maps fresh blocks, with a commit every 4096.
func BenchmarkInsert(b *testing.B) {
	for _, order := range []string{"sequential", "random"} {
		b.Run("order="+order, func(b *testing.B) {
			mem := dev.NewMem(1 << 30)
			p := newTestPoolOn(quiet{b}, 1, mem, mem, 20000000)
			p.must(p.m.CreateThin(1))
			var es []Entry
			vb, done := VBlock(0), 0
			b.ReportAllocs()
			for b.Loop() {
				r, _ := p.m.AllocData(DataBlock(done), 1)
				if done++; order == "random" {
					vb = VBlock(uint64(done) * 0x9E3779B97F4A7C15 >> 40)
					es = append(es[:0], Entry{vb, Mapping{r.Begin, 0}})
					p.must(p.m.Insert(1, es))
					es = es[:0]
				} else {
					vb++
					es = append(es, Entry{vb, Mapping{r.Begin, 0}})
				}
				if done%4096 == 0 {
					p.must(p.m.Insert(1, es))
					es = es[:0]
					freed, err := p.m.Commit(nil)
					p.must(err)
					for _, r := range freed {
						p.m.ReleaseData(r)
					}
				}
			}
		})
	}
}

// BenchmarkDelete deletes a device of 2 million blocks in steps, and reports what half of them,
// and 9 of 10, take at most: so long other changes have to wait.
func BenchmarkDelete(b *testing.B) {
	mem := dev.NewMem(1 << 30)
	p := newTestPoolOn(quiet{b}, 1, mem, mem, 20000000)
	for b.Loop() {
		p.must(p.m.CreateThin(1))
		var es []Entry
		for vb := VBlock(0); vb < 2000000; vb++ {
			r, _ := p.m.AllocData(DataBlock(vb), 1)
			if es = append(es, Entry{vb, Mapping{r.Begin, 0}}); len(es) == 4096 {
				p.must(p.m.Insert(1, es))
				es = es[:0]
			}
		}
		_, err := p.m.Commit(nil)
		p.must(err)
		var steps []time.Duration
		for done := false; !done; {
			begin := time.Now()
			done, err = p.m.DeleteStep(1)
			p.must(err)
			steps = append(steps, time.Since(begin))
			freed, err := p.m.Commit(nil)
			p.must(err)
			for _, r := range freed {
				p.m.ReleaseData(r)
			}
		}
		slices.Sort(steps)
		b.ReportMetric(steps[len(steps)/2].Seconds()*1000, "ms-p50-step")
		b.ReportMetric(steps[len(steps)*9/10].Seconds()*1000, "ms-p90-step")
		b.ReportMetric(float64(len(steps)), "steps")
	}
}
