package nbdkernel

import (
	"fmt"
	"log/slog"
	"path/filepath"
	"time"
)

// Options of an Exporter. RunDir is the only one that must be given.
type Options struct {
	// RunDir is the daemon's RUN; records of devices are RunDir/nbd/NAME. One exporter at a time.
	RunDir string
	// LinkDir is where links to the nodes are made (node.DefaultDir on a host); "" makes none.
	LinkDir string
	// HelperCommand starts a helper (a command that calls helper.Run with Calls). If it is empty,
	// devices are taken away by this process itself; see Calls for what that risks.
	HelperCommand []string

	// Connections of a device; 0 is 1. See the package comment.
	Connections int
	// RequestTimeout is when the kernel gives up a request and sends it on another connection, for
	// devices with several; 0 is 2 minutes. Whole seconds.
	RequestTimeout time.Duration
	// RetryAfter is when the kernel looks what became of a request, for devices with one connection:
	// sent on a connection that was replaced, it is sent again. Otherwise the kernel goes on
	// waiting, and says so in its log. 0 is 3 seconds.
	RetryAfter time.Duration
	// DeadTimeout is how long requests wait for the next server before they fail; 0 is 24 hours.
	// Whole seconds.
	DeadTimeout time.Duration
	// Workers of a connection, for requests that wait; 0 is 16.
	Workers int
	// DetachWait is how long Detach waits for a process that merely has the node open; 0 is
	// 2 seconds.
	DetachWait time.Duration
	// Logger gets what no caller can be told; nil is slog.Default.
	Logger *slog.Logger
}

func (o *Options) check() error {
	if o.RunDir == "" {
		return fmt.Errorf("nbd exporter: no run directory")
	}
	var err error
	if o.RunDir, err = filepath.Abs(o.RunDir); err != nil {
		return err
	}
	if o.Connections <= 0 {
		o.Connections = 1
	}
	if o.Connections > 64 {
		return fmt.Errorf("nbd exporter: %d connections: want at most 64", o.Connections)
	}
	if o.RequestTimeout <= 0 {
		o.RequestTimeout = 2 * time.Minute
	}
	if o.RetryAfter <= 0 {
		o.RetryAfter = 3 * time.Second
	}
	if o.DeadTimeout <= 0 {
		o.DeadTimeout = 24 * time.Hour
	}
	if o.RequestTimeout < time.Second || o.DeadTimeout < time.Second {
		return fmt.Errorf("nbd exporter: timeouts %v and %v: want at least a second", o.RequestTimeout, o.DeadTimeout)
	}
	if o.DetachWait <= 0 {
		o.DetachWait = 2 * time.Second
	}
	if o.Logger == nil {
		o.Logger = slog.Default()
	}
	return nil
}

// config is what the driver is told.
func (o *Options) config(size int64, sector int, flags uint16, backend string) config {
	c := config{size: size, block: int64(sector), flags: flags, backend: backend, deadConn: uint64(o.DeadTimeout / time.Second)}
	if o.Connections > 1 {
		c.timeout = uint64(o.RequestTimeout / time.Second)
	}
	return c
}
