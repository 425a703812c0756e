package dev

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// BenchmarkBreakSharing is what breaking sharing of a block asks of the pool's file: 64 KiB are copied
// to a new place of the same file, and 4 KiB of them are then written. By pread and pwrite of the
// block with the 4 KiB put in, as the engine does it; by copy_file_range and a pwrite; and by
// FICLONERANGE and a pwrite, where the file system can share blocks (XFS): the pwrite then is the
// first one to a shared block, and the file system breaks the sharing itself.
//
// The figures are the copy, the first write of 4 KiB, and another one elsewhere in the same block. MICA_DISK and MICA_REFLINK name directories
// on a disk, and on a file system that shares blocks; without them only memory is measured.
func BenchmarkBreakSharing(b *testing.B) {
	for _, p := range []struct{ name, dir string }{
		{"memory", "/dev/shm"}, {"disk", os.Getenv("MICA_DISK")}, {"reflink", os.Getenv("MICA_REFLINK")},
	} {
		if p.dir == "" {
			continue
		}
		dir, err := os.MkdirTemp(p.dir, "break-sharing-")
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { os.RemoveAll(dir) })
		for _, how := range []string{"pread", "copy_file_range", "clone"} {
			if how == "clone" && p.name != "reflink" {
				continue
			}
			b.Run(fmt.Sprintf("on=%s/by=%s", p.name, how), func(b *testing.B) {
				breakSharing(b, filepath.Join(dir, how), how)
			})
		}
	}
}

const (
	shareBlock = 64 << 10
	shareCount = 2048 // blocks of the origin; as many places behind it are used in turn
)

func breakSharing(b *testing.B, name, how string) {
	fd, err := unix.Open(name, unix.O_RDWR|unix.O_CREAT|unix.O_TRUNC|unix.O_CLOEXEC, 0o600)
	if err != nil {
		b.Fatal(err)
	}
	defer os.Remove(name)
	defer unix.Close(fd)
	block := make([]byte, shareBlock)
	for i := range block {
		block[i] = byte(i*7 + i>>9)
	}
	for i := range int64(shareCount) {
		if _, err := unix.Pwrite(fd, block, i*shareBlock); err != nil {
			b.Fatal(err)
		}
	}
	if err := unix.Fsync(fd); err != nil {
		b.Fatal(err)
	}
	small := block[:4096]
	rnd := rand.New(rand.NewPCG(1, 2))
	var sum [3]time.Duration
	for n := 0; b.Loop(); n++ {
		if n%shareCount == 0 { // the places are empty again
			b.StopTimer()
			if err := unix.Ftruncate(fd, shareCount*shareBlock); err == nil {
				err = unix.Ftruncate(fd, 2*shareCount*shareBlock)
			}
			if err != nil {
				b.Fatal(err)
			}
			b.StartTimer()
		}
		from, to := rnd.Int64N(shareCount)*shareBlock, int64(shareCount+n%shareCount)*shareBlock
		at := rnd.Int64N(shareBlock/4096) * 4096
		begin := time.Now()
		switch how {
		case "pread":
			_, err = unix.Pread(fd, block, from)
		case "copy_file_range":
			f, t := from, to
			_, err = unix.CopyFileRange(fd, &f, fd, &t, shareBlock, 0)
		case "clone":
			err = unix.IoctlFileCloneRange(fd, &unix.FileCloneRange{
				Src_fd: int64(fd), Src_offset: uint64(from), Src_length: shareBlock, Dest_offset: uint64(to)})
		}
		copied := time.Now()
		if err == nil && how == "pread" {
			_, err = unix.Pwrite(fd, block, to)
		} else if err == nil {
			_, err = unix.Pwrite(fd, small, to+at)
		}
		written := time.Now()
		if err == nil {
			_, err = unix.Pwrite(fd, small, to+(at+8192)%shareBlock)
		}
		if err != nil {
			b.Fatal(err)
		}
		sum[0] += copied.Sub(begin)
		sum[1] += written.Sub(copied)
		sum[2] += time.Since(written)
	}
	for i, name := range []string{"copy-us", "first-us", "second-us"} {
		b.ReportMetric(float64(sum[i].Nanoseconds())/float64(b.N)/1000, name)
	}
	b.ReportMetric(float64((sum[0]+sum[1]).Nanoseconds())/float64(b.N)/1000, "both-us")
	b.ReportMetric(0, "ns/op")
}
