package bench

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"os"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/pkg/archive"

	"mica/bench/store"
)

// unpackShape is an image: layers of bytes each, in files of sizes from 1 KiB to 4 MiB.
func (r *runner) unpackShape() (layers int, bytes int64) {
	if r.Quick {
		return 2, 1 << 20
	}
	return 10, 50 << 20
}

// layerTar makes a layer's tar in a file: half of the bytes in small files.
func layerTar(path string, layer int, size int64) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	w := tar.NewWriter(f)
	sizes := []int64{1 << 10, 4 << 10, 16 << 10, 64 << 10, 4 << 10, 2 << 10, 256 << 10, 8 << 10}
	data := make([]byte, 4<<20)
	for i := range data {
		data[i] = byte(i*31 + i>>12 + layer)
	}
	dir := ""
	for n, left := 0, size; left > 0; n++ {
		if n%50 == 0 {
			dir = fmt.Sprintf("l%d/d%d/", layer, n/50)
			if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: dir, Mode: 0o755}); err != nil {
				return err
			}
		}
		s := sizes[n%len(sizes)]
		if n%40 == 39 {
			s = 4 << 20
		}
		s = min(s, left)
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: fmt.Sprintf("%sf%d", dir, n), Mode: 0o644, Size: s}); err != nil {
			return err
		}
		if _, err := w.Write(data[int64(n)%4096 : int64(n)%4096+min(s, 4<<20-4096)]); err != nil {
			return err
		}
		if rest := s - min(s, 4<<20-4096); rest > 0 {
			if _, err := w.Write(data[:rest]); err != nil {
				return err
			}
		}
		left -= s
	}
	return w.Close()
}

// unpack measures how long an image's layers take, and what they then occupy.
func (r *runner) unpack(ctx context.Context, id string) error {
	ctx = inNamespace(ctx)
	layers, size := r.unpackShape()
	var tars [][]byte
	for i := range layers {
		path := r.path(fmt.Sprintf("layer%d.tar", i))
		if err := layerTar(path, i, size); err != nil {
			return err
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		os.Remove(path)
		tars = append(tars, b)
	}
	makers := []store.Maker{store.Overlayfs, store.Btrfs, store.Mica(r.Exe)}
	list, why, err := r.stores(ctx, 4*int64(layers)*size+1<<30, makers)
	if err != nil {
		return err
	}
	t := r.table(id, fmt.Sprintf("Unpack an image of %d layers, %d MB", layers, int64(layers)*size/1_000_000), names(makers)...)
	rows := []Row{{Name: "unpack", Unit: "ms", Better: "lower"}, {Name: "space", Unit: "MB", Better: "lower"}, {Name: "remove", Unit: "ms", Better: "lower"}}
	err = r.sweep(ctx, t, rows, on(list, why, func(s *store.Store) sweep {
		return func(ctx context.Context) ([]figure, error) { return r.unpackOnce(ctx, s, tars) }
	})...)
	if err != nil {
		return err
	}
	t.Targets = append(t.Targets, Target{Row: "unpack", Own: "mica", Peer: "overlayfs", Want: 1.2, AtMost: true})
	r.note("layers are unpacked one after another, by every snapshotter; containerd itself may apply them in parallel for overlayfs")
	return nil
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
		m, err := s.Prepare(ctx, key+"-active", parent)
		if err != nil {
			return nil, err
		}
		err = mount.WithTempMount(ctx, m, func(dir string) error {
			_, err := archive.Apply(ctx, dir, bytes.NewReader(layer))
			return err
		})
		if err != nil {
			return nil, err
		}
		if err := s.Commit(ctx, key, key+"-active"); err != nil {
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
