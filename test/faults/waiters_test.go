package faults

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"mica/dev"
	"mica/engine"
	"mica/engine/user"
	"mica/internal/trial"
	"mica/thin"
)

// TestFailureEndsWaiting: writes that wait for space, of the pool or of its host, do not wait on when
// the pool fails meanwhile.
func TestFailureEndsWaiting(t *testing.T) {
	const block = 64 << 10
	for _, host := range []bool{false, true} {
		t.Run(fmt.Sprint("host=", host), func(t *testing.T) {
			must := func(err error) {
				t.Helper()
				if err != nil {
					t.Fatal(err)
				}
			}
			meta, data := dev.NewMem(2<<20), dev.NewFault(dev.NewMem(8*block))
			must(thin.Format(meta, thin.FormatOptions{DataBlockSize: block, DataBlocks: 8}))
			p, err := user.New(meta, data, user.Options{CommitInterval: time.Hour, NoSpaceTimeout: time.Hour, Logger: trial.Quiet})
			must(err)
			var hs []engine.Thin
			for id := thin.DevID(1); id <= 3; id++ {
				must(p.CreateThin(ctx, id))
				h, err := p.Open(ctx, id, engine.OpenOptions{SizeBytes: 1 << 20})
				must(err)
				hs = append(hs, h)
			}
			_, err = hs[0].WriteAt(make([]byte, 4096), 0)
			must(err)
			if host {
				data.Add(dev.Rule{Ops: dev.OpWrite, Err: unix.ENOSPC})
			} else {
				_, err = hs[0].WriteAt(make([]byte, 8*block), 0)
				must(err)
			}
			errs := make(chan error, 6)
			for i := range 6 {
				go func() {
					_, err := hs[1+i%2].WriteAt([]byte{1}, int64(i)*block)
					errs <- err
				}()
			}
			for end := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
				st, err := p.Status(ctx)
				must(err)
				if st.WaitingForSpace == 6 {
					break
				}
				if time.Now().After(end) {
					t.Fatalf("%d of 6 writes wait", st.WaitingForSpace)
				}
			}
			data.Clear()
			_, err = hs[0].WriteAt([]byte{2}, 0) // there is something to sync
			must(err)
			data.Add(dev.Rule{Ops: dev.OpFlush, Times: 1, Err: unix.EIO})
			if err := hs[0].Flush(); !errors.Is(err, engine.ErrFailed) {
				t.Fatalf("flush: %v, want ErrFailed", err)
			}
			must(bounded("a write that waits for space in a failed pool", func() error {
				for range 6 {
					if err := <-errs; !errors.Is(err, engine.ErrFailed) {
						return fmt.Errorf("a write that waited: %w, want ErrFailed", err)
					}
				}
				return nil
			}))
			for _, h := range hs {
				must(h.Close())
			}
			if err := p.Close(); !errors.Is(err, engine.ErrFailed) {
				t.Errorf("close: %v, want ErrFailed", err)
			}
		})
	}
}
