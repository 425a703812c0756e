package main

import (
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"
	"golang.org/x/sys/unix"
)

// progressPeriod is how often long work says on a plain stream how far it is.
const progressPeriod = 5 * time.Second

// isTerminal reports whether w is a terminal.
func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}

// A progress shows how far long work is, on standard error: bars on a terminal, a plain line
// now and then elsewhere. Safe for concurrent use.
type progress struct {
	w    io.Writer
	bars *mpb.Progress // nil: plain lines
	off  bool
}

// newProgress makes a progress for a command; with off it shows nothing.
func newProgress(cmd *cobra.Command, off bool) *progress {
	p := &progress{w: cmd.ErrOrStderr(), off: off}
	if !off && isTerminal(p.w) {
		p.bars = mpb.New(mpb.WithOutput(p.w), mpb.WithWidth(48))
	}
	return p
}

// wait returns when all bars have ended.
func (p *progress) wait() {
	if p.bars != nil {
		p.bars.Wait()
	}
}

// A bar is one part of the work.
type bar struct {
	p          *progress
	name, unit string // unit "bytes" is shown as sizes
	mu         sync.Mutex
	b          *mpb.Bar  // guarded by mu, as is last
	last       time.Time // when a plain line was printed
}

// bar starts a part of the work.
func (p *progress) bar(name, unit string) *bar {
	return &bar{p: p, name: name, unit: unit, last: time.Now()}
}

// newBar makes the only bar of a command.
func newBar(cmd *cobra.Command, name, unit string, off bool) *bar {
	return newProgress(cmd, off).bar(name, unit)
}

// set says that done of total are through; total 0 is unknown.
func (b *bar) set(done, total int64) {
	if b.p.off {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.p.bars == nil {
		if time.Since(b.last) >= progressPeriod {
			b.last = time.Now()
			fmt.Fprintf(b.p.w, "%s: %s\n", b.name, b.amount(done, total))
		}
		return
	}
	if b.b == nil {
		counters := decor.CountersNoUnit("%d / %d "+b.unit, decor.WCSyncWidth)
		if b.unit == "bytes" {
			counters = decor.CountersKibiByte("% .1f / % .1f", decor.WCSyncWidth)
		}
		b.b = b.p.bars.AddBar(total, mpb.PrependDecorators(decor.Name(b.name, decor.WCSyncSpaceR)),
			mpb.AppendDecorators(counters), mpb.BarRemoveOnComplete())
	}
	b.b.SetTotal(total, false)
	b.b.SetCurrent(done)
}

func (b *bar) amount(done, total int64) string {
	show := func(n int64) string {
		if b.unit == "bytes" {
			return size(n)
		}
		return fmt.Sprint(n)
	}
	if total <= 0 {
		return show(done) + " " + b.unit
	}
	return fmt.Sprintf("%s of %s %s (%d%%)", show(done), show(total), b.unit, min(100, done*100/total))
}

// end takes the bar away; if it is the only one, the progress ends too.
func (b *bar) end() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.b != nil {
		b.b.Abort(true)
		b.b.Wait()
	}
}
