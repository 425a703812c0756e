package fuse

import (
	"context"
	"encoding/json"
	"fmt"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"

	"mica/dev"
	"mica/export"
	"mica/export/loop"
)

// BenchmarkNode runs fio on a plain loop device and on ours, both with direct I/O on a fully
// written file on memory. One iteration is a pair of runs of a second each; what counts is the
// median of their ratios (-benchtime 7x).
func BenchmarkNode(b *testing.B) {
	needRoot(b)
	needTool(b, "fio")
	const size = 1 << 30
	dir := shmDir(b)
	file := func(name string) *dev.File {
		f, err := dev.CreateFile(filepath.Join(dir, name), size, dev.OpenOptions{})
		if err != nil {
			b.Fatal(err)
		}
		one := make([]byte, 1<<20)
		for i := range one {
			one[i] = byte(i*7 + i>>8)
		}
		for off := int64(0); off < size; off += 1 << 20 {
			if _, err := f.WriteAt(one, off); err != nil {
				b.Fatal(err)
			}
		}
		b.Cleanup(func() { f.Close() })
		return f
	}
	file("plain")
	plain, err := loop.Attach(context.Background(), loop.Config{Backing: filepath.Join(dir, "plain")})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		if err := loop.Detach(context.Background(), plain, loop.DetachOptions{Backing: filepath.Join(dir, "plain")}); err != nil {
			b.Error(err)
		}
	})
	e, err := New(Options{RunDir: filepath.Join(dir, "run"), Logger: quiet(), HelperCommand: []string{"/proc/self/exe", "role-helper"}})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { e.Close() })
	node := func(name string, d dev.Device) string {
		a, err := e.Attach(context.Background(), name, d, export.AttachOptions{})
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() {
			if err := a.Detach(context.Background()); err != nil {
				b.Error(err)
			}
		})
		return a.Node()
	}
	ours := node("ours", inline(file("ours")))
	for _, c := range []struct {
		rw, bs string
		depth  int
	}{{"randread", "4k", 16}, {"randwrite", "4k", 16}, {"randread", "4k", 1}, {"read", "1m", 4}, {"write", "1m", 4}} {
		b.Run(fmt.Sprintf("rw=%s/bs=%s/qd=%d", c.rw, c.bs, c.depth), func(b *testing.B) {
			var speed [2][]float64
			var ratio []float64
			for range b.N {
				p := fioSpeed(b, plain.Node, c.rw, c.bs, c.depth)
				o := fioSpeed(b, ours, c.rw, c.bs, c.depth)
				speed[0], speed[1] = append(speed[0], p), append(speed[1], o)
				ratio = append(ratio, o/p)
			}
			b.ReportMetric(median(speed[0]), "plain-iops")
			b.ReportMetric(median(speed[1]), "fuse-iops")
			b.ReportMetric(median(ratio), "ratio")
			b.ReportMetric(0, "ns/op")
		})
	}
}

func median(v []float64) float64 {
	slices.Sort(v)
	return v[len(v)/2]
}

func fioSpeed(b *testing.B, node, rw, bs string, depth int) float64 {
	b.Helper()
	out, err := exec.Command("fio", "--name=b", "--filename="+node, "--rw="+rw, "--bs="+bs, fmt.Sprint("--iodepth=", depth),
		"--ioengine=libaio", "--direct=1", "--runtime=1", "--time_based", "--ramp_time=0.3", "--output-format=json", "--allow_file_create=0").Output()
	if err != nil {
		b.Fatalf("fio: %v\n%s", err, out)
	}
	type dir struct {
		IOPS float64 `json:"iops"`
	}
	var r struct {
		Jobs []struct{ Read, Write dir } `json:"jobs"`
	}
	if err := json.Unmarshal(out, &r); err != nil || len(r.Jobs) == 0 {
		b.Fatalf("fio: %v\n%s", err, out)
	}
	return r.Jobs[0].Read.IOPS + r.Jobs[0].Write.IOPS
}
