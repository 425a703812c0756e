package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"runtime/debug"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"mica/daemon/api"
	"mica/engine"
	"mica/layer"
)

// parts is what the API works on. All of it must be safe for concurrent use.
type parts struct {
	store layer.API
	pool  engine.Pool
	// importFile and importStream bring an image into the store and tell op how far they are.
	importFile   func(ctx context.Context, op *operation, file string, p api.ImportParams) (api.ImportResult, error)
	importStream func(ctx context.Context, op *operation, r io.Reader, p api.ImportParams) (api.ImportResult, error)
	// check looks through the pool's metadata as of its last commit. Nil: it cannot be done.
	check func(ctx context.Context, op *operation) (api.CheckResult, error)
	// addDevices puts further block devices under the pool. Nil: the pool is not on LVM.
	addDevices func(ctx context.Context, devices []string, force bool) error
	// backups are those of the pool's metadata. Nil: there are none.
	backups *backups
	// stall bounds how long a client may neither send nor take a byte of an archive or a diff.
	stall time.Duration
	// limits bound what a client can hold on to.
	limits apiLimits
	// busy says who uses a node ("mounted on /mnt"), empty if nobody does.
	busy func(node string) []string
	// describe fills in what only the daemon knows: paths, processes, exports.
	describe func(*api.Status)
	// describePool fills in paths and what the host has.
	describePool func(*api.Pool)
	// quit ends the daemon soon after. Everything is detached.
	quit func()
	// nbdTCP tells whether devices can be served over TCP. Nil: no.
	nbdTCP func() bool
	// snaps are containerd's. Nil: there are none.
	snaps snapNodes
	// calls are those of containerd.
	calls func() []callStat
}

// A server answers the API's requests. See routes for what there is.
type server struct {
	parts
	hub     *hub
	ops     *operations
	log     *slog.Logger
	mux     *http.ServeMux
	page    []byte // the OpenAPI page
	closing atomic.Bool
}

func newServer(p parts, h *hub, ops *operations, log *slog.Logger) *server {
	p.limits = p.limits.withDefaults()
	s := &server{parts: p, hub: h, ops: ops, log: log, mux: http.NewServeMux()}
	list := routes()
	s.page = openAPIPage(list)
	for i := range list {
		rt := &list[i]
		s.mux.HandleFunc(rt.method+" "+rt.path, func(w http.ResponseWriter, r *http.Request) { s.serve(w, r, rt) })
	}
	return s
}

// ServeHTTP finds the route. What has none is answered with an api.Error too.
func (s *server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	h, pattern := s.mux.Handler(r)
	if pattern != "" {
		s.mux.ServeHTTP(w, r)
		return
	}
	rec := httptest.NewRecorder()
	h.ServeHTTP(rec, r)
	if rec.Code == http.StatusMethodNotAllowed {
		w.Header().Set("Allow", rec.Header().Get("Allow"))
		sendError(w, api.Errorf(api.CodeMethod, "%s does not take %s, only %s", r.URL.Path, r.Method, rec.Header().Get("Allow")))
		return
	}
	sendError(w, api.Errorf(api.CodeNotFound, "there is no %s; GET /v1/openapi.json lists what there is", r.URL.Path))
}

// errAnswered: the handler has sent the answer itself.
var errAnswered = errors.New("answered")

// serve runs one route. A panic of ours becomes an answer, and is logged; the daemon, which
// others' I/O goes through, lives on.
func (s *server) serve(w http.ResponseWriter, r *http.Request, rt *route) {
	defer func() {
		if v := recover(); v != nil {
			if v == http.ErrAbortHandler {
				panic(v)
			}
			s.log.Error("panic in a request", "method", r.Method, "path", r.URL.Path, "panic", v, "stack", string(debug.Stack()))
			sendError(w, api.Errorf(api.CodeInternal, "%s %s: internal error: %v", rt.method, rt.path, v))
		}
	}()
	if rt.change && s.closing.Load() {
		sendError(w, api.Errorf(api.CodeClosing, "the daemon is shutting down"))
		return
	}
	lift := s.boundBody(w)
	q, err := readRequest(w, r, rt)
	if err == nil { // else the limit stays: what is left of the body is read before the next request
		lift()
		var status int
		var body any
		if status, body, err = rt.handle(s, q); err == nil {
			defer s.boundWrite(w)()
			sendJSON(w, status, body)
			return
		}
	}
	if errors.Is(err, errAnswered) {
		return
	}
	name := ""
	if q != nil {
		name = q.object
	}
	e := s.withHolders(r.Context(), api.FromError(err, name), name)
	level := slog.LevelDebug
	if e.Code == api.CodeInternal {
		level = slog.LevelError
	}
	s.log.Log(r.Context(), level, "request", "method", r.Method, "path", r.URL.Path, "code", e.Code, "error", e.Message)
	defer s.boundWrite(w)()
	sendError(w, e)
}

// withHolders adds who keeps a container's node busy to an error that says that it is.
func (s *server) withHolders(ctx context.Context, e *api.Error, container string) *api.Error {
	if e.Code != api.CodeBusy || e.Details != nil || container == "" {
		return e
	}
	c, err := s.store.Container(ctx, container)
	if err != nil || c.Attachment == nil || c.Attachment.Node == "" {
		return e
	}
	v := *e
	v.Details = map[string]any{"node": c.Attachment.Node, "holders": append([]string{}, s.busy(c.Attachment.Node)...)}
	return &v
}

func sendJSON(w http.ResponseWriter, status int, body any) {
	if body == nil {
		w.WriteHeader(status)
		return
	}
	b, err := json.Marshal(body)
	if err != nil {
		sendError(w, api.Errorf(api.CodeInternal, "encode the answer: %v", err))
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	w.Write(append(b, '\n'))
}

func sendError(w http.ResponseWriter, e *api.Error) { sendJSON(w, e.Status(), e) }

// page cuts one page out of items that were fetched with one more than limit.
func page[T any](items []T, limit int, name func(T) string) api.List[T] {
	l := api.List[T]{Items: items}
	if l.Items == nil {
		l.Items = []T{}
	}
	if limit > 0 && len(items) > limit {
		l.Items = items[:limit]
		l.Next = name(items[limit-1])
	}
	return l
}

// pageSorted is page for a complete list: it sorts by name and skips what the cursor has passed.
func pageSorted[T any](items []T, q *request, name func(T) string) api.List[T] {
	slices.SortFunc(items, func(a, b T) int { return strings.Compare(name(a), name(b)) })
	if c := q.str("cursor"); c != "" {
		items = slices.DeleteFunc(items, func(v T) bool { return name(v) <= c })
	}
	return page(items, limitOf(q), name)
}

// limitOf is the limit parameter as an int; 0: all.
func limitOf(q *request) int { return int(min(q.number("limit"), 1<<30)) }

// filter is the layer.Filter of the list parameters; its limit is one more than what is asked
// for, to see whether there is another page.
func (q *request) filter() (layer.Filter, error) {
	labels, err := q.labels(true)
	if err != nil {
		return layer.Filter{}, err
	}
	f := layer.Filter{Owner: q.str("owner"), Labels: labels, Image: q.str("image"), Prefix: q.str("prefix"), Cursor: q.str("cursor")}
	if n := limitOf(q); n > 0 {
		f.Limit = n + 1
	}
	return f, nil
}

// background starts an operation that goes on when the request has ended.
func (s *server) background(q *request, kind, object string, params any, work func(context.Context, *operation) (any, error)) (int, any, error) {
	ctx, op, fresh, err := s.ops.begin(context.Background(), q.str("operation"), kind, object, params)
	if err != nil {
		return 0, nil, err
	}
	if fresh {
		go s.ops.run(ctx, op, work)
	}
	op.wait(q.Context(), q.duration("wait"))
	return operationAnswer(q, op)
}

// operationAnswer is the answer of a route that starts long work.
func operationAnswer(q *request, op *operation) (int, any, error) {
	v := op.view()
	q.w.Header().Set("Location", "/v1/operations/"+op.id)
	switch v.State {
	case api.OperationRunning:
		return http.StatusAccepted, v, nil
	case api.OperationDone:
		return http.StatusOK, v, nil
	}
	if v.Error == nil {
		return 0, nil, fmt.Errorf("operation %s: %s without an error", v.ID, v.State)
	}
	return 0, nil, v.Error
}
