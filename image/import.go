package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync/atomic"
	"time"

	"mica/layer"
)

// ImportOptions say what Import takes from an archive, and under which name.
type ImportOptions struct {
	// Name is the name to give to the image; the archive must then hold one image, or Select
	// choose one. Without it images keep the names that the archive has.
	Name string
	// Select takes only the image that the archive has under this name.
	Select string
	// Replace moves a name that stands for another image. Without it that is layer.ErrExists,
	// before anything is done.
	Replace bool
	Labels  map[string]string
	// Progress, if not nil, is called for every layer when it begins and ends, and every few
	// hundred milliseconds between; one call at a time.
	Progress func(Progress)
}

// Layer states in Progress.
const (
	StateExists   = "exists"   // the store has the layer, nothing is read
	StateApplying = "applying" // Stored of Size bytes were read
	StateDone     = "done"
)

// Progress says how far one layer of an import is.
type Progress struct {
	Image  string `json:"image"`
	Layer  int    `json:"layer"`  // 1 is the lowest
	Layers int    `json:"layers"` // of the image
	DiffID string `json:"diff_id"`
	State  string `json:"state"`
	Stored int64  `json:"stored_bytes"` // read so far, as stored in the archive
	Size   int64  `json:"size_bytes"`   // of the layer, as stored
}

// Imported is one image that Import brought in.
type Imported struct {
	layer.Image
	NewLayers int  `json:"new_layers"` // that the store did not have
	Existed   bool `json:"existed"`    // the name stood for this very image already
}

// Import brings the images of an archive into a store. All layers are applied and checked
// before the first name becomes visible. If anything fails, or ctx is cancelled, nothing
// remains of it (names that Replace moved before a later one failed stay moved), and the import
// can be repeated. Layers that the store has are not read.
func Import(ctx context.Context, s LayerStore, a *Archive, o ImportOptions) ([]Imported, error) {
	jobs, err := plan(a, o)
	if err != nil {
		return nil, err
	}
	for i := range jobs {
		if err := jobs[i].lookUp(ctx, s, o); err != nil {
			return nil, err
		}
	}
	defer func() {
		for i := range jobs {
			jobs[i].abort(ctx)
		}
	}()
	for i := range jobs {
		if err := jobs[i].apply(ctx, s, o); err != nil {
			return nil, fmt.Errorf("import %s: %w", quote(jobs[i].name), err)
		}
	}
	var done []Imported
	for i := range jobs {
		j := &jobs[i]
		im, err := j.commit(ctx, o)
		if err != nil {
			err = fmt.Errorf("import %s: %w", quote(j.name), err)
			return nil, errors.Join(err, takeBack(ctx, s, jobs[:i]))
		}
		done = append(done, Imported{Image: im, NewLayers: j.applied, Existed: j.existed})
	}
	return done, nil
}

// cleanupTime bounds what is done after a failure, when ctx may be cancelled already.
const cleanupTime = 2 * time.Minute

// takeBack removes names that were new, after a later one failed.
func takeBack(ctx context.Context, s LayerStore, jobs []job) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupTime)
	defer cancel()
	var errs []error
	for _, j := range jobs {
		if j.known {
			continue
		}
		if err := s.RemoveImage(ctx, j.name); err != nil {
			errs = append(errs, fmt.Errorf("take back image %s: %w", quote(j.name), err))
		}
	}
	return errors.Join(errs...)
}

// A job is one name to import.
type job struct {
	name    string
	im      *Image
	known   bool // the name was there before
	existed bool // as this very image
	session layer.Import
	applied int
}

// plan decides which images get which names.
func plan(a *Archive, o ImportOptions) ([]job, error) {
	images := a.Images()
	if o.Select != "" {
		i := slices.IndexFunc(images, func(im Image) bool { return slices.Contains(im.Names, o.Select) })
		if i < 0 {
			return nil, fmt.Errorf("the archive has no image %s, only %s: %w", quote(o.Select), nameList(images), layer.ErrNotFound)
		}
		images = images[i : i+1]
	}
	if o.Name != "" {
		if len(images) != 1 {
			return nil, fmt.Errorf("one name, %s, for %d images (%s): select one: %w", quote(o.Name), len(images), nameList(images), ErrInvalid)
		}
		return []job{{name: o.Name, im: &images[0]}}, nil
	}
	var jobs []job
	for i := range images {
		im := &images[i]
		names := im.Names
		if o.Select != "" {
			names = []string{o.Select}
		}
		if len(names) == 0 {
			return nil, fmt.Errorf("image %s has no name in the archive: give it one: %w", im.Digest, ErrInvalid)
		}
		for _, n := range names {
			jobs = append(jobs, job{name: n, im: im})
		}
	}
	return jobs, nil
}

func nameList(images []Image) string {
	const most = 20
	s, n := "", 0
	for _, im := range images {
		names := im.Names
		if len(names) == 0 {
			names = []string{string(im.Digest)}
		}
		for _, name := range names {
			if n++; n > most {
				continue
			}
			if s != "" {
				s += ", "
			}
			s += quote(name)
		}
	}
	if n > most {
		s += fmt.Sprintf(" and %d more", n-most)
	}
	return s
}

// lookUp sees whether the name is taken.
func (j *job) lookUp(ctx context.Context, s LayerStore, o ImportOptions) error {
	old, err := s.Image(ctx, j.name)
	if errors.Is(err, layer.ErrNotFound) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("import %s: %w", quote(j.name), err)
	}
	j.known, j.existed = true, old.Digest == string(j.im.Digest)
	if !j.existed && !o.Replace {
		return fmt.Errorf("import %s: the name stands for image %s, not %s: %w", quote(j.name), old.Digest, j.im.Digest, layer.ErrExists)
	}
	return nil
}

// apply opens the session and brings in the layers that are missing.
func (j *job) apply(ctx context.Context, s LayerStore, o ImportOptions) error {
	var err error
	if j.session, err = s.BeginImport(ctx); err != nil {
		return err
	}
	parent := ""
	for i, l := range j.im.Layers {
		if err := ctx.Err(); err != nil {
			return err
		}
		report := func(state string, stored int64) {
			if o.Progress != nil {
				o.Progress(Progress{Image: j.name, Layer: i + 1, Layers: len(j.im.Layers), DiffID: string(l.DiffID),
					State: state, Stored: stored, Size: l.Size})
			}
		}
		_, err := j.session.Layer(ctx, string(l.ChainID))
		switch {
		case err == nil:
			report(StateExists, 0)
		case !errors.Is(err, layer.ErrNotFound):
			return fmt.Errorf("%s: %w", l.what, err)
		default:
			fresh, err := j.applyLayer(ctx, parent, l, report)
			if err != nil {
				return err
			}
			if fresh {
				j.applied++
			}
		}
		parent = string(l.ChainID)
	}
	return nil
}

// applyLayer streams one layer into the store. fresh is false if somebody else made it meanwhile.
func (j *job) applyLayer(ctx context.Context, parent string, l Layer, report func(string, int64)) (fresh bool, err error) {
	r, err := l.open(ctx)
	if err != nil {
		return false, err
	}
	defer r.Close()
	report(StateApplying, 0)
	pr := &progressReader{r: r, report: func() { report(StateApplying, r.stored()) }, next: time.Now().Add(progressEvery)}
	_, err = j.session.ApplyLayer(ctx, layer.LayerSpec{ParentChain: parent, ChainID: string(l.ChainID), DiffID: string(l.DiffID)}, pr)
	pr.ended.Store(true)
	n, rerr := r.result()
	if err != nil {
		switch {
		case rerr == nil || rerr == io.EOF || ctx.Err() != nil:
			return false, fmt.Errorf("%s: %w", l.what, err)
		case errors.Is(err, rerr): // it names the layer
			return false, err
		}
		// The reader's reason says more than what the store made of it.
		return false, fmt.Errorf("%w (%w)", rerr, err)
	}
	if pr.read.Load() && rerr != io.EOF {
		return false, fmt.Errorf("%s: the store took it without reading it to its end (%d bytes uncompressed so far)", l.what, n)
	}
	report(StateDone, l.Size)
	return pr.read.Load(), nil
}

const progressEvery = 200 * time.Millisecond

// progressReader reports between reads, until it ended.
type progressReader struct {
	r      io.Reader
	read   atomic.Bool
	ended  atomic.Bool
	report func()
	next   time.Time
}

func (p *progressReader) Read(b []byte) (int, error) {
	p.read.Store(true)
	if now := time.Now(); now.After(p.next) && !p.ended.Load() {
		p.next = now.Add(progressEvery)
		p.report()
	}
	return p.r.Read(b)
}

func (j *job) commit(ctx context.Context, o ImportOptions) (layer.Image, error) {
	if err := ctx.Err(); err != nil {
		return layer.Image{}, err
	}
	chain := ""
	if n := len(j.im.Layers); n > 0 {
		chain = string(j.im.Layers[n-1].ChainID)
	}
	return j.session.Commit(ctx, layer.ImageSpec{
		Name: j.name, ChainID: chain, Config: j.im.RawConfig, Digest: string(j.im.Digest), MediaType: j.im.MediaType,
		Platform: j.im.Platform.String(), Labels: o.Labels, Replace: o.Replace,
	})
}

// abort ends the session if it is still open; after a commit it does nothing.
func (j *job) abort(ctx context.Context) {
	if j.session == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupTime)
	defer cancel()
	// The store takes back what a session leaves, at its next start at the latest.
	_ = j.session.Abort(ctx)
}
