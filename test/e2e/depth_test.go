package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

const depth = 100

// deepLayers makes layers in which each adds a file, replaces one that all have, and sometimes
// deletes one of an earlier layer. trees[d] is what a container of the lowest d layers shows.
func deepLayers(t *testing.T) (layers [][]byte, trees []map[string]string) {
	tree := map[string]string{"big": string(pattern(7, 64<<20))}
	layers = [][]byte{tarOf(t, file{name: "big", body: []byte(tree["big"])})}
	trees = []map[string]string{nil, clone(tree)}
	for d := 2; d <= depth; d++ {
		own, same := fmt.Sprint("f", d), "same"
		text := string(pattern(uint64(d), 1000+37*d))
		files := []file{{name: own, body: []byte(text)}, {name: same, body: []byte(text[:d])}}
		tree[own], tree[same] = text, text[:d]
		if d%7 == 0 {
			gone := fmt.Sprint("f", d-3)
			delete(tree, gone)
			files = append(files, file{name: ".wh." + gone})
		}
		layers, trees = append(layers, tarOf(t, files...)), append(trees, clone(tree))
	}
	return layers, trees
}

func clone(m map[string]string) map[string]string {
	c := map[string]string{}
	for k, v := range m {
		c[k] = v
	}
	return c
}

// sameFiles compares a directory with a tree of regular files.
func (b *box) sameFiles(dir string, want map[string]string, skip ...string) {
	b.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		b.Fatal(err)
	}
	for _, e := range entries {
		text, there := want[e.Name()]
		switch {
		case !there:
			b.Errorf("%s: %s should not be there", dir, e.Name())
		case !slices.Contains(skip, e.Name()) && string(b.readFile(filepath.Join(dir, e.Name()))) != text:
			b.Errorf("%s: %s has other contents", dir, e.Name())
		}
	}
	if len(entries) != len(want) {
		b.Errorf("%s: %d files, want %d", dir, len(entries), len(want))
	}
}

// TestDepth: an image of 100 layers, and one of each number of layers below. Contents are right
// at every depth. A read in the deepest container costs what it costs in one of a single layer:
// one read of the pool, however deep; the times are printed.
func TestDepth(t *testing.T) {
	b := newBox(t, "fio", "filefrag")
	b.start()
	layers, trees := deepLayers(t)
	begin := time.Now()
	var images []ociImage
	for d := 1; d <= depth; d++ {
		images = append(images, ociImage{name: fmt.Sprint("depth:", d), layers: layers[:d]})
	}
	r := asJSON[imported](b, "image", "import", b.archive("deep.tar", images...))
	total := 0
	for _, i := range r.Images {
		total += i.NewLayers
	}
	if len(r.Images) != depth || total != depth {
		t.Errorf("%d images with %d new layers, want %d of both", len(r.Images), total, depth)
	}
	t.Logf("imported after %v", time.Since(begin))
	for d := 1; d <= depth; d++ {
		name := fmt.Sprint("c", d)
		b.mica("create", fmt.Sprint("depth:", d), name)
		dir := b.mount(name, "--read-only")
		if d%33 == 1 {
			b.sameFiles(dir, trees[d])
		} else {
			b.sameFiles(dir, trees[d], "big")
		}
		b.mica("umount", name)
		if d > 1 && d < depth {
			b.mica("rm", name)
		}
	}
	t.Logf("mounted after %v", time.Since(begin))
	b.compareDepths("c1", fmt.Sprint("c", depth))
}

// compareDepths reads the same places of two containers with the same requests.
func (b *box) compareDepths(shallow, deep string) {
	b.Helper()
	dir := b.mount(deep, "--read-only")
	at := b.extent(filepath.Join(dir, "big"), 32<<20)
	b.mica("umount", deep)
	names := []string{shallow, deep}
	nodes := []string{b.mica("attach", shallow, "--read-only"), b.mica("attach", deep, "--read-only")}
	const requests, rounds = 4096, 12
	var calls, bytes [2]int64
	var iops [2][]float64
	for round := range rounds + 1 {
		for k := range nodes {
			i := (k + round) % 2 // neither is always the first
			c0, b0 := b.daemonReads()
			v := b.randomReads(nodes[i], at, 32<<20, requests)
			c1, b1 := b.daemonReads()
			if round > 0 { // the first fills the tables
				calls[i], bytes[i] = calls[i]+c1-c0, bytes[i]+b1-b0
				iops[i] = append(iops[i], v)
			}
		}
	}
	for i, name := range names {
		// A request is a read of the data, and of the export's queue: one that brings the request
		// and at most one that finds the queue empty.
		per, perBytes := float64(calls[i])/requests/rounds, float64(bytes[i])/requests/rounds
		b.Logf("%s: %.3f reads and %.0f bytes a request; at best %.0f requests a second", name, per, perBytes, slices.Max(iops[i]))
		if per > 3.1 || perBytes > 4096+512 {
			b.Errorf("%s: %.3f reads and %.0f bytes a request, want at most 3.1 and 4608", name, per, perBytes)
		}
	}
	// Bytes, not calls: how often the queue is found empty depends on the other load, and brings none.
	if d := float64(bytes[1]) / float64(bytes[0]); d > 1.01 {
		b.Errorf("the deepest container reads %.3f times as many bytes as one of a single layer", d)
	}
	b.Logf("depth %d reads %.3f x as fast as depth 1 (promised: 0.95)", depth, slices.Max(iops[1])/slices.Max(iops[0]))
	for _, n := range names {
		b.mica("detach", n)
	}
}

// randomReads reads 4 KiB blocks of a node in a fixed random order and returns requests a second.
func (b *box) randomReads(node string, at, length int64, requests int) float64 {
	b.Helper()
	out := b.sh("fio", "--name=r", "--filename="+node, "--readonly", "--rw=randread", "--bs=4k", "--direct=1", "--ioengine=psync",
		fmt.Sprint("--offset=", at), fmt.Sprint("--size=", length), fmt.Sprint("--io_size=", requests*4096), "--randseed=1", "--output-format=json")
	var r struct {
		Jobs []struct {
			Error int
			Read  struct {
				IOPS     float64
				TotalIOs int `json:"total_ios"`
			}
		}
	}
	if err := json.Unmarshal([]byte(out[strings.Index(out, "{"):]), &r); err != nil || len(r.Jobs) != 1 || r.Jobs[0].Error != 0 {
		b.Fatalf("fio: %v\n%s", err, out)
	}
	if n := r.Jobs[0].Read.TotalIOs; n != requests {
		b.Errorf("fio made %d requests, want %d", n, requests)
	}
	return r.Jobs[0].Read.IOPS
}

// daemonReads counts the daemon's read calls and the bytes that they brought, since it began.
func (b *box) daemonReads() (calls, bytes int64) {
	b.Helper()
	for _, l := range strings.Split(string(b.readFile(fmt.Sprintf("/proc/%d/io", b.serve.Process.Pid))), "\n") {
		name, v, _ := strings.Cut(l, ": ")
		n, _ := strconv.ParseInt(v, 10, 64)
		switch name {
		case "syscr":
			calls = n
		case "rchar":
			bytes = n
		}
	}
	if calls == 0 {
		b.Fatal("the kernel does not count reads of a process")
	}
	return calls, bytes
}
