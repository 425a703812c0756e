package daemon

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"mica/daemon/api"
	"mica/layer"
	"mica/thin"
)

// bench is a server over fakes.
type bench struct {
	*testing.T
	store *fakeStore
	pool  *fakePool
	s     *server
	http  *httptest.Server
	quit  chan struct{}
	page  *openPage
}

func newBench(t *testing.T) *bench {
	b := &bench{T: t, store: newFakeStore(), pool: newFakePool(), quit: make(chan struct{})}
	h := newHub(64, time.Now)
	ops := newOperations(4, h)
	b.s = newServer(parts{
		store: b.store, pool: b.pool,
		importFile: func(ctx context.Context, op *operation, file string, p api.ImportParams) (api.ImportResult, error) {
			if file == "/missing" {
				return api.ImportResult{}, fmt.Errorf("open %s: %w", file, os.ErrNotExist)
			}
			return b.importFake(op, p, 10)
		},
		importStream: func(ctx context.Context, op *operation, r io.Reader, p api.ImportParams) (api.ImportResult, error) {
			body, err := io.ReadAll(r)
			if err != nil {
				return api.ImportResult{}, err
			}
			if string(body) == "bad digest" {
				return api.ImportResult{}, fmt.Errorf("layer 1: %w", layer.ErrDigest)
			}
			return b.importFake(op, p, int64(len(body)))
		},
		check: func(context.Context, *operation) (api.CheckResult, error) {
			return api.CheckResult{Clean: true, Report: thin.Report{Devices: 3, Mappings: 100}}, nil
		},
		busy:         func(string) []string { return b.store.busy["web"] },
		describe:     func(st *api.Status) { st.Version, st.Root, st.Run = "test", "/root", "/run" },
		describePool: func(p *api.Pool) { p.Data, p.Metadata = "/root/pool/data", "/root/pool/metadata" },
		quit:         func() { close(b.quit) },
	}, h, ops, slog.New(slog.NewTextHandler(io.Discard, nil)))
	b.http = httptest.NewServer(b.s)
	b.page = parsePage(t, b.s.page)
	t.Cleanup(func() {
		h.close()
		http.DefaultClient.CloseIdleConnections()
		b.http.Close()
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if err := ops.close(ctx); err != nil {
			t.Error(err)
		}
	})
	return b
}

func (b *bench) importFake(op *operation, p api.ImportParams, n int64) (api.ImportResult, error) {
	st := op.step("layer sha256:ee", "bytes", n)
	st.set(n, n)
	name := p.Name
	if name == "" {
		name = "in-archive:1"
	}
	i := fakeImage(name, "sha256:ee")
	i.Labels = p.Labels
	b.store.mu.Lock()
	defer b.store.mu.Unlock()
	b.store.images[name] = i
	return api.ImportResult{Images: []api.Imported{{Image: i, NewLayers: 1}}}, nil
}

// call makes one request. The answer is checked against the OpenAPI page.
func (b *bench) call(method, path, body string) (int, string) {
	b.Helper()
	return b.callType(method, path, "application/json", body)
}

func (b *bench) callType(method, path, contentType, body string) (int, string) {
	b.Helper()
	req, err := http.NewRequest(method, b.http.URL+path, strings.NewReader(body))
	if err != nil {
		b.Fatal(err)
	}
	if body != "" {
		req.Header.Set("Content-Type", contentType)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		b.Fatal(err)
	}
	defer resp.Body.Close()
	got, err := io.ReadAll(resp.Body)
	if err != nil {
		b.Fatal(err)
	}
	b.page.checkAnswer(b.T, b.s, req, resp, got)
	return resp.StatusCode, string(got)
}

// field reads a field of a JSON object by a path such as "error.code".
func field(t *testing.T, body, path string) any {
	t.Helper()
	var v any
	if err := json.Unmarshal([]byte(body), &v); err != nil {
		t.Fatalf("answer %q: %v", body, err)
	}
	for _, k := range strings.Split(path, ".") {
		switch x := v.(type) {
		case map[string]any:
			v = x[k]
		case []any:
			var i int
			fmt.Sscan(k, &i)
			if i >= len(x) {
				return nil
			}
			v = x[i]
		default:
			return nil
		}
	}
	return v
}

// TestEndpoints goes through every route, its good answers and its errors. The steps of one case
// share a server.
func TestEndpoints(t *testing.T) {
	type step struct {
		method, path, body string
		status             int
		// want: fields of the answer, printed with %v
		want map[string]string
	}
	const create = `{"name":"web","image":"debian:12"}`
	tests := []struct {
		name  string
		setup func(*bench)
		steps []step
	}{
		{"images", nil, []step{
			{"GET", "/v1/images", "", 200, map[string]string{"items.0.name": "debian:12", "items.1.name": "docker.io/library/alpine:3", "next": "<nil>"}},
			{"GET", "/v1/images?limit=1", "", 200, map[string]string{"items.0.name": "debian:12", "items.1": "<nil>", "next": "debian:12"}},
			{"GET", "/v1/images?limit=1&cursor=debian:12", "", 200, map[string]string{"items.0.name": "docker.io/library/alpine:3", "next": "<nil>"}},
			{"GET", "/v1/images?prefix=docker", "", 200, map[string]string{"items.0.name": "docker.io/library/alpine:3"}},
			{"GET", "/v1/images/debian:12", "", 200, map[string]string{"config.os": "linux"}},
			{"GET", "/v1/images/docker.io/library/alpine:3", "", 200, map[string]string{"chain_id": "sha256:bb"}},
			{"GET", "/v1/images/docker.io%2Flibrary%2Falpine:3", "", 200, map[string]string{"chain_id": "sha256:bb"}},
			{"GET", "/v1/images/none", "", 404, map[string]string{"code": "not_found", "name": "none", "message": `image "none": not found`}},
			{"POST", "/v1/images/docker.io%2Flibrary%2Falpine:3/tags", `{"name":"alpine"}`, 200, map[string]string{"name": "alpine"}},
			{"POST", "/v1/images/none/tags", `{"name":"alpine"}`, 404, map[string]string{"code": "not_found"}},
			{"DELETE", "/v1/images/docker.io/library/alpine:3", "", 204, nil},
			{"DELETE", "/v1/images/docker.io/library/alpine:3", "", 404, nil},
			{"GET", "/v1/layers", "", 200, map[string]string{"items.0.chain_id": "sha256:aa"}},
		}},
		{"import of a file", nil, []step{
			{"POST", "/v1/images?wait=10s&operation=op1", `{"file":"/a.tar","name":"a:1"}`, 200, map[string]string{"state": "done", "result.images.0.name": "a:1", "id": "op1", "steps.0.done": "10"}},
			{"POST", "/v1/images?wait=10s&operation=op1", `{"file":"/a.tar","name":"a:1"}`, 200, map[string]string{"state": "done", "id": "op1"}},
			{"POST", "/v1/images?operation=op1", `{"file":"/b.tar","name":"a:1"}`, 409, map[string]string{"code": "exists", "name": "op1"}},
			{"POST", "/v1/images?wait=10s", `{"file":"/missing"}`, 500, map[string]string{"code": "internal", "message": "open /missing: file does not exist"}},
			{"POST", "/v1/images", `{"file":"a.tar"}`, 400, map[string]string{"code": "invalid"}},
			{"POST", "/v1/images?name=x", `{"file":"/a.tar"}`, 400, map[string]string{"code": "invalid", "message": `parameter "name" goes into the body here`}},
			{"POST", "/v1/images?operation=a/b", `{"file":"/a.tar"}`, 400, map[string]string{"code": "invalid"}},
			{"GET", "/v1/operations/op1", "", 200, map[string]string{"kind": "import", "object": "a:1"}},
			{"DELETE", "/v1/operations/op1", "", 200, map[string]string{"state": "done"}},
			{"GET", "/v1/operations/op1", "", 404, map[string]string{"code": "not_found", "name": "op1"}},
		}},
		{"containers", nil, []step{
			{"POST", "/v1/containers", create, 201, map[string]string{"name": "web", "ttl": "<nil>", "fs_type": "ext4"}},
			{"POST", "/v1/containers", create, 200, map[string]string{"name": "web"}},
			{"POST", "/v1/containers", `{"name":"web","image":"docker.io/library/alpine:3"}`, 409, map[string]string{"code": "exists", "name": "web"}},
			{"POST", "/v1/containers", `{"name":"db","image":"debian:12","size_bytes":21474836480,"labels":{"a":"b"},"ttl":"7d"}`, 201, map[string]string{"ttl": "168h0m0s", "labels.a": "b", "size_bytes": "2.147483648e+10"}},
			{"POST", "/v1/containers", `{"name":"x","image":"none"}`, 404, map[string]string{"code": "not_found"}},
			{"POST", "/v1/containers", `{"name":"a/b","image":"debian:12"}`, 400, map[string]string{"code": "invalid", "name": "a/b"}},
			{"POST", "/v1/containers", `{"name":"x","image":"debian:12","size_bytes":-1}`, 400, map[string]string{"code": "invalid"}},
			{"POST", "/v1/containers", `{"name":"x","image":"debian:12","ttl":"soon"}`, 400, map[string]string{"code": "invalid"}},
			{"GET", "/v1/containers", "", 200, map[string]string{"items.0.name": "db", "items.1.name": "web"}},
			{"GET", "/v1/containers?label=a", "", 200, map[string]string{"items.0.name": "db", "items.1": "<nil>"}},
			{"GET", "/v1/containers?label=a%3Dc", "", 200, map[string]string{"items.0": "<nil>"}},
			{"GET", "/v1/containers?image=debian:12&limit=1", "", 200, map[string]string{"next": "db"}},
			{"GET", "/v1/containers/web", "", 200, map[string]string{"name": "web"}},
			{"GET", "/v1/containers/none", "", 404, map[string]string{"code": "not_found", "name": "none"}},
			{"PATCH", "/v1/containers/db", `{"labels":{"a":null,"c":"d"},"ttl":"0s"}`, 200, map[string]string{"labels.a": "<nil>", "labels.c": "d", "ttl": "<nil>"}},
			{"PATCH", "/v1/containers/db", `{"ttl":"-1s"}`, 400, nil},
			{"POST", "/v1/containers/web/resize", `{"size_bytes":32212254720}`, 200, map[string]string{"size_bytes": "3.221225472e+10"}},
			{"POST", "/v1/containers/web/resize", `{"size_bytes":1}`, 400, map[string]string{"code": "invalid"}},
			{"POST", "/v1/containers/web/resize", `{}`, 400, nil},
			{"POST", "/v1/containers/web/fork", `{"names":["w1","w2"]}`, 201, map[string]string{"containers.1.name": "w2", "level": "file-system"}},
			{"POST", "/v1/containers/web/fork", `{"count":2,"prefix":"f"}`, 201, map[string]string{"containers.0.name": "f1", "containers.1.name": "f2"}},
			{"POST", "/v1/containers/web/fork", `{"names":["w1"]}`, 409, map[string]string{"code": "exists"}},
			{"POST", "/v1/containers/web/fork", `{"names":["a"],"count":2,"prefix":"b"}`, 400, nil},
			{"POST", "/v1/containers/web/fork", `{}`, 400, nil},
			{"POST", "/v1/containers/web/fork", `{"count":2000000000,"prefix":"b"}`, 400, nil},
			{"DELETE", "/v1/containers/w1", "", 204, nil},
			{"DELETE", "/v1/containers/w1", "", 404, nil},
		}},
		{"removing what is busy or has snapshots", func(b *bench) { b.store.busy["web"] = []string{"mounted on /mnt"} }, []step{
			{"POST", "/v1/containers", create, 201, nil},
			{"POST", "/v1/attachments", `{"container":"web"}`, 201, nil},
			{"DELETE", "/v1/containers/web", "", 409, map[string]string{"code": "busy", "details.node": "/dev/loop7", "details.holders": "[mounted on /mnt]"}},
			{"POST", "/v1/snapshots", `{"container":"web","name":"one"}`, 201, nil},
			{"DELETE", "/v1/containers/web?deferred", "", 409, map[string]string{"code": "in_use"}},
			{"DELETE", "/v1/containers/web?deferred=true&snapshots=true", "", 204, nil},
		}},
		{"snapshots and rollback", nil, []step{
			{"POST", "/v1/containers", create, 201, nil},
			{"POST", "/v1/snapshots", `{"container":"web","name":"one","labels":{"k":"v"}}`, 201, map[string]string{"name": "one", "level": "file-system"}},
			{"POST", "/v1/snapshots", `{"container":"web","name":"one","labels":{"k":"v"}}`, 200, map[string]string{"name": "one"}},
			{"POST", "/v1/snapshots", `{"container":"web","name":"one"}`, 409, map[string]string{"code": "exists"}},
			{"POST", "/v1/snapshots", `{"container":"web","crash_ok":true}`, 201, nil},
			{"POST", "/v1/snapshots", `{"container":"none"}`, 404, map[string]string{"name": "none"}},
			{"GET", "/v1/snapshots", "", 200, map[string]string{"items.0.name": "one", "items.0.container": "web"}},
			{"GET", "/v1/snapshots?container=web&limit=1", "", 200, map[string]string{"next": "web/one"}},
			{"GET", "/v1/snapshots?container=none", "", 404, nil},
			{"GET", "/v1/snapshots/web/one", "", 200, map[string]string{"labels.k": "v"}},
			{"GET", "/v1/snapshots/web/two", "", 404, map[string]string{"name": "two"}},
			{"GET", "/v1/snapshots/none/two", "", 404, map[string]string{"name": "none"}},
			{"POST", "/v1/containers/web/rollback", `{"snapshot":"one"}`, 200, map[string]string{"name": "web"}},
			{"POST", "/v1/containers/web/rollback", `{"snapshot":"two"}`, 404, nil},
			{"POST", "/v1/attachments", `{"container":"web"}`, 201, nil},
			{"POST", "/v1/containers/web/rollback", `{"snapshot":"one"}`, 409, map[string]string{"code": "in_use"}},
			{"DELETE", "/v1/snapshots/web/one", "", 204, nil},
			{"DELETE", "/v1/snapshots/web/one", "", 404, nil},
		}},
		{"commit and diff", nil, []step{
			{"POST", "/v1/containers", create, 201, nil},
			{"POST", "/v1/containers/web/commit?wait=10s", `{"image":"mine:1"}`, 200, map[string]string{"state": "done", "result.image.name": "mine:1", "result.level": "file-system"}},
			{"POST", "/v1/containers/web/commit?wait=10s", `{"image":"mine:1"}`, 409, map[string]string{"code": "exists"}},
			{"POST", "/v1/containers/web/commit?wait=10s", `{"image":"mine:1","replace":true}`, 200, nil},
			{"POST", "/v1/containers/none/commit?wait=10s", `{"image":"mine:2"}`, 404, map[string]string{"name": "none"}},
			{"POST", "/v1/containers/web/commit", `{}`, 400, nil},
			{"GET", "/v1/containers/web/diff", "", 200, nil},
			{"GET", "/v1/containers/none/diff", "", 404, map[string]string{"code": "not_found"}},
		}},
		{"attachments", nil, []step{
			{"POST", "/v1/containers", create, 201, nil},
			{"GET", "/v1/attachments/web", "", 404, map[string]string{"message": `container "web" is not attached`}},
			{"POST", "/v1/attachments", `{"container":"web"}`, 201, map[string]string{"container": "web", "node": "/dev/loop7", "as": "block"}},
			{"POST", "/v1/attachments", `{"container":"web","as":"block"}`, 200, nil},
			{"POST", "/v1/attachments", `{"container":"web","as":"nbd"}`, 409, map[string]string{"code": "in_use"}},
			{"POST", "/v1/attachments", `{"container":"web","as":"floppy"}`, 400, nil},
			{"POST", "/v1/attachments", `{"container":"none"}`, 404, nil},
			{"GET", "/v1/attachments", "", 200, map[string]string{"items.0.container": "web"}},
			{"GET", "/v1/attachments/web", "", 200, map[string]string{"link": "/dev/mica/c1"}},
			{"POST", "/v1/containers/web/mounts", `{"directory":"/mnt"}`, 204, nil},
			{"GET", "/v1/attachments/web", "", 200, map[string]string{"mounts": "[/mnt]"}},
			{"DELETE", "/v1/containers/web/mounts", `{"directory":"/mnt"}`, 204, nil},
			{"POST", "/v1/containers/none/mounts", `{"directory":"/mnt"}`, 404, nil},
			{"DELETE", "/v1/attachments/web", "", 204, nil},
			{"DELETE", "/v1/attachments/web", "", 204, nil},
			{"DELETE", "/v1/attachments/none", "", 404, nil},
		}},
		{"detaching what is busy", func(b *bench) { b.store.busy["web"] = []string{"mounted on /mnt", "mounted on /srv"} }, []step{
			{"POST", "/v1/containers", create, 201, nil},
			{"POST", "/v1/attachments", `{"container":"web"}`, 201, nil},
			{"DELETE", "/v1/attachments/web", "", 409, map[string]string{"code": "busy", "details.holders": "[mounted on /mnt mounted on /srv]"}},
		}},
		{"pool", nil, []step{
			{"GET", "/v1/pool", "", 200, map[string]string{"mode": "rw", "data_space_bytes": "1.073741824e+09", "data": "/root/pool/data", "metadata_used_bytes": "81920"}},
			{"GET", "/v1/pool/df", "", 200, map[string]string{"entries.0.kind": "base"}},
			{"POST", "/v1/pool/grow?wait=10s", `{"size_bytes":2147483648}`, 200, map[string]string{"result.data_blocks": "32768"}},
			{"POST", "/v1/pool/grow?wait=10s", `{"size_bytes":65536}`, 400, map[string]string{"code": "invalid"}},
			{"POST", "/v1/pool/grow", `{}`, 400, nil},
			{"POST", "/v1/pool/grow", `{"devices":["/dev/sdb"]}`, 501, map[string]string{"code": "unsupported"}},
			{"POST", "/v1/pool/trim?wait=10s", "", 200, map[string]string{"result.trimmed_bytes": "1.2582912e+07"}},
			{"POST", "/v1/pool/check?wait=10s", "", 200, map[string]string{"result.clean": "true"}},
			{"GET", "/v1/operations", "", 200, map[string]string{"items.0.kind": "grow", "items.2.kind": "trim", "items.3.kind": "check"}},
			{"GET", "/v1/operations?state=failed", "", 200, map[string]string{"items.0.error.code": "invalid", "items.1": "<nil>"}},
			{"GET", "/v1/operations?state=lost", "", 400, nil},
		}},
		{"status", nil, []step{
			{"GET", "/v1/status", "", 200, map[string]string{"version": "test", "store.store_id": "0123456789abcdef", "store.foreign": "[7]", "pool.engine": "user"}},
			{"GET", "/v1/openapi.json", "", 200, map[string]string{"openapi": "3.0.3"}},
		}},
		{"read-only store", func(b *bench) {
			b.store.readOnly = fmt.Errorf("the catalog is older than the pool: %w", layer.ErrReadOnly)
		}, []step{
			{"POST", "/v1/containers", create, 409, map[string]string{"code": "read_only", "message": "the catalog is older than the pool: read-only"}},
		}},
		{"requests that make no sense", nil, []step{
			{"GET", "/v1/nothing", "", 404, map[string]string{"code": "not_found"}},
			{"GET", "/", "", 404, map[string]string{"code": "not_found"}},
			{"PUT", "/v1/containers", "{}", 405, map[string]string{"code": "method", "message": "/v1/containers does not take PUT, only GET, HEAD, POST"}},
			{"POST", "/v1/containers", `{"name":"web","image":"debian:12","colour":"red"}`, 400, map[string]string{"code": "invalid", "message": `body: unknown field "colour"`}},
			{"POST", "/v1/containers", `{"name":"web"} {"name":"web"}`, 400, map[string]string{"message": "body: something follows the JSON value"}},
			{"POST", "/v1/containers", `{"name":7}`, 400, map[string]string{"code": "invalid"}},
			{"POST", "/v1/containers", `{"name":"web"`, 400, map[string]string{"message": "body: unexpected EOF"}},
			{"POST", "/v1/containers", `{"name":"` + strings.Repeat("x", maxBody) + `"}`, 413, map[string]string{"code": "too_large"}},
			{"GET", "/v1/containers?colour=red", "", 400, map[string]string{"message": `unknown parameter "colour"; GET /v1/containers takes label, owner, prefix, limit, cursor, image`}},
			{"GET", "/v1/containers?limit=few", "", 400, map[string]string{"code": "invalid"}},
			{"GET", "/v1/containers?limit=1&limit=2", "", 400, map[string]string{"message": `parameter "limit" is given 2 times`}},
			{"DELETE", "/v1/containers/web?deferred=perhaps", "", 400, nil},
			{"GET", "/v1/containers?label=%3Dx", "", 400, nil},
			{"GET", "/v1/operations?limit=%zz", "", 400, nil},
			{"DELETE", "/v1/containers/web", `{"force":true}`, 400, map[string]string{"message": "DELETE /v1/containers/{name} takes no body"}},
			{"GET", "/v1/operations/x?wait=-5s", "", 400, nil},
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			b := newBench(t)
			if tt.setup != nil {
				tt.setup(b)
			}
			for _, st := range tt.steps {
				status, body := b.call(st.method, st.path, st.body)
				if status != st.status {
					t.Errorf("%s %s %s: status %d, want %d\n%s", st.method, st.path, cut(st.body), status, st.status, body)
					continue
				}
				for k, want := range st.want {
					if got := fmt.Sprint(field(t, body, k)); got != want {
						t.Errorf("%s %s: %s is %q, want %q\n%s", st.method, st.path, k, got, want, cut(body))
					}
				}
			}
		})
	}
}

func cut(s string) string {
	if len(s) > 400 {
		return s[:400] + "..."
	}
	return s
}

func TestImportStream(t *testing.T) {
	b := newBench(t)
	status, body := b.callType("POST", "/v1/images?name=a:1&label=k%3Dv&operation=up1", api.MediaOctets, "an archive")
	if status != 200 || field(t, body, "result.images.0.name") != "a:1" || field(t, body, "result.images.0.labels.k") != "v" {
		t.Errorf("status %d: %s", status, body)
	}
	status, body = b.callType("POST", "/v1/images?name=a:1&label=k%3Dv&operation=up1", api.MediaOctets, "an archive")
	if status != 200 || field(t, body, "id") != "up1" {
		t.Errorf("repeated: status %d: %s", status, body)
	}
	status, body = b.callType("POST", "/v1/images", api.MediaTar, "bad digest")
	if status != 422 || field(t, body, "code") != "digest" {
		t.Errorf("bad digest: status %d: %s", status, body)
	}
	status, body = b.callType("POST", "/v1/images?label=kv", api.MediaTar, "x")
	if status != 400 {
		t.Errorf("label without a value: status %d: %s", status, body)
	}
}

// TestStalledClients: who neither sends nor takes anything does not hold the daemon for ever.
func TestStalledClients(t *testing.T) {
	b := newBench(t)
	b.s.stall = 50 * time.Millisecond
	r, w := io.Pipe()
	defer w.Close()
	go w.Write([]byte("half an archive"))
	resp, err := http.Post(b.http.URL+"/v1/images?operation=slow", api.MediaOctets, r)
	if err == nil {
		body, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		if resp.StatusCode != 400 || !strings.Contains(string(body), "not a byte of it came") {
			t.Errorf("import: %d %s", resp.StatusCode, body)
		}
	}
	if _, body := b.call("GET", "/v1/operations/slow?wait=10s", ""); field(t, body, "state") != "failed" {
		t.Errorf("operation: %s", body)
	}
	b.call("POST", "/v1/containers", `{"name":"web","image":"debian:12"}`)
	ended := make(chan error, 1)
	b.store.setDiff(func(w io.Writer) error {
		var err error
		for range 1000 {
			if _, err = w.Write(make([]byte, 1<<20)); err != nil {
				break
			}
		}
		ended <- err
		return err
	})
	resp, err = http.Get(b.http.URL + "/v1/containers/web/diff")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	select {
	case err := <-ended:
		if err == nil {
			t.Error("1 GiB went to a client that reads nothing")
		}
	case <-time.After(20 * time.Second):
		t.Error("a client that reads nothing holds the diff")
	}
}

// TestCancelStream: cancelling an import that waits for its sender ends it at once.
func TestCancelStream(t *testing.T) {
	b := newBench(t)
	r, w := io.Pipe()
	defer w.Close()
	go w.Write([]byte("half an archive"))
	answered := make(chan struct{})
	go func() {
		defer close(answered)
		if resp, err := http.Post(b.http.URL+"/v1/images?operation=up", api.MediaOctets, r); err == nil {
			resp.Body.Close()
		}
	}()
	for {
		if status, _ := b.call("GET", "/v1/operations/up", ""); status == 200 {
			break
		}
		time.Sleep(time.Millisecond)
	}
	if _, body := b.call("DELETE", "/v1/operations/up?wait=20s", ""); field(t, body, "state") != "cancelled" {
		t.Errorf("operation: %s", body)
	}
	select {
	case <-answered:
	case <-time.After(20 * time.Second):
		t.Error("the sender is not answered")
	}
}

func TestOperationCancel(t *testing.T) {
	b := newBench(t)
	b.store.block = make(chan struct{})
	b.call("POST", "/v1/containers", `{"name":"web","image":"debian:12"}`)
	status, body := b.call("POST", "/v1/containers/web/commit?operation=c1&wait=1ms", `{"image":"mine"}`)
	if status != 202 || field(t, body, "state") != "running" {
		t.Fatalf("status %d: %s", status, body)
	}
	if status, body = b.call("GET", "/v1/operations?state=running", ""); field(t, body, "items.0.id") != "c1" {
		t.Errorf("list: %d %s", status, body)
	}
	if status, body = b.call("GET", "/v1/status", ""); field(t, body, "operations_running") != 1.0 {
		t.Errorf("status: %d %s", status, body)
	}
	status, body = b.call("DELETE", "/v1/operations/c1?wait=10s", "")
	if status != 200 || field(t, body, "state") != "cancelled" || field(t, body, "error.code") != "cancelled" {
		t.Errorf("cancel: %d %s", status, body)
	}
	if _, ok := b.store.images["mine"]; ok {
		t.Error("the cancelled commit made an image")
	}
	// Asking again for the same work gives the same operation; it is not done again.
	if status, body = b.call("POST", "/v1/containers/web/commit?operation=c1", `{"image":"mine"}`); status != 409 || field(t, body, "code") != "cancelled" {
		t.Errorf("repeated: %d %s", status, body)
	}
}

// TestOperationSlots: more operations than slots wait and are done in the end; one that waits can
// be cancelled.
func TestOperationSlots(t *testing.T) {
	h := newHub(64, time.Now)
	o := newOperations(1, h)
	gate := make(chan struct{})
	work := func(ctx context.Context, _ *operation) (any, error) {
		select {
		case <-gate:
			return "ok", nil
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	var ops []*operation
	for i := range 3 {
		ctx, op, _, err := o.begin(context.Background(), fmt.Sprint("o", i), "test", "x", nil)
		if err != nil {
			t.Fatal(err)
		}
		ops = append(ops, op)
		go o.run(ctx, op, work)
	}
	if n := o.running(); n != 3 {
		t.Errorf("running %d, want 3", n)
	}
	o.cancelOrForget(ops[2])
	<-ops[2].done
	if s := ops[2].view().State; s != api.OperationCancelled && s != api.OperationDone {
		t.Errorf("state %s", s)
	}
	close(gate)
	for _, op := range ops[:2] {
		<-op.done
		if v := op.view(); v.State != api.OperationDone || string(v.Result) != `"ok"` {
			t.Errorf("%s: %s %s", v.ID, v.State, v.Result)
		}
	}
	if err := o.close(context.Background()); err != nil {
		t.Error(err)
	}
	if _, _, _, err := o.begin(context.Background(), "", "test", "x", nil); api.FromError(err, "").Code != api.CodeClosing {
		t.Errorf("begin after close: %v", err)
	}
}

// TestOperationsForget: ended operations are dropped when there are many, never running ones.
func TestOperationsForget(t *testing.T) {
	o := newOperations(10, newHub(16, time.Now))
	ctx, running, _, _ := o.begin(context.Background(), "runs", "test", "", nil)
	done := make(chan struct{})
	go o.run(ctx, running, func(context.Context, *operation) (any, error) { <-done; return nil, nil })
	for i := range 2 * maxOperations {
		ctx, op, _, err := o.begin(context.Background(), "", "test", "", nil)
		if err != nil {
			t.Fatalf("operation %d: %v", i, err)
		}
		o.run(ctx, op, func(context.Context, *operation) (any, error) { return nil, nil })
	}
	if n := len(o.list()); n > maxOperations {
		t.Errorf("%d operations are remembered, at most %d", n, maxOperations)
	}
	if _, err := o.get("runs"); err != nil {
		t.Error(err)
	}
	close(done)
	o.close(context.Background())
}

func TestDiff(t *testing.T) {
	b := newBench(t)
	b.call("POST", "/v1/containers", `{"name":"web","image":"debian:12"}`)
	get := func() (*http.Response, string, error) {
		resp, err := http.Get(b.http.URL + "/v1/containers/web/diff?crash_ok=true")
		if err != nil {
			return &http.Response{}, "", err
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		return resp, string(body), err
	}
	resp, body, err := get()
	if err != nil || body != "a tar" || resp.Header.Get("Content-Type") != api.MediaTar || resp.Trailer.Get(api.TrailerLevel) != "file-system" {
		t.Errorf("%q, %v, trailer %v", body, err, resp.Trailer)
	}
	b.store.setDiff(func(io.Writer) error { return fmt.Errorf("web: %w", layer.ErrGuestOwned) })
	if resp, body, _ = get(); resp.StatusCode != 409 || field(t, body, "code") != "guest_owned" {
		t.Errorf("error before the first byte: %d %s", resp.StatusCode, body)
	}
	b.store.setDiff(func(w io.Writer) error { io.WriteString(w, "half"); return errors.New("the disk went away") })
	if resp, body, err = get(); err == nil {
		t.Errorf("error on the way: the body %q ends in order, trailer %v", body, resp.Trailer)
	}
	b.store.setDiff(func(w io.Writer) error { return nil })
	if resp, body, err = get(); err != nil || body != "" || resp.Trailer.Get(api.TrailerLevel) != "crash" {
		t.Errorf("empty diff: %q %v trailer %v", body, err, resp.Trailer)
	}
}

func TestShutdown(t *testing.T) {
	b := newBench(t)
	b.call("POST", "/v1/containers", `{"name":"web","image":"debian:12"}`)
	b.call("POST", "/v1/containers", `{"name":"db","image":"debian:12"}`)
	b.call("POST", "/v1/attachments", `{"container":"web"}`)
	b.call("POST", "/v1/attachments", `{"container":"db","as":"nbd"}`)
	b.store.busy["web"] = []string{"mounted on /mnt"}
	status, body := b.call("POST", "/v1/shutdown", "")
	if status != 409 || field(t, body, "code") != "busy" || field(t, body, "details.holders.0") != "web: mounted on /mnt" {
		t.Errorf("busy: %d %s", status, body)
	}
	if _, body = b.call("GET", "/v1/attachments", ""); field(t, body, "items.1") == nil {
		t.Errorf("the refused shutdown detached something: %s", body)
	}
	if status, _ = b.call("POST", "/v1/containers", `{"name":"x","image":"debian:12"}`); status != 201 {
		t.Errorf("after the refusal: status %d, want 201", status)
	}
	select {
	case <-b.quit:
		t.Fatal("the refused shutdown ended the daemon")
	default:
	}
	b.store.busy = map[string][]string{}
	if status, body = b.call("POST", "/v1/shutdown", `{"timeout":"3s"}`); status != 204 {
		t.Errorf("status %d: %s", status, body)
	}
	<-b.quit
	if _, body = b.call("GET", "/v1/attachments", ""); field(t, body, "items.0") != nil {
		t.Errorf("still attached: %s", body)
	}
	if status, body = b.call("POST", "/v1/containers", `{"name":"y","image":"debian:12"}`); status != 503 || field(t, body, "code") != "closing" {
		t.Errorf("after the shutdown: %d %s", status, body)
	}
}

// TestShutdownWaitsForUsersThatLeave: who has a node for a moment only does not refuse a shutdown.
func TestShutdownWaitsForUsersThatLeave(t *testing.T) {
	b := newBench(t)
	b.call("POST", "/v1/containers", `{"name":"web","image":"debian:12"}`)
	b.call("POST", "/v1/attachments", `{"container":"web"}`)
	asked := 0
	b.s.busy = func(string) []string {
		if asked++; asked < 4 {
			return []string{"mounted on /mnt in the mount namespace of process 7 (exe)"}
		}
		return nil
	}
	if status, body := b.call("POST", "/v1/shutdown", ""); status != 204 {
		t.Errorf("status %d: %s", status, body)
	}
	<-b.quit
}

// TestPanic: a bug in one request is that request's error.
func TestPanic(t *testing.T) {
	b := newBench(t)
	b.s.describePool = func(*api.Pool) { panic("a bug") }
	status, body := b.call("GET", "/v1/pool", "")
	if status != 500 || field(t, body, "code") != "internal" {
		t.Errorf("%d %s", status, body)
	}
	if status, _ := b.call("GET", "/v1/images", ""); status != 200 {
		t.Errorf("next request: %d", status)
	}
}

func TestEvents(t *testing.T) {
	b := newBench(t)
	var ids []uint64
	for i := range 5 {
		ids = append(ids, b.s.hub.publish("create", fmt.Sprintf("container/c%d", i), "", time.Time{}))
	}
	read := func(path string, header ...string) []api.Event {
		t.Helper()
		req, _ := http.NewRequest("GET", b.http.URL+path, nil)
		if len(header) == 2 {
			req.Header.Set(header[0], header[1])
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		var list []api.Event
		d := json.NewDecoder(resp.Body)
		for {
			var e api.Event
			if err := d.Decode(&e); err == io.EOF {
				return list
			} else if err != nil {
				t.Fatal(err)
			}
			list = append(list, e)
		}
	}
	objects := func(list []api.Event) (o []string) {
		for _, e := range list {
			o = append(o, e.Kind+" "+e.Object)
		}
		return o
	}
	tests := []struct {
		name, path string
		header     []string
		want       []string
	}{
		{"all that are kept", "?follow=false", nil, []string{"create container/c0", "create container/c1", "create container/c2", "create container/c3", "create container/c4"}},
		{"after an id", fmt.Sprintf("?follow=false&after=%d", ids[2]), nil, []string{"create container/c3", "create container/c4"}},
		{"after an id, by header", "?follow=false", []string{"Last-Event-ID", fmt.Sprint(ids[3])}, []string{"create container/c4"}},
		{"after the last", fmt.Sprintf("?follow=false&after=%d", ids[4]), nil, nil},
		{"after one that is no longer kept", "?follow=false&after=5", nil, []string{"lost ", "create container/c0", "create container/c1", "create container/c2", "create container/c3", "create container/c4"}},
		{"after one of the future", fmt.Sprintf("?follow=false&after=%d", ids[4]+1), nil, []string{"lost ", "create container/c0", "create container/c1", "create container/c2", "create container/c3", "create container/c4"}},
		{"by object", "?follow=false&object=container/c1", nil, []string{"create container/c1"}},
		{"by kind", "?follow=false&kind=remove&kind=attach", nil, nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if d := cmp.Diff(tt.want, objects(read("/v1/events"+tt.path, tt.header...))); d != "" {
				t.Error(d)
			}
		})
	}
	if status, _ := b.callType("GET", "/v1/events?after=x", "", ""); status != 400 {
		t.Errorf("after=x: status %d, want 400", status)
	}
}

// TestEventsResume: a reader that is cut off again and again, and goes on behind the last id it
// has seen, gets every event once, in order, as server-sent events.
func TestEventsResume(t *testing.T) {
	b := newBench(t)
	const n = 40
	first := b.s.hub.publish("start", "daemon", "", time.Time{})
	go func() {
		for i := range n {
			b.s.hub.publish("update", fmt.Sprint("container/", i), "", time.Time{})
			time.Sleep(time.Millisecond)
		}
	}()
	last := fmt.Sprint(first)
	var got []string
	for len(got) < n {
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		req, _ := http.NewRequestWithContext(ctx, "GET", b.http.URL+"/v1/events", nil)
		req.Header.Set("Accept", api.MediaEventStream)
		req.Header.Set("Last-Event-ID", last)
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		if ct := resp.Header.Get("Content-Type"); ct != api.MediaEventStream {
			t.Fatalf("content type %q", ct)
		}
		seen := 0
		for s := bufio.NewScanner(resp.Body); seen < 7 && len(got) < n && s.Scan(); {
			if id, ok := strings.CutPrefix(s.Text(), "id: "); ok {
				last = id
			}
			if data, ok := strings.CutPrefix(s.Text(), "data: "); ok {
				got = append(got, fmt.Sprint(field(t, data, "object")))
				seen++
			}
		}
		cancel()
		resp.Body.Close()
		if seen == 0 {
			t.Fatalf("the stream ended with %d of %d events", len(got), n)
		}
	}
	for i, o := range got {
		if want := fmt.Sprint("container/", i); o != want {
			t.Fatalf("event %d is about %s, want %s", i, o, want)
		}
	}
}

// TestHubLost: a reader behind the oldest kept event is told, and ids rise with a clock that
// stands still or goes back.
func TestHubLost(t *testing.T) {
	now := time.UnixMicro(1000)
	h := newHub(16, func() time.Time { return now })
	firstID := h.publish("a", "", "", time.Time{})
	var last uint64
	for range 40 {
		now = now.Add(-time.Microsecond)
		id := h.publish("b", "", "", time.Time{})
		if id <= last {
			t.Fatalf("id %d after %d", id, last)
		}
		last = id
	}
	events, _, _ := h.after(firstID)
	if len(events) != 17 || events[0].Kind != api.EventLost || events[0].ID != events[1].ID-1 || events[16].ID != last {
		t.Errorf("%d events, first %+v", len(events), events[0])
	}
	again, _, _ := h.after(events[0].ID)
	if len(again) != 16 {
		t.Errorf("after the id of lost: %d events, want 16", len(again))
	}
}
