package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"mica/daemon/api"
	"mica/daemon/config"
	"mica/dev"
	"mica/engine"
	"mica/engine/kernel"
	"mica/engine/user"
	"mica/thin"
)

// An opened is the daemon's pool with what differs between the engines.
type opened struct {
	engine.Pool
	// check looks through the metadata as of now.
	check func(ctx context.Context, op *operation) (api.CheckResult, error)
	// view calls fn with the state as of now, which stands still meanwhile.
	view func(ctx context.Context, fn func(v *thin.View) error) error
	// sweep clears away what a predecessor left and nobody has taken over. It may be nil.
	sweep func()
	notes []string
}

// engineOf is the engine that opens the pool.
func engineOf(l user.Location, c config.Pool) (string, error) {
	switch {
	case c.ThinPool != "":
		return engine.Kernel, nil
	case c.Engine != engine.Auto:
		return c.Engine, nil
	case l.Dir == "":
		return engine.User, nil
	}
	return engine.Noted(l.Dir)
}

// openPool opens the daemon's pool, and makes it first if there is none.
func openPool(ctx context.Context, l user.Location, c config.Config, log *slog.Logger) (*opened, error) {
	if c.Pool.ThinPool == "" {
		if err := makePool(ctx, l, c.Pool, log); err != nil {
			return nil, err
		}
	}
	name, err := engineOf(l, c.Pool)
	if err != nil {
		return nil, err
	}
	if name == engine.Kernel {
		return openKernel(ctx, l, c, log)
	}
	return openUser(ctx, l, c, log)
}

// journalBytes is the length of the daemon's journal: a million changes in each of its two halves.
const journalBytes = 64 << 20

func openUser(ctx context.Context, l user.Location, c config.Config, log *slog.Logger) (*opened, error) {
	o := user.Options{
		ErrorIfNoSpace: c.Pool.ErrorIfNoSpace, NoSpaceTimeout: time.Duration(c.Pool.NoSpaceTimeout),
		CommitInterval:  time.Duration(c.Pool.CommitInterval),
		TableCacheBytes: int64(c.Limits.TableCache), MetaCacheBytes: int64(c.Limits.MetadataCache), Logger: log,
		NoJournal: !c.Pool.Journal, JournalBytes: journalBytes,
		Exports: &user.Exports{Run: c.Run, Dirs: exportDirs(c.Run)},
	}
	var err error
	if o.LowWaterMark, err = lowWaterMark(l, c.Pool.LowWater); err != nil {
		return nil, err
	}
	p, err := user.Open(ctx, l, o)
	if errors.Is(err, user.ErrNoJournal) {
		return nil, fmt.Errorf("%w\nMake room on a tmpfs at /run or /dev/shm; or set pool.journal = false, and a killed daemon is like a power cut for its containers", err)
	}
	if err != nil {
		return nil, err
	}
	view := func(ctx context.Context, fn func(v *thin.View) error) error {
		// A pool that cannot commit any more is looked at as of its last commit.
		if err := p.Commit(ctx); err != nil && !errors.Is(err, dev.ErrReadOnly) && !errors.Is(err, engine.ErrFailed) {
			return err
		}
		v := p.Metadata().Pin()
		defer v.Unpin()
		return fn(v)
	}
	check := func(ctx context.Context, op *operation) (r api.CheckResult, err error) {
		err = view(ctx, func(v *thin.View) error {
			r, err = checkView(ctx, v, op, false)
			return err
		})
		return r, err
	}
	return &opened{Pool: p, view: view, check: check}, nil
}

// openKernel activates the pool in the kernel, or takes over what a predecessor left there.
func openKernel(ctx context.Context, l user.Location, c config.Config, log *slog.Logger) (*opened, error) {
	if err := noSurvivors(c.Run); err != nil {
		return nil, err
	}
	src := kernel.Source{Dir: l.Dir, Data: l.Data, Metadata: l.Metadata}
	if c.Pool.ThinPool != "" {
		if err := refuseThinVolumes(ctx, c.Pool.ThinPool); err != nil {
			return nil, err
		}
		src = kernel.Source{Pool: c.Pool.ThinPool}
	}
	o := kernel.Options{ErrorIfNoSpace: c.Pool.ErrorIfNoSpace, Adopt: c.Pool.Adopt, Logger: log}
	if src.Pool == "" {
		var err error
		if o.LowWaterMark, err = lowWaterMark(l, c.Pool.LowWater); err != nil {
			return nil, err
		}
	} else if _, err := os.Stat(filepath.Join(c.Root, catalogFile)); err == nil {
		o.Adopt = true // its devices are those of the catalog, which has been there before
	}
	p, err := kernel.Open(ctx, src, o)
	if err != nil {
		return nil, err
	}
	out := &opened{Pool: p, view: p.View, check: func(ctx context.Context, op *operation) (r api.CheckResult, err error) {
		err = p.View(ctx, func(v *thin.View) error {
			r, err = checkView(ctx, v, op, true)
			return err
		})
		return r, err
	}}
	out.sweep = func() {
		if busy := p.Sweep(); len(busy) > 0 {
			log.Warn("nodes that a predecessor left are in use, and belong to nobody", "nodes", busy)
		}
	}
	if have, ok := kernelNoSpaceTimeout(); ok && !o.ErrorIfNoSpace && have != time.Duration(c.Pool.NoSpaceTimeout) {
		out.notes = append(out.notes, fmt.Sprintf("writes to a full pool wait for %v, as the kernel's %s says for all pools, not for pool.no_space_timeout", have, noSpaceTimeoutFile))
	}
	return out, nil
}

// rescue helps a predecessor to die that was killed while it held back devices of its own.
func (d *daemon) rescue(pid int) {
	l := poolLocation(d.c.Root, d.c.Pool)
	if err := kernel.Rescue(kernel.Source{Dir: l.Dir, Data: l.Data, Metadata: l.Metadata, Pool: d.c.Pool.ThinPool}, pid); err != nil && !errors.Is(err, os.ErrNotExist) {
		d.log.Warn("a dying predecessor", "pid", pid, "error", err)
	}
}

// catalogFile is the layer store's catalog in ROOT.
const catalogFile = "catalog.db"

// noSpaceTimeoutFile is the kernel's parameter: one for all pools.
const noSpaceTimeoutFile = "/sys/module/dm_thin_pool/parameters/no_space_timeout"

func kernelNoSpaceTimeout() (time.Duration, bool) {
	b, err := os.ReadFile(noSpaceTimeoutFile)
	if err != nil {
		return 0, false
	}
	n, err := strconv.Atoi(strings.TrimSpace(string(b)))
	return time.Duration(n) * time.Second, err == nil
}

// checkView checks the metadata as a view shows it. Of a metadata snapshot the trees are looked
// at, and no counts are compared.
func checkView(ctx context.Context, v *thin.View, op *operation, snap bool) (api.CheckResult, error) {
	st := op.step("metadata blocks", "", 0)
	r, err := v.Check(thin.CheckOptions{MaxFindings: 1000, MetadataSnap: snap, Progress: func(done, total uint64) error {
		st.set(int64(done), int64(total))
		return ctx.Err()
	}})
	if err != nil {
		return api.CheckResult{}, err
	}
	return api.CheckResult{Clean: r.Clean(), Report: *r}, nil
}
