package kernel

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"mica/dev"
	"mica/thin"
)

// The kernel passes discards down, but not deletes: what discardOwn has left of a deleted device
// (blocks that it shared with one deleted before) is free in the pool and keeps its space on the
// host. A trim gives that back. Free blocks may be given away at any moment, so the pool is
// suspended while some are looked up and discarded, for a short time, again and again; nothing
// fails, requests wait. A suspend costs some milliseconds for every active thin device.

// Bounds of one step of a trim.
const (
	trimStepBytes = 256 << 20
	trimStepTime  = 20 * time.Millisecond
	trimPause     = 20 * time.Millisecond // between steps, for those who waited
	trimAfter     = time.Second           // after a delete: others may follow
	trimDevices   = 32                    // with more active ones a pool is not trimmed by itself
)

// A trimmer trims by itself after deletes, in pools on files.
type trimmer struct{ wake chan struct{} }

func (t *trimmer) init() { t.wake = make(chan struct{}, 1) }

func (t *trimmer) later() {
	select {
	case t.wake <- struct{}{}:
	default:
	}
}

// trimLoop trims some time after deletes.
func (p *Pool) trimLoop() {
	defer p.loops.Done()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	go func() {
		<-p.stop
		cancel()
	}()
	for {
		select {
		case <-p.stop:
			return
		case <-p.trim.wake:
		}
		select {
		case <-p.stop:
			return
		case <-time.After(trimAfter):
		}
		p.mu.Lock()
		active := len(p.open) + len(p.left)
		p.mu.Unlock()
		if !p.ours || !p.data.isFile() || p.opts.NoDiscardPassdown || p.opts.ReadOnly || active > trimDevices {
			continue
		}
		if _, err := p.Trim(ctx); err != nil && ctx.Err() == nil {
			p.log.Warn("trim after a delete", "error", err)
		}
	}
}

// Trim gives the contents of free blocks back to the host and returns how many bytes that were: of
// a file what it occupies there, of a block device everything that is free.
func (p *Pool) Trim(ctx context.Context) (int64, error) {
	if !p.ours {
		return 0, fmt.Errorf("trim: %w: the data device of %s is not mica's to discard", ErrForeign, p.src)
	}
	if err := p.writable(); err != nil {
		return 0, fmt.Errorf("trim: %w", err)
	}
	data, err := os.OpenFile(p.data.node, os.O_RDWR, 0)
	if err != nil {
		return 0, fmt.Errorf("trim: %w", err)
	}
	defer data.Close()
	var passed int64
	for next := thin.DataBlock(0); ; {
		if err := ctx.Err(); err != nil {
			return passed, fmt.Errorf("trim: interrupted after %d bytes: %w", passed, err)
		}
		n, end, more, err := p.trimStep(int(data.Fd()), next)
		passed += n
		if err != nil {
			return passed, fmt.Errorf("trim: %w", err)
		}
		if !more {
			return passed, nil
		}
		next = end
		select {
		case <-ctx.Done():
		case <-time.After(trimPause):
		}
	}
}

// trimStep discards free blocks from next on while the pool is suspended.
func (p *Pool) trimStep(data int, next thin.DataBlock) (passed int64, end thin.DataBlock, more bool, err error) {
	p.tableMu.Lock()
	defer p.tableMu.Unlock()
	if err := p.dm.Suspend(p.name, true, true); err != nil { // commits
		return 0, next, false, err
	}
	defer func() {
		if rerr := p.dm.Resume(p.name); rerr != nil {
			err = errors.Join(err, fmt.Errorf("let the pool go on: %w", rerr))
		}
	}()
	v, err := thin.OpenView(beside{p.metaDev})
	if err != nil {
		return 0, next, false, err
	}
	if p.trimming != nil {
		p.trimming()
	}
	begin := time.Now()
	total := v.Superblock().DataMap.NrBlocks
	err = v.FreeData(next, func(r thin.DataRun) (bool, error) {
		for r.Len > 0 {
			step := thin.DataRun{Begin: r.Begin, Len: min(r.Len, uint64(max(1, trimStepBytes/p.bs)))}
			n, err := p.trimRun(data, step)
			passed += n
			end = step.Begin + thin.DataBlock(step.Len)
			r.Begin, r.Len = end, r.Len-step.Len
			if err != nil {
				return false, err
			}
			if passed >= trimStepBytes || time.Since(begin) > trimStepTime {
				more = uint64(end) < total
				return false, nil
			}
		}
		return true, nil
	})
	return passed, end, more, err
}

// trimRun discards one run of free blocks, of a file only what is no hole already.
func (p *Pool) trimRun(data int, r thin.DataRun) (passed int64, err error) {
	off, n := int64(r.Begin)*p.bs, int64(r.Len)*p.bs
	list := []dev.Extent{{Off: off, Len: n}}
	if p.data.isFile() {
		list = nil
		for at := off; at < off+n; {
			es, err := p.data.file.Extents(at, off+n-at)
			if err != nil {
				return 0, err
			}
			for _, e := range es {
				if !e.Hole {
					list = append(list, e)
				}
				at = e.Off + e.Len
			}
		}
	}
	for _, e := range list {
		if err := ioctlRange(data, unix.BLKDISCARD, e.Off, e.Len); err != nil {
			return passed, fmt.Errorf("discard %d bytes at %d of the data device: %w", e.Len, e.Off, err)
		}
		passed += e.Len
	}
	return passed, nil
}
