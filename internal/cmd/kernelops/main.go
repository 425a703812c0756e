// Command kernelops runs in the test machine: it reads a crossing.Job from standard input, runs
// it on the kernel's dm-thin and prints a crossing.Report. Whatever it made of device-mapper
// devices is gone when it ends, so that the host may look at the disks.
package main

import (
	"encoding/json"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"mica/internal/crossing"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "kernelops:", err)
		os.Exit(1)
	}
}

func run() (err error) {
	begin := time.Now()
	var job crossing.Job
	if err := json.NewDecoder(os.Stdin).Decode(&job); err != nil {
		return fmt.Errorf("job: %w", err)
	}
	// O_DIRECT wants aligned memory; a mapping is aligned to a page.
	buf, err := unix.Mmap(-1, 0, int(max(1<<20, job.BlockBytes)), unix.PROT_READ|unix.PROT_WRITE,
		unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return fmt.Errorf("buffer: %w", err)
	}
	pool, err := activate(job)
	if err != nil {
		return err
	}
	defer func() {
		if closeErr := pool.Close(); err == nil {
			err = closeErr
		}
	}()
	runner := crossing.NewRunner(pool, job.Sizes, buf)
	defer func() {
		if closeErr := runner.Close(); err == nil {
			err = closeErr
		}
	}()
	if err := runner.Run(job.Ops); err != nil {
		status, _ := pool.dm.Status(poolName, true)
		return fmt.Errorf("%w (pool status: %v)", err, status)
	}
	report := crossing.Report{Hashes: map[uint32][]uint64{}, Mapped: map[uint32]int64{}, Dumps: map[uint32][]byte{}}
	for id, size := range job.Hash {
		t, err := runner.Device(id)
		if err != nil {
			return err
		}
		if report.Hashes[id], err = crossing.HashBlocks(t, size, job.BlockBytes, buf); err != nil {
			return fmt.Errorf("device %d: %w", id, err)
		}
		mapped, _, _, err := pool.dm.ThinStatus(thinName(id))
		if err != nil {
			return err
		}
		report.Mapped[id] = int64(mapped) * crossing.SectorSize / job.BlockBytes
	}
	for id, off := range job.Dump {
		t, err := runner.Device(id)
		if err != nil {
			return err
		}
		p := buf[:min(job.BlockBytes, job.Hash[id]-off)]
		if _, err := t.ReadAt(p, off); err != nil {
			return err
		}
		report.Dumps[id] = append([]byte{}, p...)
	}
	status, err := pool.dm.Status(poolName, len(job.Ops) == 0) // a mere reader commits nothing
	if err != nil {
		return err
	}
	report.Status = status[0].Params
	report.Seconds = time.Since(begin).Seconds()
	return json.NewEncoder(os.Stdout).Encode(report)
}
