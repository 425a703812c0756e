package ublk

import (
	"fmt"
	"log/slog"
	"path/filepath"
	"runtime"
	"time"
)

// Options of an Exporter. RunDir is the only one that must be given.
type Options struct {
	// RunDir is the daemon's RUN; records of devices are RunDir/ublk/NAME. One exporter at a time.
	RunDir string
	// LinkDir is where links to the nodes are made (node.DefaultDir on a host); "" makes none.
	LinkDir string
	// HelperCommand starts a helper (a command that calls helper.Run with Calls). If it is empty,
	// devices are started and stopped by this process itself; see Calls for what that risks.
	HelperCommand []string

	// Queues is the number of hardware queues of a device, each with a thread of this process;
	// 0 is 2, or 1 on one CPU.
	Queues int
	// Depth is the number of requests that a queue has in flight; 0 is 128.
	Depth int
	// InlineMax is the longest request, in bytes, that the thread of the queue also serves, if
	// the device can do it at once; 0 is 128 KiB.
	InlineMax int
	// IdleAfter is the time without requests after which a device costs no buffers; 0 is 5 seconds.
	IdleAfter time.Duration
	// DetachWait is how long Detach waits for a process that merely has the node open; 0 is
	// 2 seconds.
	DetachWait time.Duration
	// Logger gets what no caller can be told; nil is slog.Default.
	Logger *slog.Logger
}

func (o *Options) check() error {
	if o.RunDir == "" {
		return fmt.Errorf("ublk exporter: no run directory")
	}
	var err error
	if o.RunDir, err = filepath.Abs(o.RunDir); err != nil {
		return err
	}
	if o.Queues <= 0 {
		o.Queues = min(2, runtime.GOMAXPROCS(0))
	}
	if o.Depth <= 0 {
		o.Depth = 128
	}
	if o.Depth > 4096 {
		return fmt.Errorf("ublk exporter: queue depth %d: want at most 4096", o.Depth)
	}
	if o.InlineMax <= 0 {
		o.InlineMax = 128 << 10
	}
	if o.InlineMax > maxIO {
		return fmt.Errorf("ublk exporter: inline requests of %d bytes: want at most %d", o.InlineMax, maxIO)
	}
	if o.IdleAfter <= 0 {
		o.IdleAfter = 5 * time.Second
	}
	if o.DetachWait <= 0 {
		o.DetachWait = 2 * time.Second
	}
	if o.Logger == nil {
		o.Logger = slog.Default()
	}
	return nil
}
