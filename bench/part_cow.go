package bench

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"mica/bench/store"
)

const aboutCow = "A container changes what its image holds. Each job has a container of its own, mounted before the clock starts; a job ends " +
	"with a sync of its file system. Space is what the container occupies beside its image. "

var cowPart = part{
	id: "cow", title: "What block-level copy-on-write is for",
	about: aboutCow + "native and blockfile are left out: they copy the whole image for every container.",
	run: func(ctx context.Context, r *runner) error {
		return r.cow(ctx, "cow", []store.Maker{store.Overlayfs, store.Btrfs, store.Mica(r.Exe)}, 1000)
	},
}

var cowDiskPart = part{
	id: "cow-disk", title: "Copy-on-write, on a real disk", disk: true,
	about: aboutCow,
	run: func(ctx context.Context, r *runner) error {
		return r.cow(ctx, "cow-disk", []store.Maker{store.Overlayfs, store.Mica(r.Exe)}, 1000)
	},
}

// cowShape is the image: one big file, and a tree of files.
type cowShape struct {
	big     int64 // bytes
	files   int
	created int           // small files that a job creates
	writes  time.Duration // how long databases write
}

func (r *runner) cowShape() cowShape {
	if r.Quick {
		return cowShape{8 << 20, 40, 40, 30 * time.Millisecond}
	}
	return cowShape{r.Size, 2000, 3000, r.Runtime}
}

// A cowJob changes a mounted container. It returns a figure that replaces the time that it took, or 0.
type cowJob struct {
	name string
	unit string // of the first row
	run  func(dir string) (figure, error)
}

func (r *runner) cow(ctx context.Context, id string, makers []store.Maker, firstWrite float64) error {
	ctx = inNamespace(ctx)
	shape := r.cowShape()
	list, why, err := r.stores(ctx, 3*shape.big+2<<30, makers)
	if err != nil {
		return err
	}
	for _, s := range list {
		if s == nil {
			continue
		}
		if err := r.commit(ctx, s, "image", "", func(dir string) error { return shape.image(dir) }); err != nil {
			return fmt.Errorf("%s: %w", s.Name, err)
		}
	}
	t := r.table(id, "Changing an image", names(makers)...)
	for _, j := range shape.jobs() {
		rows := []Row{{Name: j.name, Unit: j.unit, Better: "lower"}, {Name: j.name + ": space", Unit: "KiB", Better: "lower"}}
		if j.unit != "ms" {
			rows[0].Better = "higher"
		}
		if err := r.sweep(ctx, t, rows, on(list, why, func(s *store.Store) sweep {
			return func(ctx context.Context) ([]figure, error) { return r.cowOnce(ctx, s, j) }
		})...); err != nil {
			return err
		}
	}
	t.Targets = append(t.Targets,
		Target{Row: nameFirst(shape) + ": space", Own: "mica", Want: 4 * 64, AtMost: true},
		Target{Row: nameFirst(shape), Own: "mica", Want: 3.7, AtMost: true},
		Target{Row: nameFirst(shape), Own: "mica", Peer: "overlayfs", Want: firstWrite, Gain: true})
	return nil
}

func nameFirst(shape cowShape) string {
	return "first 4 KiB write into a file of " + bytesName(shape.big)
}

// cowOnce does a job in a new container.
func (r *runner) cowOnce(ctx context.Context, s *store.Store, j cowJob) ([]figure, error) {
	key := r.key()
	before, err := s.Used(ctx)
	if err != nil {
		return nil, err
	}
	m, err := s.Prepare(ctx, key, "image")
	if err != nil {
		return nil, err
	}
	var took figure
	var used int64
	err = r.mounted(m, func(dir string) error {
		begin := time.Now()
		f, err := j.run(dir)
		if err != nil {
			return err
		}
		if f.value == 0 {
			f.value = ms(time.Since(begin))
		}
		took = f
		used, err = s.Used(ctx)
		return err
	})
	if err != nil {
		return nil, err
	}
	if err := s.Remove(ctx, key); err != nil {
		return nil, err
	}
	// What was removed is given back in the background.
	if d := s.Daemon(); d != nil {
		for i := 0; i < 200; i++ {
			if now, err := s.Used(ctx); err != nil || now <= before {
				break
			}
			time.Sleep(10 * time.Millisecond)
		}
	}
	return []figure{took, {value: float64(used-before) / 1024}}, nil
}

// image writes the image.
func (s cowShape) image(dir string) error {
	f, err := os.Create(filepath.Join(dir, "big"))
	if err != nil {
		return err
	}
	defer f.Close()
	data := make([]byte, 1<<20)
	for i := range data {
		data[i] = byte(i*13 + i>>10)
	}
	for off := int64(0); off < s.big; off += int64(len(data)) {
		data[0] = byte(off >> 20)
		if _, err := f.Write(data); err != nil {
			return err
		}
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if err := os.Mkdir(filepath.Join(dir, "tree"), 0o755); err != nil {
		return err
	}
	return smallTree(filepath.Join(dir, "tree"), s.files)
}
