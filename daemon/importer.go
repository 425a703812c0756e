package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"mica/daemon/api"
	"mica/daemon/config"
	"mica/image"
	"mica/layer"
	"mica/layer/archive"
)

// An importer brings archives into a store and tells operations how far it is.
type importer struct {
	store image.LayerStore
	spool string // directory for archives that cannot be read twice
	c     config.Images
}

// layerLimits are the configuration's bounds as the layer store wants them.
func layerLimits(c config.Images) archive.Limits {
	return archive.Limits{MaxName: int(c.MaxName), MaxEntries: int64(c.MaxEntries), MaxBytes: int64(c.MaxLayer), MaxTar: int64(c.MaxLayer),
		MaxRatio: int64(c.MaxRatio), MaxXattr: int(c.MaxXattrs)}
}

func (im *importer) options(p api.ImportParams) (image.Options, error) {
	o := image.Options{SpoolDir: im.spool, MaxLayer: int64(im.c.MaxLayer), MaxSpool: int64(im.c.MaxArchive), MaxRatio: int64(im.c.MaxRatio)}
	if p.Platform != "" {
		var err error
		if o.Platform, err = image.ParsePlatform(p.Platform); err != nil {
			return o, api.Errorf(api.CodeInvalid, "%v", err)
		}
	}
	return o, nil
}

func (im *importer) file(ctx context.Context, op *operation, file string, p api.ImportParams) (api.ImportResult, error) {
	o, err := im.options(p)
	if err != nil {
		return api.ImportResult{}, err
	}
	a, err := image.Open(ctx, file, o)
	if errors.Is(err, os.ErrNotExist) {
		return api.ImportResult{}, &api.Error{Code: api.CodeNotFound, Message: err.Error(), Name: file}
	}
	if err != nil {
		return api.ImportResult{}, archiveError(err)
	}
	return im.archive(ctx, op, a, p)
}

func (im *importer) stream(ctx context.Context, op *operation, r io.Reader, p api.ImportParams) (api.ImportResult, error) {
	o, err := im.options(p)
	if err != nil {
		return api.ImportResult{}, err
	}
	received := &countingReader{r: r, step: op.step("archive", "bytes", 0)}
	a, err := image.OpenStream(ctx, received, o)
	if err != nil {
		return api.ImportResult{}, archiveError(err)
	}
	received.step.ended()
	return im.archive(ctx, op, a, p)
}

func (im *importer) archive(ctx context.Context, op *operation, a *image.Archive, p api.ImportParams) (_ api.ImportResult, err error) {
	defer func() { err = errors.Join(err, a.Close()) }()
	done, err := image.Import(ctx, im.store, a, image.ImportOptions{
		Name: p.Name, Select: p.Ref, Replace: p.Replace, Labels: p.Labels,
		Progress: func(v image.Progress) {
			st := op.step(stepName(v), "bytes", v.Size)
			switch v.State {
			case image.StateApplying:
				st.set(v.Stored, v.Size)
			default:
				st.ended()
			}
		},
	})
	if err != nil {
		return api.ImportResult{}, archiveError(err)
	}
	r := api.ImportResult{Images: []api.Imported{}}
	for _, i := range done {
		r.Images = append(r.Images, api.Imported{Image: i.Image, NewLayers: i.NewLayers, Existed: i.Existed})
	}
	return r, nil
}

// stepName names a layer: "layer 2 of 3 (4f5e6d7c8b9a)".
func stepName(v image.Progress) string {
	id := v.DiffID
	if len(id) > 19 {
		id = id[7:19]
	}
	return fmt.Sprintf("layer %d of %d (%s)", v.Layer, v.Layers, id)
}

// archiveError gives the archive's faults their code. What the store says keeps its own.
func archiveError(err error) error {
	code := api.FromError(err, "").Code
	switch {
	case code != api.CodeInternal:
		return err
	case errors.Is(err, image.ErrDigest):
		code = api.CodeDigest
	case errors.Is(err, image.ErrInvalid), errors.Is(err, image.ErrLimit), errors.Is(err, io.ErrUnexpectedEOF):
		code = api.CodeInvalid
	case errors.Is(err, archive.ErrEscape), errors.Is(err, archive.ErrInvalid), errors.Is(err, archive.ErrLimit): // of a layer
		code = api.CodeInvalid
	default:
		return err
	}
	return &api.Error{Code: code, Message: err.Error()}
}

// A countingReader shows how much of a stream has come.
type countingReader struct {
	r    io.Reader
	n    int64
	step *step
}

func (c *countingReader) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	c.step.set(c.n, 0)
	return n, err
}

var _ image.LayerStore = layer.API(nil)
