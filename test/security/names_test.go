package security

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"mica/daemon/api"
	"mica/daemon/config"
)

// badNames are none for a container, a snapshot, or a further snapshotter.
var badNames = []string{
	"", ".", "..", "...", "../x", "a/b", "/etc/passwd", "a/../../b", ".hidden", "-rf", "--help", "-", "_x",
	"a b", "a\tb", "a\nb", "a\x00b", "a;id", "a|id", "a&id", "$(id)", "`id`", "${HOME}", "a>b", "a<b", "a*", "a?b", "[a]", "~root", "!x", "#x", "a\\b", "a'b", `a"b`,
	"a%2fb", "%2e%2e", "a%00", "é", "e\u0301", "\u202etxt", "\ufeffa", "\xff\xfe", "a\u2028b", "\u2024\u2024", "％", strings.Repeat("n", 129), strings.Repeat("x/", 100),
}

// badImages are no names for an image.
var badImages = []string{
	"", ".", "..", "../x", "/x", "x/", "a//b", "a/../b", "a/.b", "-x", "--name", "a b", "a\nb", "a\x00b", "a;id", "$(id)", "`id`", "a|b", "a*", "a\\b", "é", "\u202ex", "\xff", "a%2fb", "a#b", "a?b", strings.Repeat("n", 513),
}

// TestNamesInTheAPI: what is no name is refused by every route that takes one, in the path and in
// the body, and nothing has changed.
func TestNamesInTheAPI(t *testing.T) {
	b := newBox(t)
	b.start()
	b.image()
	b.mica("create", "small", "web")
	b.mica("snapshot", "web", "one")
	before := b.figures()
	files := treeNames(t, b.dir)
	c := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", filepath.Join(b.run, "mica.sock"))
	}}, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }, Timeout: 30 * time.Second}
	defer c.CloseIdleConnections()
	ask := func(method, path string, body map[string]any) {
		t.Helper()
		var r io.Reader
		if body != nil {
			text, err := json.Marshal(body)
			if err != nil {
				t.Fatal(err)
			}
			r = bytes.NewReader(text)
		}
		req, err := http.NewRequest(method, "http://mica"+path, r)
		if err != nil {
			return // not even a URL
		}
		req.Header.Set("Content-Type", "application/json")
		resp, err := c.Do(req)
		if err != nil {
			t.Fatalf("%s %q %v: %v", method, path, body, err)
		}
		defer resp.Body.Close()
		text, _ := io.ReadAll(resp.Body)
		if resp.StatusCode < 300 || resp.StatusCode >= 500 {
			t.Errorf("%s %q %v: status %d %s", method, path, body, resp.StatusCode, text)
		}
		if resp.StatusCode >= 400 {
			var e api.Error
			if json.Unmarshal(text, &e) != nil || e.Code == "" {
				t.Errorf("%s %q %v: status %d with %q", method, path, body, resp.StatusCode, text)
			}
		}
	}
	for _, n := range badNames {
		p := url.PathEscape(n)
		ask("POST", "/v1/containers", map[string]any{"name": n, "image": "small"})
		ask("POST", "/v1/containers/web/fork", map[string]any{"names": []string{n}})
		ask("POST", "/v1/snapshots", map[string]any{"container": "web", "name": n + "/x"})
		ask("POST", "/v1/snapshots", map[string]any{"container": n, "name": "x"})
		ask("POST", "/v1/attachments", map[string]any{"container": n})
		for _, escaped := range []string{p, strings.ReplaceAll(p, ".", "%2e"), n} {
			if escaped == "" || strings.ContainsAny(escaped, "?# \n\t\x00") {
				continue
			}
			ask("DELETE", "/v1/containers/"+escaped, nil)
			ask("DELETE", "/v1/attachments/"+escaped, nil)
			ask("DELETE", "/v1/snapshots/web/"+escaped, nil)
			ask("DELETE", "/v1/snapshots/"+escaped+"/one", nil)
			ask("PATCH", "/v1/containers/"+escaped, map[string]any{"labels": map[string]any{"a": "b"}})
		}
	}
	for _, n := range badImages {
		ask("POST", "/v1/images/small/tags", map[string]any{"name": n})
		ask("POST", "/v1/containers/web/commit?wait=10s", map[string]any{"image": n})
		if n != "" {
			ask("POST", "/v1/containers", map[string]any{"name": "x", "image": n})
		}
	}
	for k, v := range map[string]string{"": "x", "a=b": "x", "a\nb": "x", "a\x00": "x", strings.Repeat("k", 257): "x", "long": strings.Repeat("v", 4097)} {
		ask("POST", "/v1/containers", map[string]any{"name": "x", "image": "small", "labels": map[string]any{k: v}})
	}
	many := map[string]any{}
	for i := range 129 {
		many[fmt.Sprint("k", i)] = "v"
	}
	ask("POST", "/v1/containers", map[string]any{"name": "x", "image": "small", "labels": many})
	if after := b.figures(); after != before {
		t.Errorf("the store has changed: %+v, was %+v", after, before)
	}
	if now := treeNames(t, b.dir); now != files {
		t.Errorf("files: %s\nwere: %s", now, files)
	}
}

// treeNames lists the files of a box but for what waits to be served.
func treeNames(t *testing.T, dir string) string {
	t.Helper()
	var out []string
	err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && (d.Name() == "fuse" || d.Name() == "spool") {
			return filepath.SkipDir
		}
		out = append(out, strings.TrimPrefix(path, dir))
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return strings.Join(out, " ")
}

// TestNamesOnTheCommandLine: the same through the commands; a name that looks like an option is one,
// and behind "--" is a name that is refused.
func TestNamesOnTheCommandLine(t *testing.T) {
	b := newBox(t)
	b.start()
	b.image()
	b.mica("create", "small", "web")
	before := b.figures()
	files := treeNames(t, b.dir)
	for _, n := range badNames {
		if strings.Contains(n, "\x00") || n == "" {
			continue // no argument can be that; "" is one that is missing
		}
		for _, args := range [][]string{
			{"create", "--", "small", n}, {"fork", "--", "web", n}, {"snapshot", "--", "web", n}, {"mount", "--", n}, {"attach", "--", n}, {"rm", "--", n}, {"umount", "--", n},
		} {
			b.refused(b.command(args...))
		}
	}
	for _, n := range badImages {
		if !strings.Contains(n, "\x00") && n != "" {
			b.refused(b.command("image", "tag", "--", "small", n))
			b.refused(b.command("create", "--", n, "x"))
		}
	}
	for _, args := range [][]string{{"create", "small", "-rf"}, {"rm", "--no-such-option"}, {"mount", "-x"}, {"create", "small", ""}} {
		b.refused(b.command(args...))
	}
	if after := b.figures(); after != before {
		t.Errorf("the store has changed: %+v, was %+v", after, before)
	}
	if now := treeNames(t, b.dir); now != files {
		t.Errorf("files: %s\nwere: %s", now, files)
	}
}

// TestNamesInTheConfiguration: names of snapshotters become those of sockets.
func TestNamesInTheConfiguration(t *testing.T) {
	for _, n := range badNames {
		if n == "_x" || n == "-" {
			continue
		}
		text := fmt.Sprintf("[containerd.snapshotters.%s]\nguest_owned = true\n", tomlKey(n))
		if c, err := config.Parse([]byte(text)); err == nil {
			t.Errorf("snapshotter %q is taken: %+v", n, c.Containerd.Snapshotters)
		}
	}
	if _, err := config.Parse([]byte("[containerd.snapshotters.mica-kata_2]\n")); err != nil {
		t.Errorf("a good name: %v", err)
	}
	for _, o := range []string{"", "a b", "a\tb", "a\nb"} {
		text := fmt.Sprintf("[containers]\nmount_options = [%q]\n", o)
		if _, err := config.Parse([]byte(text)); err == nil {
			t.Errorf("mount option %q is taken", o)
		}
	}
}

func tomlKey(s string) string {
	var b strings.Builder
	for _, r := range s {
		fmt.Fprintf(&b, `\U%08X`, r)
	}
	return `"` + b.String() + `"`
}

// TestNothingListensOnTheNetwork: a daemon as it is by default has no TCP or UDP socket.
func TestNothingListensOnTheNetwork(t *testing.T) {
	b := newBox(t)
	b.start()
	b.image()
	b.mica("create", "small", "vm")
	b.mica("attach", "vm", "--as", "nbd")
	inodes := map[string]bool{}
	for _, f := range []string{"tcp", "tcp6", "udp", "udp6", "raw", "raw6"} {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/%s", b.daemon.Cmd.Process.Pid, f))
		if err != nil {
			continue
		}
		for line := range strings.Lines(string(text)) {
			if c := strings.Fields(line); len(c) > 9 {
				inodes["socket:["+c[9]+"]"] = true
			}
		}
	}
	fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", b.daemon.Cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	sockets := 0
	for _, fd := range fds {
		to, _ := os.Readlink(fmt.Sprintf("/proc/%d/fd/%s", b.daemon.Cmd.Process.Pid, fd.Name()))
		if strings.HasPrefix(to, "socket:") {
			sockets++
		}
		if inodes[to] {
			t.Errorf("descriptor %s is a network socket", fd.Name())
		}
	}
	if sockets < 4 {
		t.Errorf("%d sockets are open, want those in RUN at least", sockets)
	}
	b.stop(syscall.SIGTERM)
}
