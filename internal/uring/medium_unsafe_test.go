package uring

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Reads and writes of a pool's file by io_uring beside pread and pwrite: the measurement behind the
// choice of the latter for the medium. An iteration is a batch of 16 requests of 4 KiB.

const (
	mediumReadFixed  = 4
	mediumWriteFixed = 5
	mediumRead       = 22
	mediumWrite      = 23

	mediumBuffers = 0
	mediumFiles   = 2

	mediumFixedFile = 1 << 0

	mediumBatch = 16
	mediumBlock = 4096
	mediumSize  = 256 << 20
)

// mediumRW queues a read or write. With fixed, fd and buffer are the first registered ones.
func mediumRW(r *Ring, op byte, fd int, p []byte, off uint64, fixed bool) error {
	e, err := r.next()
	if err != nil {
		return err
	}
	e[0] = op
	if fixed {
		e[1] = mediumFixedFile
		fd = 0
	}
	ne.PutUint32(e[4:], uint32(fd))
	ne.PutUint64(e[8:], off)
	ne.PutUint64(e[16:], Address(p))
	ne.PutUint32(e[24:], uint32(len(p)))
	return nil
}

func mediumRegister(r *Ring, what int, arg unsafe.Pointer, n int) error {
	_, _, errno := unix.Syscall6(unix.SYS_IO_URING_REGISTER, uintptr(r.fd), uintptr(what), uintptr(arg), uintptr(n), 0, 0)
	if errno != 0 {
		return errno
	}
	return nil
}

// BenchmarkMedium: MICA_DISK names a directory on a disk; without it only memory is measured.
func BenchmarkMedium(b *testing.B) {
	type place struct {
		name, dir string
		flags     int
	}
	places := []place{{"memory", "/dev/shm", 0}}
	if d := os.Getenv("MICA_DISK"); d != "" {
		places = append(places, place{"disk-cached", d, 0}, place{"disk-direct", d, unix.O_DIRECT})
	}
	for _, p := range places {
		dir, err := os.MkdirTemp(p.dir, "uring-medium-")
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { os.RemoveAll(dir) })
		name := filepath.Join(dir, "f")
		mediumFill(b, name)
		fd, err := unix.Open(name, unix.O_RDWR|unix.O_CLOEXEC|p.flags, 0)
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { unix.Close(fd) })
		for _, write := range []bool{false, true} {
			for _, how := range []string{"pread", "uring", "uring-fixed"} {
				b.Run(fmt.Sprintf("on=%s/write=%v/by=%s", p.name, write, how), func(b *testing.B) { medium(b, fd, write, how) })
			}
		}
	}
}

func mediumFill(b *testing.B, name string) {
	f, err := os.Create(name)
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	p := make([]byte, 1<<20)
	for i := range p {
		p[i] = byte(i*7 + i>>9)
	}
	for range mediumSize / len(p) {
		if _, err := f.Write(p); err != nil {
			b.Fatal(err)
		}
	}
	if err := f.Sync(); err != nil {
		b.Fatal(err)
	}
}

func medium(b *testing.B, fd int, write bool, how string) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	mem, err := unix.Mmap(-1, 0, mediumBatch*mediumBlock, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_POPULATE)
	if err != nil {
		b.Fatal(err)
	}
	defer unix.Munmap(mem)
	r, err := New(Options{Entries: mediumBatch})
	if err != nil {
		b.Skipf("SKIPPED: no io_uring here: %v", err)
	}
	defer r.Close()
	fixed := how == "uring-fixed"
	if fixed {
		iov := unix.Iovec{Base: &mem[0], Len: uint64(len(mem))}
		fds := [1]int32{int32(fd)}
		if err := mediumRegister(r, mediumBuffers, unsafe.Pointer(&iov), 1); err != nil {
			b.Fatal(err)
		}
		if err := mediumRegister(r, mediumFiles, unsafe.Pointer(&fds), 1); err != nil {
			b.Fatal(err)
		}
	}
	op := byte(mediumRead)
	switch {
	case write && fixed:
		op = mediumWriteFixed
	case write:
		op = mediumWrite
	case fixed:
		op = mediumReadFixed
	}
	rnd := rand.New(rand.NewPCG(1, 2))
	var bad int32
	reap := func(c Completion) {
		if c.Res != mediumBlock {
			bad = c.Res
		}
	}
	b.ReportAllocs()
	for b.Loop() {
		for i := range mediumBatch {
			off := rnd.Int64N(mediumSize/mediumBlock) * mediumBlock
			p := mem[i*mediumBlock:][:mediumBlock]
			switch {
			case how != "pread":
				err = mediumRW(r, op, fd, p, uint64(off), fixed)
			case write:
				_, err = unix.Pwrite(fd, p, off)
			default:
				_, err = unix.Pread(fd, p, off)
			}
			if err != nil {
				b.Fatal(err)
			}
		}
		if how != "pread" {
			for got := 0; got < mediumBatch; {
				if err := r.Enter(mediumBatch - got); err != nil {
					b.Fatal(err)
				}
				got += r.Reap(reap)
			}
			if bad != 0 {
				b.Fatalf("a request ended with %d", bad)
			}
		}
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/mediumBatch, "ns/request")
}
