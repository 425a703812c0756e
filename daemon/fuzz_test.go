package daemon

import (
	"context"
	"encoding/json"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"time"

	"mica/daemon/api"
	"mica/internal/mutate"
	"mica/layer"
)

// newFuzzServer is a server over a store in memory.
func newFuzzServer(tb testing.TB) *server {
	h := newHub(16, time.Now)
	ops := newOperations(1, h)
	tb.Cleanup(func() { ops.close(context.Background()) })
	return newServer(parts{store: newFakeStore(), pool: newFakePool(), busy: func(string) []string { return nil },
		describe: func(*api.Status) {}, describePool: func(*api.Pool) {}, quit: func() {},
		importFile: func(context.Context, *operation, string, api.ImportParams) (api.ImportResult, error) {
			return api.ImportResult{}, layer.ErrInvalid
		},
		importStream: func(_ context.Context, _ *operation, r io.Reader, _ api.ImportParams) (api.ImportResult, error) {
			io.Copy(io.Discard, r)
			return api.ImportResult{}, layer.ErrInvalid
		},
	}, h, ops, slog.New(slog.NewTextHandler(io.Discard, nil)))
}

// wantAnswer: the answer is a success, or an api.Error with its status that is not our fault.
func wantAnswer(t *testing.T, r *http.Request, w *httptest.ResponseRecorder) {
	t.Helper()
	if w.Code >= 500 && w.Code != http.StatusNotImplemented {
		t.Fatalf("%s %s: status %d: %s", r.Method, r.URL, w.Code, w.Body)
	}
	if w.Code >= 300 {
		var e api.Error
		if err := json.Unmarshal(w.Body.Bytes(), &e); err != nil || e.Code == "" || e.Message == "" || e.Status() != w.Code {
			t.Fatalf("%s %s: status %d with %q (%v)", r.Method, r.URL, w.Code, w.Body, err)
		}
	}
}

func bodySeeds() [][]byte {
	var out [][]byte
	for _, s := range []string{"", "{}", `{"name":"web","image":"debian:12"}`, `{"count":3,"prefix":"a"}`, `{"ttl":"7d"}`, `{"labels":{"a":null}}`,
		`{"size_bytes":1e99}`, `[]`, `null`, `{"name":"\u0000"}`, `{"container":"web","as":"nbd","tcp":true}`, `{"file":"/x","labels":{"a":"b"}}`} {
		out = append(out, []byte(s))
	}
	return out
}

// FuzzBody: whatever the body, the answer is a success or an api.Error with its status, and the
// server lives.
func FuzzBody(f *testing.F) { mutate.Fuzz(f, bodySeeds(), sendBody(f)) }

// TestBodyMutated is FuzzBody for a moment.
func TestBodyMutated(t *testing.T) {
	mutate.Test(t, "FuzzBody", bodySeeds(), mutate.Options{Inputs: 600, MaxBytes: 16 << 10, AllocBase: 8 << 20, AllocPerByte: 2000,
		Words: []string{`"name":`, `"labels":{`, `"count":`, `"size_bytes":`, `"ttl":"`, `"names":["`, `..`, `\u0000`, `-`, `[[[[`}}, sendBody(t))
}

func sendBody(tb testing.TB) func(*testing.T, []byte) {
	s := newFuzzServer(tb)
	list := routes()
	return func(t *testing.T, body []byte) {
		for _, rt := range list {
			if rt.body == nil || rt.path == "/v1/shutdown" {
				continue
			}
			path := strings.NewReplacer("{name}", "web", "{container}", "web").Replace(rt.path)
			r := httptest.NewRequest(rt.method, path, strings.NewReader(string(body)))
			r.Header.Set("Content-Type", "application/json")
			w := httptest.NewRecorder()
			s.ServeHTTP(w, r)
			wantAnswer(t, r, w)
		}
	}
}

func targetSeeds() [][]byte {
	out := [][]byte{[]byte("/"), []byte("//v1/containers"), []byte("/v1/containers/../images"), []byte("/v1/containers/%2e%2e%2fimages"), []byte("/v1/containers/web?x=1;y"),
		[]byte("/v1/images?name=a&label=a&label=b=c"), []byte("/v1/events?after=18446744073709551615&follow=false"), []byte("/v1/containers?limit=0&cursor=%00")}
	for _, rt := range routes() {
		q := url.Values{}
		for _, p := range rt.query {
			q.Set(p.name, map[string]string{"integer": "1", "boolean": "false", "duration": "1ms"}[p.kind])
		}
		out = append(out, []byte(rt.path), []byte(rt.path+"?"+q.Encode()))
	}
	return out
}

// FuzzTarget: whatever the path and the query, for every method.
func FuzzTarget(f *testing.F) { mutate.Fuzz(f, targetSeeds(), sendTarget(f)) }

// TestTargetMutated is FuzzTarget for a moment.
func TestTargetMutated(t *testing.T) {
	mutate.Test(t, "FuzzTarget", targetSeeds(), mutate.Options{Inputs: 600, MaxBytes: 4 << 10,
		Words: []string{"/v1/", "..", "%2f", "%00", "?", "&", "label=", "cursor=", "limit=", "wait=", "owner=*", "=", ";", "+", "web"}}, sendTarget(t))
}

func sendTarget(tb testing.TB) func(*testing.T, []byte) {
	s := newFuzzServer(tb)
	return func(t *testing.T, target []byte) {
		u, err := url.ParseRequestURI(string(target))
		if err != nil || strings.HasPrefix(u.Path, "/v1/shutdown") || u.Host != "" || !strings.HasPrefix(string(target), "/") {
			return
		}
		for _, method := range []string{"GET", "POST", "PATCH", "DELETE", "PUT", "BREW"} {
			ctx, cancel := context.WithTimeout(context.Background(), 2*time.Millisecond) // for what follows events, or waits
			r := (&http.Request{Method: method, URL: u, Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1, Header: http.Header{}, Body: http.NoBody, Host: "mica",
				RequestURI: string(target)}).WithContext(ctx)
			w := httptest.NewRecorder()
			s.ServeHTTP(w, r)
			cancel()
			if w.Code == http.StatusMovedPermanently || w.Code == http.StatusTemporaryRedirect || w.Code == http.StatusPermanentRedirect {
				continue // of a path with dots, to the one without
			}
			wantAnswer(t, r, w)
		}
	}
}
