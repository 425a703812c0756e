// Package backup keeps copies of a pool's metadata, compressed, each of one committed state, a
// bounded number of them in a directory; and it puts a pool back to one.
//
// A file is called metadata-TRANSACTION-TIME.img.zst. Decompressed it is a metadata device, which
// thin_dump and the other tools read. It is no dump in text, because such a dump names the mappings of
// every device by itself: a hundred snapshots of one image would make it a hundred times as long, and
// so the pool that is made from it. A file appears under its name when it is complete and durable.
package backup

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/klauspost/compress/zstd"

	"mica/dev"
	"mica/thin"
)

// An Info is one backup.
type Info struct {
	Path          string    `json:"path"`
	TransactionID uint64    `json:"transaction_id"` // of the pool then
	Time          time.Time `json:"time"`           // when it was made
	Bytes         int64     `json:"bytes"`
}

const timeForm = "20060102T150405.000Z"

var (
	nameForm = regexp.MustCompile(`^metadata-(\d{1,20})-(\d{8}T\d{6}\.\d{3}Z)\.img\.zst$`)
	tempForm = regexp.MustCompile(`^\.metadata-.*\.tmp$`)
)

// staleAfter is how old an unfinished file must be before it is taken for left behind.
const staleAfter = time.Hour

// Options say what to write.
type Options struct {
	Dir string // made if it is missing, for root only
	// DataBlocks is the length of the data device in data blocks, where the view does not know
	// it: that of a metadata snapshot. 0: as the view says.
	DataBlocks uint64
	Now        time.Time // 0: now
}

// Write copies the state that a view holds into a new file; every block is verified on the way. On an
// error nothing is left.
func Write(ctx context.Context, v *thin.View, o Options) (info Info, err error) {
	if o.Now.IsZero() {
		o.Now = time.Now()
	}
	if err := os.MkdirAll(o.Dir, 0o700); err != nil {
		return info, fmt.Errorf("backup: %w", err)
	}
	removeStale(o.Dir, o.Now)
	f, err := os.CreateTemp(o.Dir, ".metadata-*.tmp") // 0600
	if err != nil {
		return info, fmt.Errorf("backup: %w", err)
	}
	defer func() {
		f.Close()
		if err != nil {
			os.Remove(f.Name())
			err = fmt.Errorf("backup: %w", err)
		}
	}()
	if err := compress(ctx, v, f, o); err != nil {
		return info, err
	}
	if err := f.Sync(); err != nil {
		return info, err
	}
	st, err := f.Stat()
	if err != nil {
		return info, err
	}
	info = Info{TransactionID: v.Superblock().TransactionID, Time: o.Now.UTC().Truncate(time.Millisecond), Bytes: st.Size()}
	info.Path = filepath.Join(o.Dir, fmt.Sprintf("metadata-%d-%s.img.zst", info.TransactionID, info.Time.Format(timeForm)))
	if err := os.Rename(f.Name(), info.Path); err != nil {
		return info, err
	}
	return info, dev.SyncDir(o.Dir)
}

func compress(ctx context.Context, v *thin.View, f io.Writer, o Options) error {
	z, err := zstd.NewWriter(f, zstd.WithEncoderConcurrency(1), zstd.WithEncoderCRC(true))
	if err != nil {
		return err
	}
	if err := v.WriteImage(&patient{ctx, z}, o.DataBlocks); err != nil {
		z.Close()
		return err
	}
	return z.Close()
}

// patient is a writer that ends with its context.
type patient struct {
	ctx context.Context
	w   io.Writer
}

func (p *patient) Write(b []byte) (int, error) {
	if err := p.ctx.Err(); err != nil {
		return 0, err
	}
	return p.w.Write(b)
}

// removeStale takes away what a writer that was killed has left.
func removeStale(dir string, now time.Time) {
	list, err := os.ReadDir(dir)
	if err != nil {
		return
	}
	for _, e := range list {
		if st, err := e.Info(); err == nil && tempForm.MatchString(e.Name()) && now.Sub(st.ModTime()) > staleAfter {
			os.Remove(filepath.Join(dir, e.Name()))
		}
	}
}

// List lists the backups in a directory, the newest first; none if there is no such directory.
func List(dir string) ([]Info, error) {
	list, err := os.ReadDir(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list backups: %w", err)
	}
	var all []Info
	for _, e := range list {
		m := nameForm.FindStringSubmatch(e.Name())
		if m == nil {
			continue
		}
		id, err := strconv.ParseUint(m[1], 10, 64)
		t, terr := time.Parse(timeForm, m[2])
		st, serr := e.Info()
		if err != nil || terr != nil || serr != nil || !st.Mode().IsRegular() {
			continue
		}
		all = append(all, Info{filepath.Join(dir, e.Name()), id, t, st.Size()})
	}
	slices.SortFunc(all, func(a, b Info) int {
		return cmp.Or(b.Time.Compare(a.Time), cmp.Compare(b.TransactionID, a.TransactionID), strings.Compare(a.Path, b.Path))
	})
	return all, nil
}

// Prune removes all but the newest keep backups of a directory.
func Prune(dir string, keep int) (removed []Info, err error) {
	list, err := List(dir)
	if err != nil || len(list) <= keep {
		return nil, err
	}
	for _, i := range list[max(keep, 0):] {
		if err := os.Remove(i.Path); err != nil {
			return removed, fmt.Errorf("remove backup: %w", err)
		}
		removed = append(removed, i)
	}
	return removed, nil
}
