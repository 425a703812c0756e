// Package client speaks to mica's daemon over its Unix socket.
package client

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"mica/daemon/api"
)

// A Client makes requests to one daemon. Safe for concurrent use. Errors of the daemon are
// *api.Error, which match the conditions of package layer (errors.Is); a daemon that is not
// there is *NoDaemonError.
type Client struct {
	run, socket string
	http        *http.Client
}

// New makes a client of the daemon whose RUN directory is run. It does not connect yet.
func New(run string) *Client {
	socket := filepath.Join(run, api.SocketName)
	return &Client{run: run, socket: socket, http: &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return dialer.DialContext(ctx, "unix", socket)
		},
		DisableCompression: true,
		IdleConnTimeout:    30 * time.Second,
	}}}
}

var dialer = net.Dialer{Timeout: 10 * time.Second}

// once is c with a connection of its own for one request. closed is called when the connection
// ends, whichever side ended it: package http waits for a request's body even then.
func (c *Client) once(closed func()) *Client {
	return &Client{run: c.run, socket: c.socket, http: &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			conn, err := dialer.DialContext(ctx, "unix", c.socket)
			if err != nil {
				return nil, err
			}
			return &hookedConn{conn, closed}, nil
		},
		DisableCompression: true,
		DisableKeepAlives:  true,
	}}}
}

type hookedConn struct {
	net.Conn
	closed func()
}

func (h *hookedConn) Close() error {
	h.closed()
	return h.Conn.Close()
}

// Close lets idle connections go.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// Socket is the path of the daemon's socket.
func (c *Client) Socket() string { return c.socket }

// A NoDaemonError says that no daemon could be asked, and how to start one.
type NoDaemonError struct {
	Run, Socket string
	Err         error
}

// DefaultRun is the RUN directory of a daemon that was not given another.
const DefaultRun = "/run/mica"

// StartLine is the command line that starts the daemon which was asked for.
func (e *NoDaemonError) StartLine() string {
	line := "mica serve"
	if e.Run != DefaultRun {
		line += " --run " + quote(e.Run)
	}
	if os.Geteuid() != 0 {
		line = "sudo " + line
	}
	return line
}

func (e *NoDaemonError) Error() string {
	if errors.Is(e.Err, os.ErrPermission) {
		return fmt.Sprintf("no permission to use %s: become root, or a member of its group", e.Socket)
	}
	return fmt.Sprintf("no daemon answers on %s; start one with: %s", e.Socket, e.StartLine())
}

func (e *NoDaemonError) Unwrap() error { return e.Err }

// quote makes a word of a shell command.
func quote(s string) string {
	if s != "" && strings.IndexFunc(s, func(r rune) bool {
		return !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("/._-+:@%", r))
	}) < 0 {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}

// escape makes one part of a path from a name.
func escape(name string) string { return url.PathEscape(name) }

// send makes a request and returns its answer if it is a success. The caller closes the body.
func (c *Client) send(ctx context.Context, method, path string, query url.Values, contentType string, body io.Reader, header ...string) (*http.Response, error) {
	u := "http://mica" + api.Version + path
	if len(query) > 0 {
		u += "?" + query.Encode()
	}
	req, err := http.NewRequestWithContext(ctx, method, u, body)
	if err != nil {
		return nil, err
	}
	if contentType != "" {
		req.Header.Set("Content-Type", contentType)
	}
	for i := 0; i+1 < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	resp, err := c.http.Do(req)
	if err != nil {
		if cause := context.Cause(ctx); ctx.Err() != nil {
			return nil, cause
		}
		var op *net.OpError
		if errors.As(err, &op) && op.Op == "dial" {
			return nil, &NoDaemonError{Run: c.run, Socket: c.socket, Err: op.Err}
		}
		var ue *url.Error
		if errors.As(err, &ue) {
			err = ue.Err
		}
		if errors.Is(err, errWentAway) || errors.Is(err, io.ErrClosedPipe) || errors.Is(err, net.ErrClosed) || errors.Is(err, io.EOF) || errors.Is(err, unix.ECONNRESET) || errors.Is(err, unix.EPIPE) {
			err = fmt.Errorf("the daemon on %s went away: %w", c.socket, err)
		}
		return nil, err
	}
	if resp.StatusCode < 300 {
		return resp, nil
	}
	defer resp.Body.Close()
	return nil, readError(resp)
}

// maxErrorBody is how much of an error is read.
const maxErrorBody = 4 << 20

func readError(resp *http.Response) error {
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxErrorBody))
	var e api.Error
	if t, _, _ := mime.ParseMediaType(resp.Header.Get("Content-Type")); t == "application/json" && json.Unmarshal(b, &e) == nil && e.Code != "" {
		return &e
	}
	return errors.Join(fmt.Errorf("the daemon answered %s without saying why", resp.Status), err)
}

// call sends in as JSON (nil: no body) and decodes the answer into out (nil: there is none).
func (c *Client) call(ctx context.Context, method, path string, query url.Values, in, out any) (status int, err error) {
	var body io.Reader
	contentType := ""
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return 0, err
		}
		body, contentType = bytes.NewReader(b), "application/json"
	}
	resp, err := c.send(ctx, method, path, query, contentType, body)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	if out == nil {
		return resp.StatusCode, nil
	}
	if err := json.NewDecoder(resp.Body).Decode(out); err != nil {
		if ctx.Err() != nil {
			return 0, context.Cause(ctx)
		}
		return 0, fmt.Errorf("answer to %s %s: %w", method, path, err)
	}
	return resp.StatusCode, nil
}

// pages collects the items of all pages of a listing.
func pages[T any](ctx context.Context, c *Client, path string, query url.Values) ([]T, error) {
	if query == nil {
		query = url.Values{}
	}
	query.Set("limit", "1000")
	all := []T{}
	for {
		var l api.List[T]
		if _, err := c.call(ctx, "GET", path, query, nil, &l); err != nil {
			return nil, err
		}
		all = append(all, l.Items...)
		if l.Next == "" || len(l.Items) == 0 {
			return all, nil
		}
		query.Set("cursor", l.Next)
	}
}
