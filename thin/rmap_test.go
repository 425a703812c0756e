package thin

import (
	"bytes"
	"fmt"
	"slices"
	"strings"
	"testing"

	"mica/dev"
)

// TestRmapAgainstTool: on random pools WriteRmap says what the model has, with and without a
// temporary file, and what thin_rmap says of the same pool with a tree for every device. The
// tool looks at a node that devices share only once; of a pool with such nodes it names a part.
func TestRmapAgainstTool(t *testing.T) {
	for seed := int64(31); seed <= 34; seed++ {
		t.Run(fmt.Sprint("seed=", seed), func(t *testing.T) {
			t.Parallel()
			p := newTestPool(t, seed, 4096, 20000)
			for range 50 {
				p.step()
			}
			p.commit()
			path := p.file()
			v := p.m.Pin()
			defer v.Unpin()
			var xml bytes.Buffer
			p.must(v.Dump(&xml, DumpOptions{}))
			apart := dev.NewMem(32 << 20)
			p.must(Restore(&xml, apart, RestoreOptions{}))
			apartPath := devFile(t, apart)
			for _, regions := range [][]DataRun{
				{{0, 20000}}, {{0, 1}}, {{100, 5000}, {9000, 10}}, {{7000, 300}, {0, 50}, {7100, 9000}, {50, 1}}, {{19999, 1000}},
			} {
				var got bytes.Buffer
				p.must(v.WriteRmap(&got, regions, RmapOptions{}))
				var spilled bytes.Buffer
				p.must(v.WriteRmap(&spilled, regions, RmapOptions{MaxRanges: 7}))
				if got.String() != spilled.String() {
					t.Fatalf("regions %v: through a file it differs:\n%s", regions, firstDiff(spilled.Bytes(), got.Bytes()))
				}
				blocks := 0
				p.must(v.Rmap(regions, RmapOptions{}, func(r RmapRange) error {
					for i := range r.Len {
						if m, ok := p.committed.devs[r.Device].maps[r.VBegin+VBlock(i)]; !ok || m.Block != r.Begin+DataBlock(i) {
							t.Fatalf("%+v: block %d is mapped to %v, %v", r, i, m, ok)
						}
						blocks++
					}
					return nil
				}))
				if want := p.mappedIn(regions); blocks != want {
					t.Fatalf("regions %v: %d blocks, want %d", regions, blocks, want)
				}
				mine := sortedLines(got.String())
				var args []string
				for _, r := range regions {
					args = append(args, "--region", fmt.Sprintf("%d..%d", r.Begin, uint64(r.Begin)+r.Len))
				}
				// The tool sorts by data block only.
				if want, ok := tool(t, "thin_rmap", append(args, apartPath)...); ok && !slices.Equal(mine, sortedLines(string(want))) {
					t.Fatalf("regions %v differ from thin_rmap:\n%s", regions,
						firstDiff([]byte(strings.Join(mine, "\n")), []byte(strings.Join(sortedLines(string(want)), "\n"))))
				}
				if some, ok := tool(t, "thin_rmap", append(args, path)...); ok {
					for _, l := range sortedLines(string(some)) {
						if _, found := slices.BinarySearch(mine, l); !found {
							t.Fatalf("regions %v: thin_rmap has %q", regions, l)
						}
					}
				}
			}
		})
	}
}

// mappedIn counts the committed mappings whose data block is in regions.
func (p *testPool) mappedIn(regions []DataRun) int {
	n := 0
	for _, d := range p.committed.devs {
		for _, m := range d.maps {
			if slices.ContainsFunc(regions, func(r DataRun) bool { return m.Block >= r.Begin && uint64(m.Block) < uint64(r.Begin)+r.Len }) {
				n++
			}
		}
	}
	return n
}

func sortedLines(s string) []string {
	l := strings.Split(strings.TrimSpace(s), "\n")
	slices.Sort(l)
	return l
}

func TestRmapRefusesRegions(t *testing.T) {
	v, err := OpenView(goldenPool(t))
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range []DataRun{{5, 0}, {1 << 63, 1 << 63}} {
		if err := v.Rmap([]DataRun{r}, RmapOptions{}, nil); err == nil {
			t.Errorf("region %v was taken", r)
		}
	}
}
