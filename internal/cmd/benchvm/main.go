// Command benchvm boots a test machine, lets `mica bench guest` measure in it, and writes what it
// found to a file, for `mica bench --with FILE`. It needs the source tree: the program for the
// machine is built from it.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"maps"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"time"

	"mica/bench"
	"mica/internal/vm"
	"mica/internal/vm/wire"
)

func main() {
	out := flag.String("o", "vm.json", "file to write")
	memory := flag.String("memory", "/dev/shm", "directory in memory, for the machine's disks")
	size := flag.Int64("size", 128<<20, "length of the devices, bytes")
	rounds := flag.Int("rounds", 5, "rounds of each job")
	runtime := flag.Duration("runtime", 500*time.Millisecond, "how long a job runs")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, *out, *memory, *size, *rounds, *runtime); err != nil {
		fmt.Fprintln(os.Stderr, "benchvm:", err)
		os.Exit(1)
	}
}

// cpu is the machine's processor. A real one moves 32 bytes and more a cycle with "rep movsb", so that a
// kernel that sees these two features copies everything with it; the emulator moves a byte at a time
// (4 KiB: 5.4 us, by words 0.7 us, a real processor 0.03 us). Without them it copies by words.
const cpu = "max,erms=off,fsrm=off"

// limit is for a host that is very busy; alone it takes some three minutes.
const limit = 20 * time.Minute

func run(ctx context.Context, out, memory string, size int64, rounds int, runtime time.Duration) (err error) {
	begin := time.Now()
	dir, err := os.MkdirTemp(memory, "mica-benchvm-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	binary := filepath.Join(dir, "mica")
	if err := vm.BuildTo(ctx, binary, "mica/cmd/mica"); err != nil {
		return err
	}
	files, err := vm.Programs("fio")
	if err != nil {
		return err
	}
	maps.Copy(files, map[string]string{"/bin/mica": binary})
	c := vm.Config{Modules: []string{"dm-thin-pool", "ublk_drv", "nbd", "loop", "fuse"}, Files: files, CPUs: 2, CPU: cpu, MemoryMB: 2048, BootTimeout: 5 * time.Minute}
	args := []string{"mica", "bench", "guest", "--size", strconv.FormatInt(size, 10), "--rounds", strconv.Itoa(rounds), "--runtime", runtime.String()}
	for i := range bench.GuestDisks {
		path := filepath.Join(dir, "disk"+strconv.Itoa(i))
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			return err
		}
		if err := os.Truncate(path, bench.GuestDiskBytes(i, size)); err != nil {
			return err
		}
		c.Disks = append(c.Disks, vm.Disk{Path: path})
		args = append(args, "/dev/"+vm.DiskName(i))
	}
	m, err := vm.Boot(ctx, c)
	if err != nil {
		return err
	}
	defer m.Close()
	fmt.Fprintf(os.Stderr, "the machine runs Linux %s\n", m.Release)
	res, err := m.Run(ctx, wire.Command{Args: args})
	if err != nil {
		return err
	}
	os.Stderr.Write(res.Stderr)
	if res.Code != 0 {
		return fmt.Errorf("mica bench guest: exit status %d", res.Code)
	}
	var p bench.Part
	if err := json.Unmarshal(res.Stdout, &p); err != nil {
		return fmt.Errorf("what the machine said: %w", err)
	}
	p.Medium += ", Linux " + m.Release
	p.Seconds = time.Since(begin).Seconds()
	b, err := json.MarshalIndent(p, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(out, append(b, '\n'), 0o644)
}
