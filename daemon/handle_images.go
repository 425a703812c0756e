package daemon

import (
	"context"
	"net/http"
	"path/filepath"

	"mica/daemon/api"
	"mica/layer"
)

func (s *server) images(q *request) (int, any, error) {
	f, err := q.filter()
	if err != nil {
		return 0, nil, err
	}
	list, err := s.store.Images(q.Context(), f)
	return http.StatusOK, page(list, limitOf(q), func(i layer.Image) string { return i.Name }), err
}

func (s *server) image(q *request) (int, any, error) {
	i, err := s.store.Image(q.Context(), q.path("name"))
	return http.StatusOK, i, err
}

func (s *server) removeImage(q *request) (int, any, error) {
	return http.StatusNoContent, nil, s.store.RemoveImage(q.Context(), q.path("name"))
}

func (s *server) tagImage(q *request) (int, any, error) {
	i, err := s.store.TagImage(q.Context(), q.path("name"), q.body.(*api.TagImage).Name)
	return http.StatusOK, i, err
}

func (s *server) layers(q *request) (int, any, error) {
	list, err := s.store.Layers(q.Context())
	return http.StatusOK, page(list, 0, func(l layer.Layer) string { return l.ChainID }), err
}

// importImage takes an archive from the body, or the name of a file on this host.
func (s *server) importImage(q *request) (int, any, error) {
	if q.body != nil {
		b := q.body.(*api.ImportFile)
		q.object = b.File
		if !filepath.IsAbs(b.File) {
			return 0, nil, api.Errorf(api.CodeInvalid, "file %q: want an absolute path on the daemon's host", b.File)
		}
		for name := range q.query {
			if name != "operation" && name != "wait" {
				return 0, nil, api.Errorf(api.CodeInvalid, "parameter %q goes into the body here", name)
			}
		}
		return s.background(q, "import", importName(b.Name, b.File), b, func(ctx context.Context, op *operation) (any, error) {
			return s.importFile(ctx, op, b.File, b.ImportParams)
		})
	}
	labels, err := q.labels(false)
	if err != nil {
		return 0, nil, err
	}
	p := api.ImportParams{Name: q.str("name"), Platform: q.str("platform"), Ref: q.str("ref"), Replace: q.flag("replace"), Labels: labels}
	q.object = p.Name
	ctx, op, fresh, err := s.ops.begin(q.Context(), q.str("operation"), "import", importName(p.Name, "stream"), p)
	if err != nil {
		return 0, nil, err
	}
	if !fresh {
		// The archive was or is being sent by an earlier request; this body is not read.
		q.w.Header().Set("Connection", "close")
		op.wait(q.Context(), q.duration("wait"))
		return operationAnswer(q, op)
	}
	body := newStallReader(ctx, q, s.stall)
	s.ops.run(ctx, op, func(ctx context.Context, op *operation) (any, error) {
		return s.importStream(ctx, op, body, p)
	})
	body.done()
	return operationAnswer(q, op)
}

func importName(name, file string) string {
	if name != "" {
		return name
	}
	return file
}
