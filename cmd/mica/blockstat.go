package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// blockStat is what the kernel has counted for a block device since it was made. Times are
// milliseconds. Source: Linux Documentation/block/stat.rst.
type blockStat struct {
	Reads, ReadBytes       uint64
	Writes, WriteBytes     uint64
	Discards, DiscardBytes uint64
	Flushes                uint64
	InFlight               uint64
	BusyMS                 uint64
}

// readBlockStat asks sysfs for the counters of a node such as /dev/loop7.
func readBlockStat(node string) (blockStat, error) {
	real, err := filepath.EvalSymlinks(node)
	if err != nil {
		return blockStat{}, err
	}
	path := filepath.Join("/sys/class/block", filepath.Base(real), "stat")
	b, err := os.ReadFile(path)
	if err != nil {
		return blockStat{}, err
	}
	s, err := parseBlockStat(string(b))
	if err != nil {
		return s, fmt.Errorf("%s: %w", path, err)
	}
	return s, nil
}

// parseBlockStat reads the one line of numbers. Kernels before 4.18 have no discards, before 5.5
// no flushes: those stay zero.
func parseBlockStat(line string) (blockStat, error) {
	const sector = 512
	f := strings.Fields(line)
	if len(f) < 11 {
		return blockStat{}, fmt.Errorf("%d fields, want at least 11", len(f))
	}
	n := make([]uint64, 17)
	for i := range min(len(f), len(n)) {
		v, err := strconv.ParseUint(f[i], 10, 64)
		if err != nil {
			return blockStat{}, fmt.Errorf("field %d: %w", i+1, err)
		}
		n[i] = v
	}
	return blockStat{
		Reads: n[0], ReadBytes: n[2] * sector, Writes: n[4], WriteBytes: n[6] * sector,
		InFlight: n[8], BusyMS: n[9],
		Discards: n[11], DiscardBytes: n[13] * sector, Flushes: n[15],
	}, nil
}
