package fuse

import (
	"context"
	"encoding/json"
	"fmt"
	"os/exec"
	"path/filepath"
	"testing"

	"mica/dev"
	"mica/export"
	"mica/export/loop"
)

// BenchmarkNode runs fio on a plain loop device and on ours, both with direct I/O on a fully
// written file on memory. One iteration is one run of fio (-benchtime 3x for a median); what
// counts is the ratio within one run.
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
		for _, on := range []struct{ name, node string }{
			{"plain-loop", plain.Node}, {"fuse", ours},
		} {
			b.Run(fmt.Sprintf("rw=%s/bs=%s/qd=%d/on=%s", c.rw, c.bs, c.depth, on.name), func(b *testing.B) {
				var iops, bytes float64
				for range b.N {
					i, bw := fioSpeed(b, on.node, c.rw, c.bs, c.depth)
					iops, bytes = iops+i, bytes+bw
				}
				b.ReportMetric(iops/float64(b.N), "iops")
				b.ReportMetric(bytes/float64(b.N)/(1<<20), "MiB/s")
				b.ReportMetric(0, "ns/op")
			})
		}
	}
}

func fioSpeed(b *testing.B, node, rw, bs string, depth int) (iops, bytes float64) {
	b.Helper()
	out, err := exec.Command("fio", "--name=b", "--filename="+node, "--rw="+rw, "--bs="+bs, fmt.Sprint("--iodepth=", depth),
		"--ioengine=libaio", "--direct=1", "--runtime=2", "--time_based", "--ramp_time=0.3", "--output-format=json", "--allow_file_create=0").Output()
	if err != nil {
		b.Fatalf("fio: %v\n%s", err, out)
	}
	type dir struct {
		IOPS float64 `json:"iops"`
		BW   float64 `json:"bw_bytes"`
	}
	var r struct {
		Jobs []struct{ Read, Write dir } `json:"jobs"`
	}
	if err := json.Unmarshal(out, &r); err != nil || len(r.Jobs) == 0 {
		b.Fatalf("fio: %v\n%s", err, out)
	}
	j := r.Jobs[0]
	return j.Read.IOPS + j.Write.IOPS, j.Read.BW + j.Write.BW
}
