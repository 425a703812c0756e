package daemon

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"mica/daemon/api"
)

// slowLimits are short enough for a test; an honest client is far below them.
var slowLimits = apiLimits{header: 300 * time.Millisecond, body: 300 * time.Millisecond, write: 300 * time.Millisecond, idle: 300 * time.Millisecond, conns: 20}

// serveSlow serves a store in memory on a socket.
func serveSlow(t *testing.T) (*server, string) {
	t.Helper()
	h := newHub(4096, time.Now)
	ops := newOperations(4, h)
	quiet := slog.New(slog.NewTextHandler(io.Discard, nil))
	s := newServer(parts{store: newFakeStore(), pool: newFakePool(), limits: slowLimits, stall: 300 * time.Millisecond, busy: func(string) []string { return nil },
		describe: func(*api.Status) {}, describePool: func(*api.Pool) {}, quit: func() {},
		importStream: func(ctx context.Context, _ *operation, r io.Reader, _ api.ImportParams) (api.ImportResult, error) {
			_, err := io.Copy(io.Discard, r)
			return api.ImportResult{}, err
		},
	}, h, ops, quiet)
	dir, err := os.MkdirTemp("", "mica-slow")
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "s")
	l, err := listenAt(path, "")
	if err != nil {
		t.Fatal(err)
	}
	srv := newHTTPServer(s, s.limits, quiet)
	done := make(chan struct{})
	go func() {
		srv.Serve(&fewListener{Listener: l, max: int64(s.limits.conns), log: quiet})
		close(done)
	}()
	t.Cleanup(func() {
		h.close()
		srv.Close()
		<-done
		ops.close(context.Background())
		os.RemoveAll(dir)
	})
	return s, path
}

func dialSlow(t *testing.T, path string) net.Conn {
	t.Helper()
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// ended: the server has closed the connection, within a multiple of its limits.
func ended(t *testing.T, c net.Conn) (answer string) {
	t.Helper()
	c.SetReadDeadline(time.Now().Add(15 * time.Second))
	b, err := io.ReadAll(io.LimitReader(c, 1<<20))
	if e, ok := err.(net.Error); ok && e.Timeout() {
		t.Errorf("still open after 15 s, with %q", b)
	}
	return string(b)
}

// TestSlowClients: whoever sends nothing, or a byte now and then, is let go, whatever part of a
// request it is at.
func TestSlowClients(t *testing.T) {
	_, path := serveSlow(t)
	drip := func(c net.Conn, text string) {
		for i := range len(text) {
			if _, err := io.WriteString(c, text[i:i+1]); err != nil {
				return
			}
			time.Sleep(20 * time.Millisecond)
		}
	}
	head := "POST /v1/containers HTTP/1.1\r\nHost: mica\r\nContent-Type: application/json\r\n"
	for name, send := range map[string]func(c net.Conn){
		"nothing":     func(net.Conn) {},
		"half a line": func(c net.Conn) { io.WriteString(c, "GET /v1/sta") },
		"a head byte by byte": func(c net.Conn) {
			drip(c, "GET /v1/status HTTP/1.1\r\nHost: mica\r\n"+strings.Repeat("X-A: b\r\n", 100))
		},
		"half a body":         func(c net.Conn) { io.WriteString(c, head+"Content-Length: 100\r\n\r\n{") },
		"a body byte by byte": func(c net.Conn) { drip(c, head+"Content-Length: 1000\r\n\r\n{"+strings.Repeat(" ", 900)) },
		"no chunk":            func(c net.Conn) { io.WriteString(c, head+"Transfer-Encoding: chunked\r\n\r\n") },
		"a chunk in pieces":   func(c net.Conn) { drip(c, head+"Transfer-Encoding: chunked\r\n\r\n3e8\r\n{"+strings.Repeat(" ", 900)) },
		"an archive that ends": func(c net.Conn) {
			io.WriteString(c, "POST /v1/images HTTP/1.1\r\nHost: mica\r\nContent-Type: application/x-tar\r\nContent-Length: 100\r\n\r\nx")
		},
		"a body where none is": func(c net.Conn) {
			io.WriteString(c, "GET /v1/status HTTP/1.1\r\nHost: mica\r\nContent-Length: 10\r\n\r\n")
		},
		"nothing more": func(c net.Conn) { io.WriteString(c, "GET /v1/status HTTP/1.1\r\nHost: mica\r\n\r\n") },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := dialSlow(t, path)
			go send(c)
			ended(t, c)
		})
	}
}

// TestLongHeadsAndBodies are refused at their limit, not read to their end.
func TestLongHeadsAndBodies(t *testing.T) {
	_, path := serveSlow(t)
	c := dialSlow(t, path)
	go io.WriteString(c, "GET /v1/status HTTP/1.1\r\nHost: mica\r\nX: "+strings.Repeat("x", 1<<20))
	if got := ended(t, c); !strings.HasPrefix(got, "HTTP/1.1 431") {
		t.Errorf("a head of a MiB: %.100q", got)
	}
	c = dialSlow(t, path)
	go fmt.Fprintf(c, "POST /v1/containers HTTP/1.1\r\nHost: mica\r\nContent-Type: application/json\r\nContent-Length: 10000000\r\n\r\n%s", bytes.Repeat([]byte(" "), 2<<20))
	if got := ended(t, c); !strings.Contains(got, "413") || !strings.Contains(got, "1048576 bytes") {
		t.Errorf("a body of 10 MB: %.300q", got)
	}
}

// TestConnectionsAreFew: beyond the limit they are closed at once, and those that are there go on;
// when they leave there is room again.
func TestConnectionsAreFew(t *testing.T) {
	s, path := serveSlow(t)
	var streams []net.Conn
	for range s.limits.conns {
		c := dialSlow(t, path)
		io.WriteString(c, "GET /v1/events HTTP/1.1\r\nHost: mica\r\n\r\n")
		r := bufio.NewReader(c)
		c.SetReadDeadline(time.Now().Add(10 * time.Second))
		if line, err := r.ReadString('\n'); err != nil || !strings.HasPrefix(line, "HTTP/1.1 200") {
			t.Fatalf("stream %d: %q %v", len(streams), line, err)
		}
		streams = append(streams, c)
	}
	for range 50 {
		c := dialSlow(t, path)
		io.WriteString(c, "GET /v1/status HTTP/1.1\r\nHost: mica\r\n\r\n")
		if got := ended(t, c); got != "" {
			t.Fatalf("one more than the limit is answered: %.60q", got)
		}
	}
	for _, c := range streams {
		c.Close()
	}
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		c := dialSlow(t, path)
		io.WriteString(c, "GET /v1/openapi.json HTTP/1.1\r\nHost: mica\r\nConnection: close\r\n\r\n")
		if got := ended(t, c); strings.HasPrefix(got, "HTTP/1.1 200") {
			return
		}
		if time.Now().After(end) {
			t.Fatal("there is no room after all have left")
		}
	}
}

// TestStreamsAreBounded: a reader of events that takes nothing is let go, and costs no memory
// meanwhile: events are kept once, for all.
func TestStreamsAreBounded(t *testing.T) {
	s, path := serveSlow(t)
	goroutines := runtime.NumGoroutine()
	var stuck []net.Conn
	for range 10 {
		c := dialSlow(t, path)
		io.WriteString(c, "GET /v1/events HTTP/1.1\r\nHost: mica\r\n\r\n")
		r := bufio.NewReader(c)
		for { // the head of the answer, and then nothing more
			line, err := r.ReadString('\n')
			if err != nil {
				t.Fatal(err)
			}
			if line == "\r\n" {
				break
			}
		}
		stuck = append(stuck, c)
	}
	begin := time.Now()
	for i := 0; ; i++ {
		s.hub.publish("create", "container/x", strings.Repeat("d", 4000), time.Time{})
		if i%100 == 99 {
			time.Sleep(time.Millisecond)
			if n := runtime.NumGoroutine(); n <= goroutines+2 {
				break
			}
		}
		if time.Since(begin) > 20*time.Second {
			t.Fatalf("%d goroutines after %d events, %d before the streams", runtime.NumGoroutine(), i, goroutines)
		}
	}
	for _, c := range stuck {
		ended(t, c)
	}
	if n := len(s.hub.ring); n > 4096 {
		t.Errorf("%d events are kept", n)
	}
}

// TestLongWorkIsNotCutOff: the limits are of the client's doing; a request may take longer.
func TestLongWorkIsNotCutOff(t *testing.T) {
	h := newHub(16, time.Now)
	ops := newOperations(1, h)
	defer ops.close(context.Background())
	s := newServer(parts{store: newFakeStore(), pool: newFakePool(), limits: slowLimits, busy: func(string) []string { return nil },
		describe: func(*api.Status) { time.Sleep(900 * time.Millisecond) }, describePool: func(*api.Pool) {}}, h, ops, slog.New(slog.NewTextHandler(io.Discard, nil)))
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	srv := newHTTPServer(s, s.limits, s.log)
	go srv.Serve(l)
	defer srv.Close()
	c := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", l.Addr().String())
	}}}
	defer c.CloseIdleConnections()
	for range 2 { // on one connection
		resp, err := c.Get("http://mica/v1/status")
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil || resp.StatusCode != http.StatusOK {
			t.Errorf("status %d, %v: %s", resp.StatusCode, err, b)
		}
	}
}
