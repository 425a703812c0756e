package storetest

import (
	"context"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"mica/engine/user"
	"mica/export/fuse"
)

// A Host is a directory on memory with a pool, where a store can be opened, closed and opened again.
type Host struct {
	T    testing.TB
	Dir  string // removed at the end of the test
	Loc  user.Location
	Run  string
	Pool *user.Pool // while it is open
	// Holder keeps nodes while the store is closed.
	Holder bool
}

// NewHost makes the directory; it skips a test that cannot run here.
func NewHost(t testing.TB, name string) *Host {
	t.Helper()
	NeedRoot(t)
	dir, err := os.MkdirTemp("/dev/shm", "mica-"+name+"-")
	OK(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	h := &Host{T: t, Dir: dir, Loc: user.Location{Dir: filepath.Join(dir, "pool")}, Run: filepath.Join(dir, "run")}
	OK(t, os.Mkdir(h.Loc.Dir, 0o700))
	return h
}

// Links is where links to nodes are made.
func (h *Host) Links() string { return filepath.Join(h.Dir, "links") }

// HolderSocket is that of the holder.
func (h *Host) HolderSocket() string { return filepath.Join(h.Dir, "holder.sock") }

// Format makes the pool, if there is none; its data is sparse.
func (h *Host) Format(dataBytes int64) error {
	if _, err := os.Stat(h.Loc.DataPath()); err == nil {
		return nil
	}
	return user.Format(context.Background(), h.Loc, user.FormatOptions{DataBytes: dataBytes})
}

// Open opens the pool, and an exporter for its devices.
func (h *Host) Open(ctx context.Context, o user.Options, log *slog.Logger) (*fuse.Exporter, error) {
	o.Logger = log
	pool, err := user.Open(ctx, h.Loc, o)
	if err != nil {
		return nil, err
	}
	fo := fuse.Options{RunDir: h.Run, LinkDir: h.Links(), Logger: log, HelperCommand: Role("fuse-helper")}
	if h.Holder {
		fo.HolderSocket = h.HolderSocket()
		fo.HolderCommand = Role("holder", fo.HolderSocket)
	}
	e, err := fuse.New(fo)
	if err != nil {
		pool.Close()
		return nil, err
	}
	h.Pool = pool
	return e, nil
}

// Close closes the pool, and holds thin_check against what is left.
func (h *Host) Close() {
	h.T.Helper()
	if h.Pool == nil {
		return
	}
	if err := h.Pool.Close(); err != nil {
		h.T.Errorf("close the pool: %v", err)
	}
	h.Pool = nil
	if path, err := exec.LookPath("thin_check"); err == nil {
		if out, err := exec.Command(path, h.Loc.MetadataPath()).CombinedOutput(); err != nil {
			h.T.Errorf("thin_check: %v\n%s", err, out)
		}
	}
}

// Used is how many blocks the pool holds when nothing is on its way any more: wait waits for the work of
// the store, idle says that it has none left.
func (h *Host) Used(wait func(context.Context) error, idle func() bool) uint64 {
	h.T.Helper()
	ctx := Context(h.T)
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		OK(h.T, wait(ctx))
		OK(h.T, h.Pool.Commit(ctx))
		st, err := h.Pool.Status(ctx)
		OK(h.T, err)
		if st.DataFreeing == 0 && idle() || time.Now().After(end) {
			return st.DataUsed
		}
	}
}
