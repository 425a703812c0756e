package archive

import (
	"bytes"
	"context"
	"fmt"
	"math/rand"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// BenchmarkApply compares with tar -x: the same 200 MB on the same file system.
func BenchmarkApply(b *testing.B) {
	needRoot(b)
	src, err := os.MkdirTemp(fuzzDir(), "bench")
	if err != nil {
		b.Fatal(err)
	}
	defer os.RemoveAll(src)
	rng := rand.New(rand.NewSource(1))
	total := 0
	for i := 0; total < 200e6; i++ {
		dir := filepath.Join(src, "src", fmt.Sprint("d", i/50), fmt.Sprint("e", i/10%5))
		if err := os.MkdirAll(dir, 0o755); err != nil {
			b.Fatal(err)
		}
		n := rng.Intn(20_000)
		if i%100 == 0 {
			n = 1 << 21
		}
		body := make([]byte, n)
		rng.Read(body)
		if err := os.WriteFile(filepath.Join(dir, fmt.Sprint("f", i)), body, 0o644); err != nil {
			b.Fatal(err)
		}
		total += n
	}
	data := mustDiff(b, "", filepath.Join(src, "src"), DiffOptions{})
	dst := filepath.Join(src, "dst")
	run := func(name string, f func() error) {
		b.Run(name, func(b *testing.B) {
			b.SetBytes(int64(len(data)))
			b.ReportAllocs()
			for range b.N {
				b.StopTimer()
				if err := os.RemoveAll(dst); err != nil {
					b.Fatal(err)
				}
				if err := os.Mkdir(dst, 0o755); err != nil {
					b.Fatal(err)
				}
				b.StartTimer()
				if err := f(); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
	run("by=mica", func() error {
		_, err := Apply(context.Background(), dst, bytes.NewReader(data), ApplyOptions{})
		return err
	})
	run("by=tar", func() error {
		cmd := exec.Command("tar", "-C", dst, "-x", "--xattrs", "--xattrs-include=*", "-p", "-f", "-")
		cmd.Stdin = bytes.NewReader(data)
		return cmd.Run()
	})
	run("by=diff", func() error {
		_, err := Diff(context.Background(), "", filepath.Join(src, "src"), writerFunc(func(p []byte) (int, error) { return len(p), nil }), DiffOptions{})
		return err
	})
	b.StopTimer()
}
