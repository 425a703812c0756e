package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"sync"
	"time"

	"mica/daemon/api"
	"mica/daemon/config"
	"mica/engine"
	"mica/engine/user"
	"mica/thin"
	"mica/thin/backup"
)

// endBackup bounds the backup that is made when the daemon ends.
const endBackup = 30 * time.Second

// backups makes backups of the pool's metadata. Safe for concurrent use.
type backups struct {
	pool engine.Pool
	view func(ctx context.Context, fn func(v *thin.View) error) error
	c    config.Backup
	dir  string
	log  *slog.Logger
	tell func(kind, object, detail string)

	making sync.Mutex // one at a time

	mu   sync.Mutex
	last *thin.Superblock // that was backed up; guarded by mu
	info *backup.Info     // the newest backup; guarded by mu
	err  error            // why the last attempt failed; guarded by mu
}

// newBackups finds out where they are to be, and what the newest one is.
func newBackups(p *opened, l user.Location, root string, c config.Backup, log *slog.Logger, tell func(kind, object, detail string)) *backups {
	b := &backups{pool: p.Pool, view: p.view, c: c, dir: c.Dir, log: log, tell: tell}
	switch {
	case b.dir != "":
	case l.Dir != "":
		b.dir = filepath.Join(l.Dir, "backups")
	default:
		b.dir = filepath.Join(root, "backups")
	}
	if list, err := backup.List(b.dir); err == nil && len(list) > 0 {
		b.info = &list[0]
	}
	return b
}

// run makes a backup every interval in which the pool has changed, until ctx ends.
func (b *backups) run(ctx context.Context) {
	if b.c.Keep == 0 || b.c.Interval == 0 {
		return
	}
	t := time.NewTicker(time.Duration(b.c.Interval))
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
			_, _ = b.make(ctx, false) // status, log and event say what went wrong
		}
	}
}

// end makes the last one. Nothing changes the pool any more.
func (b *backups) end() {
	if b.c.Keep == 0 {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), endBackup)
	defer cancel()
	_, _ = b.make(ctx, false)
}

// make backs up the last commit, if something has changed since the last time or it is asked for,
// and removes what is too old.
func (b *backups) make(ctx context.Context, asked bool) (info backup.Info, err error) {
	b.making.Lock()
	defer b.making.Unlock()
	made := false
	st, err := b.pool.Status(ctx)
	if err == nil {
		err = b.view(ctx, func(v *thin.View) error {
			sb := v.Superblock()
			if !asked && b.unchanged(&sb) {
				return nil
			}
			info, err = backup.Write(ctx, v, backup.Options{Dir: b.dir, DataBlocks: st.DataBlocks})
			if err == nil {
				made = true
				b.mu.Lock()
				b.last, b.info = &sb, &info
				b.mu.Unlock()
			}
			return err
		})
	}
	if err == nil && made {
		_, err = backup.Prune(b.dir, max(b.c.Keep, 1))
	}
	b.mu.Lock()
	was := b.err
	b.err = err
	b.mu.Unlock()
	switch {
	case err != nil && errors.Is(err, context.Canceled):
	case err != nil:
		b.log.Error("the metadata could not be backed up", "dir", b.dir, "error", err)
		if was == nil {
			b.tell(api.EventBackup, "pool", err.Error())
		}
	case made:
		b.log.Info("metadata backed up", "file", info.Path, "bytes", info.Bytes)
		b.tell(api.EventBackup, "pool", info.Path)
	}
	return info, err
}

// unchanged reports whether a state has been backed up.
func (b *backups) unchanged(sb *thin.Superblock) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	l := b.last
	return l != nil && l.MappingRoot == sb.MappingRoot && l.DetailsRoot == sb.DetailsRoot && l.TransactionID == sb.TransactionID &&
		l.Time == sb.Time && l.DataMap == sb.DataMap
}

// status says where the backups are and how the last one went.
func (b *backups) status() api.BackupStatus {
	b.mu.Lock()
	defer b.mu.Unlock()
	s := api.BackupStatus{Dir: b.dir, Keep: b.c.Keep, Interval: api.Duration(b.c.Interval), Last: b.info}
	if b.err != nil {
		s.Error = b.err.Error()
	}
	return s
}

// note is what an operator should know.
func (b *backups) note() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.err == nil {
		return ""
	}
	return fmt.Sprintf("the metadata could not be backed up to %s: %v", b.dir, b.err)
}
