package space

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"mica/dev"
	"mica/engine"
	"mica/engine/user"
	"mica/internal/trial"
	"mica/thin"
)

const blockSize = 64 << 10

// A sparseWriter writes one sector to blocks all over a large device, each with its own number.
type sparseWriter struct {
	id   thin.DevID
	h    engine.Thin
	rng  *rand.Rand
	mu   sync.Mutex
	have map[int64]uint64 // guarded by mu: block -> number that was acknowledged
	next uint64
}

const sparseBlocks = 1 << 20

// fill writes until the metadata is full, and some more times.
func (w *sparseWriter) fill(limit int) error {
	b := make([]byte, 512)
	for n, refused := 0, 0; n < limit && refused < 5; n++ {
		vb := w.rng.Int64N(sparseBlocks)
		w.next++
		binary.LittleEndian.PutUint64(b, uint64(w.id)<<32|w.next)
		_, err := w.h.WriteAt(b, vb*blockSize)
		switch {
		case err == nil:
			w.mu.Lock()
			w.have[vb] = uint64(w.id)<<32 | w.next
			w.mu.Unlock()
		case errors.Is(err, thin.ErrNoMetaSpace) && errors.Is(err, dev.ErrNoSpace):
			refused++
		default:
			return fmt.Errorf("thin %d, block %d: %w", w.id, vb, err)
		}
	}
	return nil
}

func (w *sparseWriter) check(h engine.Thin) error {
	b := make([]byte, 8)
	for vb, want := range w.have {
		if _, err := h.ReadAt(b, vb*blockSize); err != nil {
			return err
		}
		if got := binary.LittleEndian.Uint64(b); got != want {
			return fmt.Errorf("thin %d, block %d holds %#x, want %#x", w.id, vb, got, want)
		}
	}
	return nil
}

// TestMetadataFullOfMappings fills metadata devices of several sizes with mappings, by four writers
// at the same time, while snapshots come and go. Whatever the size: the pool does not fail, all that
// was acknowledged is there, every discard and every delete works, and then there is room again.
func TestMetadataFullOfMappings(t *testing.T) {
	seed := seed(t)
	sizes := []int64{96, 150, 300, 512}
	if raceEnabled {
		sizes = sizes[:2]
	}
	for _, blocks := range sizes {
		t.Run(fmt.Sprint(blocks), func(t *testing.T) {
			meta, data := dev.NewMem(blocks*4096), dev.NewMem(100_000*blockSize)
			must(t, thin.Format(meta, thin.FormatOptions{DataBlockSize: blockSize, DataBlocks: 100_000}))
			p, err := user.New(meta, data, user.Options{CommitInterval: 5 * time.Millisecond, Logger: trial.Quiet})
			must(t, err)
			defer p.Close()
			var ws []*sparseWriter
			for i := range 4 {
				id := thin.DevID(1 + i)
				must(t, p.CreateThin(ctx, id))
				h, err := p.Open(ctx, id, engine.OpenOptions{SizeBytes: sparseBlocks * blockSize})
				must(t, err)
				ws = append(ws, &sparseWriter{id: id, h: h, rng: rand.New(rand.NewPCG(seed, uint64(i))), have: map[int64]uint64{}})
			}
			stop := make(chan struct{})
			snaps := make(chan error, 1)
			var left []thin.DevID
			go func() { // snapshots, the oldest of which are deleted
				rng := rand.New(rand.NewPCG(seed, 99))
				id := thin.DevID(100)
				for {
					select {
					case <-stop:
						snaps <- nil
						return
					case <-time.After(time.Duration(rng.IntN(3000)) * time.Microsecond):
					}
					id++
					if err := p.CreateSnap(ctx, id, thin.DevID(1+rng.IntN(4))); err == nil {
						left = append(left, id)
					} else if !errors.Is(err, thin.ErrNoMetaSpace) {
						snaps <- err
						return
					}
					if len(left) > 3 {
						if err := p.Delete(ctx, left[0]); err != nil {
							snaps <- err
							return
						}
						left = left[1:]
					}
				}
			}()
			var wg sync.WaitGroup
			for _, w := range ws {
				wg.Add(1)
				go func() {
					defer wg.Done()
					if err := w.fill(50_000); err != nil {
						t.Error(err)
					}
				}()
			}
			wg.Wait()
			close(stop)
			if err := <-snaps; err != nil {
				t.Fatalf("snapshots: %v", err)
			}
			st, err := p.Status(ctx)
			must(t, err)
			n := 0
			for _, w := range ws {
				n += len(w.have)
			}
			t.Logf("%d mappings, %d snapshots in %d metadata blocks, %d of them used; mode %s", n, len(left), blocks, st.MetaUsed, st.Mode)
			if st.FailReason != "" || st.NeedsCheck {
				t.Fatalf("status: %+v", st)
			}
			for _, w := range ws {
				must(t, w.h.Flush())
				must(t, w.check(w.h))
			}
			// Discards never fail. What a snapshot shares may stay, until that is deleted; deletes
			// always work.
			for _, w := range ws {
				for vb := range w.have {
					must(t, w.h.Discard(vb*blockSize, blockSize))
					delete(w.have, vb)
					if len(w.have) < 200 {
						break
					}
				}
				must(t, w.h.Flush())
				must(t, w.check(w.h))
			}
			for _, id := range left {
				must(t, p.Delete(ctx, id))
			}
			for _, w := range ws {
				must(t, w.h.Discard(0, sparseBlocks*blockSize))
				clear(w.have)
				if n := w.h.MappedBlocks(); n != 0 {
					t.Errorf("thin %d maps %d blocks after all was discarded", w.id, n)
				}
				must(t, w.fill(20))
				if len(w.have) == 0 {
					t.Errorf("thin %d: no write went through after everything was discarded", w.id)
				}
				must(t, w.check(w.h))
				must(t, w.h.Close())
				must(t, p.Delete(ctx, w.id))
			}
			st, err = p.Status(ctx)
			must(t, err)
			if st.DataUsed != 0 || st.Devices != 0 || st.Mode != "rw" || st.MetaUsed > 16 {
				t.Errorf("at the end: %+v", st)
			}
			must(t, p.Close())
		})
	}
}
