package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"mica/daemon/api"
	"mica/daemon/client"
)

// An opProgress shows an operation of the daemon while it runs: a bar for each step on a terminal,
// lines elsewhere.
type opProgress struct {
	p    *progress
	bars map[string]*bar
	done map[string]bool
}

func newOpProgress(cmd *cobra.Command, quiet bool) *opProgress {
	return &opProgress{p: newProgress(cmd, quiet), bars: map[string]*bar{}, done: map[string]bool{}}
}

func (o *opProgress) show(op api.Operation) {
	if o.p.off {
		return
	}
	for _, s := range op.Steps {
		if o.done[s.Name] {
			continue
		}
		b := o.bars[s.Name]
		if b == nil {
			b = o.p.bar(s.Name, s.Unit)
			o.bars[s.Name] = b
		}
		b.set(s.Done, s.Total)
		if s.Ended {
			o.done[s.Name] = true
			b.end()
			if s.Unit == "bytes" {
				o.say("%s: %s\n", s.Name, size(s.Done))
			} else {
				o.say("%s: done\n", s.Name)
			}
		}
	}
}

// say prints a line, above the bars if there are any.
func (o *opProgress) say(format string, args ...any) {
	w := o.p.w
	if o.p.bars != nil {
		w = o.p.bars
	}
	fmt.Fprintf(w, format, args...)
}

// end takes the bars away.
func (o *opProgress) end() {
	for name, b := range o.bars {
		if !o.done[name] {
			b.end()
		}
	}
	o.p.wait()
}

// await waits for an operation, showing it, and returns its result. Ctrl-C cancels it.
func await[T any](cmd *cobra.Command, c *client.Client, op api.Operation) (v T, err error) {
	if op, err = waitFor(cmd, c, op, false); err != nil {
		return v, interrupted(cmd.Context(), err)
	}
	return client.Result[T](op)
}

// watch shows an operation by its id until stop is closed. It may not be there yet.
func watch(ctx context.Context, c *client.Client, id string, o *opProgress, stop <-chan struct{}) {
	for {
		op, err := c.Operation(ctx, id, 0)
		if err == nil {
			o.show(op)
		}
		t := time.NewTimer(300 * time.Millisecond)
		select {
		case <-stop:
			t.Stop()
			return
		case <-t.C:
		}
	}
}

// interrupted says it in a word when Ctrl-C is the reason.
func interrupted(ctx context.Context, err error) error {
	if ctx.Err() != nil && (errors.Is(err, ctx.Err()) || errors.Is(err, context.Cause(ctx))) {
		return errors.New("interrupted: what was begun has been undone")
	}
	return err
}
