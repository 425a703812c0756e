package fuse

import (
	"fmt"
	"log/slog"
	"path/filepath"
	"runtime"
	"time"
)

// Options of an Exporter. RunDir is the only one that must be given.
type Options struct {
	// RunDir is the daemon's RUN; mount points are RunDir/fuse/NAME. One exporter at a time.
	RunDir string
	// LinkDir is where links to the nodes are made (node.DefaultDir on a host); "" makes none.
	LinkDir string
	// HolderSocket is where the holder listens. "" does without a holder: the death of this
	// process is then an I/O error for whoever uses a node.
	HolderSocket string
	// HolderCommand starts a holder on HolderSocket (a command that calls holder.Run). If it is
	// empty, one must be there.
	HolderCommand []string
	// HelperCommand starts a helper (a command that calls helper.Run with Calls). If it is empty, loop
	// devices are changed by this process itself; see package helper for what that risks.
	HelperCommand []string

	// Threads is how many OS threads at most read requests of a busy device; 0 is 2, or 1 on one CPU.
	Threads int
	// InlineMax is the longest request, in bytes, that the thread which read it also serves, if
	// the device can do it at once, and does it fast; 0 is 1 MiB, which is all of them.
	InlineMax int
	// IdleAfter is the time without requests after which a device costs no threads and no
	// buffers; 0 is 100 ms. Its next request then finds a thread some microseconds later.
	IdleAfter time.Duration
	// DetachWait is how long Detach waits for a process that merely has the node open; 0 is
	// 2 seconds.
	DetachWait time.Duration
	// Logger gets what no caller can be told; nil is slog.Default.
	Logger *slog.Logger
}

func (o *Options) check() error {
	if o.RunDir == "" {
		return fmt.Errorf("fuse exporter: no run directory")
	}
	var err error
	if o.RunDir, err = filepath.Abs(o.RunDir); err != nil {
		return err
	}
	if o.Threads <= 0 {
		o.Threads = min(2, runtime.GOMAXPROCS(0))
	}
	if o.InlineMax <= 0 {
		o.InlineMax = maxIO
	}
	if o.IdleAfter <= 0 {
		o.IdleAfter = 100 * time.Millisecond
	}
	if o.DetachWait <= 0 {
		o.DetachWait = 2 * time.Second
	}
	if o.Logger == nil {
		o.Logger = slog.Default()
	}
	return nil
}
