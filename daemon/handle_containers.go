package daemon

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"time"

	"mica/daemon/api"
	"mica/layer"
)

func quiesce(z api.Quiesce) layer.QuiesceOptions {
	return layer.QuiesceOptions{Quiesced: z.Quiesced, CrashOK: z.CrashOK, TrustGuest: z.TrustGuest}
}

func (s *server) containers(q *request) (int, any, error) {
	f, err := q.filter()
	if err != nil {
		return 0, nil, err
	}
	list, err := s.store.Containers(q.Context(), f)
	if err != nil {
		return 0, nil, err
	}
	return http.StatusOK, page(fromContainers(list), limitOf(q), func(c api.Container) string { return c.Name }), nil
}

func fromContainers(list []layer.Container) []api.Container {
	out := make([]api.Container, len(list))
	for i, c := range list {
		out[i] = api.FromContainer(c)
	}
	return out
}

func (s *server) createContainer(q *request) (int, any, error) {
	b := q.body.(*api.CreateContainer)
	q.object = b.Name
	if b.SizeBytes < 0 || b.TTL < 0 {
		return 0, nil, api.Errorf(api.CodeInvalid, "container %q: size_bytes and ttl must not be negative", b.Name)
	}
	c, created, err := s.store.Create(q.Context(), layer.CreateOptions{
		Name: b.Name, Image: b.Image, SizeBytes: b.SizeBytes, Labels: b.Labels, TTL: time.Duration(b.TTL)})
	status := http.StatusOK
	if created {
		status = http.StatusCreated
	}
	return status, api.FromContainer(c), err
}

func (s *server) container(q *request) (int, any, error) {
	c, err := s.store.Container(q.Context(), q.path("name"))
	return http.StatusOK, api.FromContainer(c), err
}

func (s *server) updateContainer(q *request) (int, any, error) {
	b := q.body.(*api.UpdateContainer)
	o := layer.UpdateOptions{Labels: b.Labels}
	if b.TTL != nil {
		if *b.TTL < 0 {
			return 0, nil, api.Errorf(api.CodeInvalid, "ttl %s is negative", b.TTL)
		}
		d := time.Duration(*b.TTL)
		o.TTL = &d
	}
	c, err := s.store.Update(q.Context(), q.path("name"), o)
	return http.StatusOK, api.FromContainer(c), err
}

func (s *server) removeContainer(q *request) (int, any, error) {
	return http.StatusNoContent, nil, s.store.Remove(q.Context(), q.path("name"),
		layer.RemoveOptions{Deferred: q.flag("deferred"), Snapshots: q.flag("snapshots")})
}

func (s *server) forkContainer(q *request) (int, any, error) {
	b, name := q.body.(*api.ForkContainer), q.path("name")
	names, err := forkNames(b)
	if err != nil {
		return 0, nil, err
	}
	if b.TTL < 0 {
		return 0, nil, api.Errorf(api.CodeInvalid, "ttl %s is negative", b.TTL)
	}
	r, err := s.store.Fork(q.Context(), name, layer.ForkOptions{
		Names: names, Labels: b.Labels, TTL: time.Duration(b.TTL), QuiesceOptions: quiesce(b.Quiesce)})
	return http.StatusCreated, api.ForkResult{Containers: fromContainers(r.Containers), Level: r.Level}, err
}

// forkNames are the names of the copies.
func forkNames(b *api.ForkContainer) ([]string, error) {
	byCount := b.Count != 0 || b.Prefix != ""
	switch {
	case len(b.Names) > 0 && byCount:
		return nil, api.Errorf(api.CodeInvalid, "fork: give names, or count and prefix, not both")
	case len(b.Names) > api.MaxFork || b.Count > api.MaxFork:
		return nil, api.Errorf(api.CodeInvalid, "fork: %d copies, at most %d", max(len(b.Names), b.Count), api.MaxFork)
	case len(b.Names) > 0:
		return b.Names, nil
	case b.Count < 1 || b.Prefix == "":
		return nil, api.Errorf(api.CodeInvalid, "fork: give names, or a count of at least 1 with a prefix")
	}
	names := make([]string, b.Count)
	for i := range names {
		names[i] = fmt.Sprintf("%s%d", b.Prefix, i+1)
	}
	return names, nil
}

func (s *server) rollbackContainer(q *request) (int, any, error) {
	c, err := s.store.Rollback(q.Context(), q.path("name"), q.body.(*api.RollbackContainer).Snapshot)
	return http.StatusOK, api.FromContainer(c), err
}

func (s *server) commitContainer(q *request) (int, any, error) {
	b, name := q.body.(*api.CommitContainer), q.path("name")
	if b.Image == "" {
		return 0, nil, api.Errorf(api.CodeInvalid, "commit: image names the new image and must not be empty")
	}
	return s.background(q, "commit", name, b, func(ctx context.Context, _ *operation) (any, error) {
		return s.store.Commit(ctx, name, layer.CommitOptions{Image: b.Image, Replace: b.Replace, Author: b.Author,
			Comment: b.Comment, Labels: b.Labels, QuiesceOptions: quiesce(b.Quiesce)})
	})
}

// diffContainer streams. An error before the first byte is an answer like any other; a later one
// cuts the connection, so that nobody takes the part for the whole.
func (s *server) diffContainer(q *request) (int, any, error) {
	o := layer.DiffOptions{Snapshot: q.str("snapshot"), QuiesceOptions: layer.QuiesceOptions{
		Quiesced: q.flag("quiesced"), CrashOK: q.flag("crash_ok"), TrustGuest: q.flag("trust_guest")}}
	w := &lateWriter{w: q.w, c: http.NewResponseController(q.w), limit: s.stall}
	level, err := s.store.Diff(q.Context(), q.path("name"), w, o)
	if err != nil && !w.begun {
		return 0, nil, err
	}
	if err != nil {
		s.log.Warn("diff cut short", "container", q.object, "error", err)
		panic(http.ErrAbortHandler)
	}
	w.begin()
	w.done()
	q.w.Header().Set(api.TrailerLevel, string(level))
	return 0, nil, errAnswered
}

func (s *server) resizeContainer(q *request) (int, any, error) {
	n := q.body.(*api.ResizeContainer).SizeBytes
	if n <= 0 {
		return 0, nil, api.Errorf(api.CodeInvalid, "resize: size_bytes is %d", n)
	}
	c, err := s.store.Resize(q.Context(), q.path("name"), n)
	return http.StatusOK, api.FromContainer(c), err
}

func (s *server) noteMount(q *request) (int, any, error) {
	return http.StatusNoContent, nil, s.store.NoteMount(q.Context(), q.path("name"), q.body.(*api.MountNote).Directory)
}

func (s *server) forgetMount(q *request) (int, any, error) {
	return http.StatusNoContent, nil, s.store.ForgetMount(q.Context(), q.path("name"), q.body.(*api.MountNote).Directory)
}

func (s *server) snapshots(q *request) (int, any, error) {
	var names []string
	if c := q.str("container"); c != "" {
		q.object = c
		names = []string{c}
	} else {
		list, err := s.store.Containers(q.Context(), layer.Filter{})
		if err != nil {
			return 0, nil, err
		}
		for _, c := range list {
			if c.Snapshots > 0 {
				names = append(names, c.Name)
			}
		}
	}
	var all []layer.Snapshot
	for _, name := range names {
		list, err := s.store.Snapshots(q.Context(), name)
		if errors.Is(err, layer.ErrNotFound) && q.str("container") == "" {
			continue // removed meanwhile
		}
		if err != nil {
			return 0, nil, err
		}
		all = append(all, list...)
	}
	return http.StatusOK, pageSorted(all, q, func(p layer.Snapshot) string { return p.Container + "/" + p.Name }), nil
}

func (s *server) createSnapshot(q *request) (int, any, error) {
	b := q.body.(*api.CreateSnapshot)
	q.object = b.Container
	p, err := s.store.Snapshot(q.Context(), b.Container, layer.SnapshotOptions{Name: b.Name, Labels: b.Labels, QuiesceOptions: quiesce(b.Quiesce)})
	if b.Name != "" && errors.Is(err, layer.ErrExists) {
		if old, ok := s.findSnapshot(q, b.Container, b.Name); ok && sameLabels(old.Labels, b.Labels) {
			return http.StatusOK, old, nil
		}
	}
	return http.StatusCreated, p, err
}

func sameLabels(a, b map[string]string) bool {
	if len(a) != len(b) {
		return false
	}
	for k, v := range a {
		if w, ok := b[k]; !ok || v != w {
			return false
		}
	}
	return true
}

func (s *server) findSnapshot(q *request, container, name string) (layer.Snapshot, bool) {
	list, err := s.store.Snapshots(q.Context(), container)
	if err == nil {
		for _, p := range list {
			if p.Name == name {
				return p, true
			}
		}
	}
	return layer.Snapshot{}, false
}

func (s *server) snapshot(q *request) (int, any, error) {
	name, container := q.path("snapshot"), q.path("container")
	if _, err := s.store.Container(q.Context(), container); err != nil {
		return 0, nil, err
	}
	if p, ok := s.findSnapshot(q, container, name); ok {
		return http.StatusOK, p, nil
	}
	q.object = name
	return 0, nil, api.Errorf(api.CodeNotFound, "snapshot %q of container %q: not found", name, container)
}

func (s *server) removeSnapshot(q *request) (int, any, error) {
	container, name := q.path("container"), q.path("snapshot")
	return http.StatusNoContent, nil, s.store.RemoveSnapshot(q.Context(), container, name)
}
