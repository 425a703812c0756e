package bench

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/archive"
	"github.com/containerd/containerd/v2/pkg/archive/compression"

	"mica/bench/store"
)

// unpackShape is an image: layers of bytes each, in files of sizes from 1 KiB to 4 MiB.
func (r *runner) unpackShape() (layers int, bytes int64) {
	if r.Quick {
		return 2, 1 << 20
	}
	return 10, 50 << 20
}

// layerTar makes a layer's tar, half of its bytes in small files. The contents are made of words, so that
// gzip leaves about half of them, as it does of programs.
func layerTar(layer int, size int64) ([]byte, error) {
	var b bytes.Buffer
	b.Grow(int(size + size/16))
	w := tar.NewWriter(&b)
	sizes := []int64{1 << 10, 4 << 10, 16 << 10, 64 << 10, 4 << 10, 2 << 10, 256 << 10, 8 << 10}
	rng := rand.New(rand.NewPCG(uint64(layer), 1))
	words := make([][]byte, 2048)
	for i := range words {
		words[i] = make([]byte, 2+rng.IntN(12))
		for k := range words[i] {
			words[i][k] = byte(rng.Uint32())
		}
	}
	dir, data := "", make([]byte, 0, 4<<20)
	for n, left := 0, size; left > 0; n++ {
		if n%50 == 0 {
			dir = fmt.Sprintf("l%d/d%d/", layer, n/50)
			if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: dir, Mode: 0o755}); err != nil {
				return nil, err
			}
		}
		s := sizes[n%len(sizes)]
		if n%40 == 39 {
			s = 4 << 20
		}
		s = min(s, left)
		data = data[:0]
		for int64(len(data)) < s {
			data = append(data, words[rng.IntN(len(words))]...)
		}
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: fmt.Sprintf("%sf%d", dir, n), Mode: 0o644, Size: s}); err != nil {
			return nil, err
		}
		if _, err := w.Write(data[:s]); err != nil {
			return nil, err
		}
		left -= s
	}
	err := w.Close()
	return b.Bytes(), err
}

func gzipped(b []byte) ([]byte, error) {
	var z bytes.Buffer
	w := gzip.NewWriter(&z)
	if _, err := w.Write(b); err != nil {
		return nil, err
	}
	err := w.Close()
	return z.Bytes(), err
}

// unpack measures how long an image's layers take, and what they then occupy.
func (r *runner) unpack(ctx context.Context, id string) error {
	ctx = inNamespace(ctx)
	layers, size := r.unpackShape()
	var tars, blobs [][]byte
	for i := range layers {
		t, err := layerTar(i, size)
		if err != nil {
			return err
		}
		z, err := gzipped(t)
		if err != nil {
			return err
		}
		tars, blobs = append(tars, t), append(blobs, z)
	}
	makers := []store.Maker{store.Overlayfs, store.Btrfs, store.Mica(r.Exe)}
	list, why, err := r.stores(ctx, 4*int64(layers)*size+1<<30, makers)
	if err != nil {
		return err
	}
	t := r.table(id, fmt.Sprintf("Unpack an image of %d layers, %d MB", layers, int64(layers)*size/1_000_000), names(makers)...)
	rows := []Row{{Name: "unpack", Unit: "ms", Better: "lower"}, {Name: "space", Unit: "MB", Better: "lower"}, {Name: "remove", Unit: "ms", Better: "lower"}}
	err = r.sweep(ctx, t, rows, on(list, why, func(s *store.Store) sweep {
		return func(ctx context.Context) ([]figure, error) { return r.unpackOnce(ctx, s, blobs) }
	})...)
	if err != nil {
		return err
	}
	err = r.sweep(ctx, t, []Row{{Name: "unpack, layers not compressed", Unit: "ms", Better: "lower"}}, on(list, why, func(s *store.Store) sweep {
		return func(ctx context.Context) ([]figure, error) {
			f, err := r.unpackOnce(ctx, s, tars)
			return f[:min(1, len(f))], err
		}
	})...)
	if err != nil {
		return err
	}
	t.Targets = append(t.Targets, Target{Row: "unpack", Own: "mica", Peer: "overlayfs", Want: 1.2, AtMost: true})
	r.note("layers are unpacked one after another, by every snapshotter; containerd itself may apply them in parallel for overlayfs")
	r.note("layers are compressed with gzip, as registries have them: %d MB together; a layer of mica's is durable when it is committed, one of overlayfs's is when the kernel has written it back", total(blobs)/1_000_000)
	return nil
}

func total(list [][]byte) (n int) {
	for _, b := range list {
		n += len(b)
	}
	return n
}

func (r *runner) unpackOnce(ctx context.Context, s *store.Store, tars [][]byte) ([]figure, error) {
	usedBefore, err := s.Used(ctx)
	if err != nil {
		return nil, err
	}
	var keys []string
	parent := ""
	begin := time.Now()
	for _, layer := range tars {
		key := r.key()
		active := snapshots.UnpackKeyPrefix + "-" + key // as containerd names what it unpacks to
		m, err := s.Prepare(ctx, active, parent)
		if err != nil {
			return nil, err
		}
		err = mount.WithTempMount(ctx, m, func(dir string) error {
			plain, err := compression.DecompressStream(bytes.NewReader(layer))
			if err != nil {
				return err
			}
			_, err = archive.Apply(ctx, dir, plain)
			return errors.Join(err, plain.Close())
		})
		if err != nil {
			return nil, err
		}
		if err := s.Commit(ctx, key, active); err != nil {
			return nil, err
		}
		keys, parent = append(keys, key), key
	}
	took := time.Since(begin)
	used, err := s.Used(ctx)
	if err != nil {
		return nil, err
	}
	begin = time.Now()
	for i := len(keys) - 1; i >= 0; i-- {
		if err := s.Remove(ctx, keys[i]); err != nil {
			return nil, err
		}
	}
	return []figure{{value: ms(took)}, {value: float64(used-usedBefore) / 1e6}, {value: ms(time.Since(begin))}}, nil
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }
