package daemon

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"mica/daemon/api"
	"mica/daemon/client"
	"mica/layer"
)

// serveUnix serves a bench on RUN/mica.sock and returns a client.
func (b *bench) serveUnix() *client.Client {
	b.Helper()
	run := b.TempDir()
	b.listenUnix(run)
	c := client.New(run)
	b.Cleanup(c.Close)
	return c
}

// listenUnix returns what ends the server and its connections.
func (b *bench) listenUnix(run string) (stop func()) {
	b.Helper()
	l, err := listenAt(filepath.Join(run, api.SocketName), "")
	if err != nil {
		b.Fatal(err)
	}
	h := &http.Server{Handler: b.s}
	done := make(chan struct{})
	go func() { h.Serve(l); close(done) }()
	stop = sync.OnceFunc(func() { h.Close(); <-done })
	b.Cleanup(stop)
	return stop
}

// TestClientRoundTrip: everything the client offers, against the server.
func TestClientRoundTrip(t *testing.T) {
	b := newBench(t)
	c, ctx := b.serveUnix(), context.Background()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	st, err := c.Status(ctx)
	must(err)
	if st.Version != "test" || st.Pool.DataSpaceBytes != 1<<30 {
		t.Errorf("status %+v", st)
	}
	images, err := c.Images(ctx, client.Filter{Prefix: "docker.io/"})
	must(err)
	if len(images) != 1 || images[0].Name != "docker.io/library/alpine:3" {
		t.Errorf("images %v", images)
	}
	i, err := c.Image(ctx, "docker.io/library/alpine:3")
	must(err)
	if i.ChainID != "sha256:bb" {
		t.Errorf("image %+v", i)
	}
	_, err = c.TagImage(ctx, i.Name, "al/pine:4")
	must(err)
	must(c.RemoveImage(ctx, "al/pine:4"))
	layers, err := c.Layers(ctx)
	must(err)
	if len(layers) != 1 {
		t.Errorf("layers %v", layers)
	}

	in := api.CreateContainer{Name: "web", Image: "debian:12", Labels: map[string]string{"a": "b"}, TTL: api.Duration(time.Hour)}
	v, created, err := c.CreateContainer(ctx, in)
	must(err)
	if !created || v.Name != "web" || v.TTL != api.Duration(time.Hour) {
		t.Errorf("created %v %+v", created, v)
	}
	if _, created, err = c.CreateContainer(ctx, in); created || err != nil {
		t.Errorf("again: created %v, %v", created, err)
	}
	_, _, err = c.CreateContainer(ctx, api.CreateContainer{Name: "web", Image: "docker.io/library/alpine:3"})
	var e *api.Error
	if !errors.Is(err, layer.ErrExists) || !errors.As(err, &e) || e.Code != api.CodeExists || e.Name != "web" {
		t.Errorf("other parameters: %v", err)
	}
	if _, err = c.Container(ctx, "a/../b"); !errors.Is(err, layer.ErrNotFound) {
		t.Errorf("a name with slashes: %v", err)
	}
	zero := api.Duration(0)
	v, err = c.UpdateContainer(ctx, "web", api.UpdateContainer{TTL: &zero})
	must(err)
	if v.TTL != 0 || v.Labels["a"] != "b" {
		t.Errorf("updated %+v", v)
	}
	for n := range 3 { // more than one page
		_, err = c.Fork(ctx, "web", api.ForkContainer{Count: 700, Prefix: fmt.Sprintf("f%d-", n)})
		must(err)
	}
	list, err := c.Containers(ctx, client.Filter{Prefix: "f"})
	must(err)
	if len(list) != 2100 {
		t.Errorf("%d containers, want 2100", len(list))
	}
	list, err = c.Containers(ctx, client.Filter{Labels: []string{"a=b"}, Image: "debian:12"})
	must(err)
	if len(list) != 1 {
		t.Errorf("%d containers with the label", len(list))
	}

	p, created, err := c.CreateSnapshot(ctx, api.CreateSnapshot{Container: "web", Name: "one"})
	must(err)
	if !created || p.Level != layer.LevelFileSystem {
		t.Errorf("snapshot %v %+v", created, p)
	}
	p, err = c.Snapshot(ctx, "web", "one")
	must(err)
	snaps, err := c.Snapshots(ctx, "")
	must(err)
	if len(snaps) != 1 || snaps[0].ID != p.ID {
		t.Errorf("snapshots %v", snaps)
	}
	_, err = c.Rollback(ctx, "web", "one")
	must(err)
	a, created, err := c.Attach(ctx, api.CreateAttachment{Container: "web"})
	must(err)
	if !created || a.Node != "/dev/loop7" {
		t.Errorf("attachment %v %+v", created, a)
	}
	must(c.NoteMount(ctx, "web", "/mnt"))
	as, err := c.Attachments(ctx, "")
	must(err)
	if len(as) != 1 || !cmp.Equal(as[0].Mounts, []string{"/mnt"}) {
		t.Errorf("attachments %v", as)
	}
	must(c.ForgetMount(ctx, "web", "/mnt"))
	if _, err = c.Rollback(ctx, "web", "one"); !errors.Is(err, layer.ErrInUse) {
		t.Errorf("rollback of what is attached: %v", err)
	}
	must(c.Detach(ctx, "web", false))
	must(c.RemoveSnapshot(ctx, "web", "one"))
	v, err = c.Resize(ctx, "web", 20<<30)
	must(err)
	if v.SizeBytes != 20<<30 {
		t.Errorf("resized %+v", v)
	}

	op, err := c.Commit(ctx, "web", api.CommitContainer{Image: "mine"}, client.OpOptions{})
	must(err)
	op, err = c.Wait(ctx, op, nil)
	must(err)
	r, err := client.Result[layer.CommitResult](op)
	must(err)
	if r.Image.Name != "mine" {
		t.Errorf("commit %+v", r)
	}
	op, err = c.GrowPool(ctx, api.GrowPool{SizeBytes: 2 << 30}, client.OpOptions{Wait: 10 * time.Second})
	must(err)
	grown, err := client.Result[api.Pool](op)
	must(err)
	if grown.DataSpaceBytes != 2<<30 {
		t.Errorf("grown %+v", grown)
	}
	op, err = c.TrimPool(ctx, client.OpOptions{Wait: 10 * time.Second})
	must(err)
	if tr, err := client.Result[api.TrimResult](op); err != nil || tr.TrimmedBytes != 12<<20 {
		t.Errorf("trim %+v %v", tr, err)
	}
	op, err = c.CheckPool(ctx, client.OpOptions{})
	must(err)
	op, err = c.Wait(ctx, op, nil)
	must(err)
	if cr, err := client.Result[api.CheckResult](op); err != nil || !cr.Clean || cr.Mappings != 100 {
		t.Errorf("check %+v %v", cr, err)
	}
	ops, err := c.Operations(ctx)
	must(err)
	if len(ops) != 4 {
		t.Errorf("%d operations", len(ops))
	}
	d, err := c.DF(ctx)
	must(err)
	if len(d.Entries) != 1 {
		t.Errorf("df %+v", d)
	}
	pool, err := c.Pool(ctx)
	must(err)
	if pool.Data != "/root/pool/data" {
		t.Errorf("pool %+v", pool)
	}
	var tar bytes.Buffer
	if level, err := c.Diff(ctx, "web", &tar, layer.DiffOptions{QuiesceOptions: layer.QuiesceOptions{CrashOK: true}}); err != nil || level != layer.LevelFileSystem || tar.String() != "a tar" {
		t.Errorf("diff %q %q %v", level, tar.String(), err)
	}
	b.store.setDiff(func(w io.Writer) error { io.WriteString(w, "half"); return errors.New("gone") })
	if _, err := c.Diff(ctx, "web", io.Discard, layer.DiffOptions{}); err == nil {
		t.Error("a diff that was cut short: no error")
	}
	op, err = c.ImportFile(ctx, api.ImportFile{File: "/a.tar", ImportParams: api.ImportParams{Name: "a:1"}}, client.OpOptions{})
	must(err)
	_, err = c.Wait(ctx, op, nil)
	must(err)
	op, err = c.ImportStream(ctx, strings.NewReader("archive"), api.ImportParams{Name: "b:1", Labels: map[string]string{"k": "v=w"}}, client.OpOptions{ID: "up"})
	must(err)
	ir, err := client.Result[api.ImportResult](op)
	must(err)
	if len(ir.Images) != 1 || ir.Images[0].Labels["k"] != "v=w" || op.ID != "up" {
		t.Errorf("import %+v", ir)
	}
	if _, err = c.ImportStream(ctx, strings.NewReader("bad digest"), api.ImportParams{}, client.OpOptions{}); !errors.Is(err, layer.ErrDigest) {
		t.Errorf("bad digest: %v", err)
	}
	b.store.mu.Lock()
	b.store.busy["web"] = []string{"mounted on /mnt"}
	b.store.mu.Unlock()
	if _, _, err = c.Attach(ctx, api.CreateAttachment{Container: "web"}); err != nil {
		t.Fatal(err)
	}
	if err = c.Shutdown(ctx, api.Shutdown{}); !errors.Is(err, layer.ErrBusy) || !strings.Contains(err.Error(), "mounted on /mnt") {
		t.Errorf("shutdown: %v", err)
	}
	if err = c.RemoveContainer(ctx, "web", layer.RemoveOptions{}); !errors.Is(err, layer.ErrBusy) {
		t.Errorf("remove: %v", err)
	}
	must(c.RemoveContainer(ctx, "web", layer.RemoveOptions{Deferred: true, Snapshots: true}))
}

func TestClientWithoutDaemon(t *testing.T) {
	run := filepath.Join(t.TempDir(), "it's here")
	_, err := client.New(run).Status(context.Background())
	var none *client.NoDaemonError
	if !errors.As(err, &none) {
		t.Fatalf("error %v", err)
	}
	want := "mica serve --run '" + strings.ReplaceAll(run, "'", `'\''`) + "'"
	if os.Geteuid() != 0 {
		want = "sudo " + want
	}
	if got := none.StartLine(); got != want || !strings.HasSuffix(err.Error(), "start one with: "+want) {
		t.Errorf("start line %q, want %q; error %v", got, want, err)
	}
	if got := (&client.NoDaemonError{Run: client.DefaultRun}).StartLine(); !strings.HasSuffix(got, "mica serve") {
		t.Errorf("default: %q", got)
	}
	denied := &client.NoDaemonError{Run: run, Socket: "/s", Err: os.ErrPermission}
	if got := denied.Error(); !strings.Contains(got, "no permission") || strings.Contains(got, "serve") {
		t.Errorf("no permission: %q", got)
	}
}

// TestClientWaitCancels: when the waiter goes away the operation is cancelled and undone before
// Wait returns.
func TestClientWaitCancels(t *testing.T) {
	b := newBench(t)
	b.store.block = make(chan struct{})
	c := b.serveUnix()
	ctx, cancel := context.WithCancelCause(context.Background())
	if _, _, err := c.CreateContainer(ctx, api.CreateContainer{Name: "web", Image: "debian:12"}); err != nil {
		t.Fatal(err)
	}
	op, err := c.Commit(ctx, "web", api.CommitContainer{Image: "mine"}, client.OpOptions{})
	if err != nil {
		t.Fatal(err)
	}
	seen := 0
	why := errors.New("enough")
	op, err = c.Wait(ctx, op, func(op api.Operation) {
		if seen++; seen == 2 {
			cancel(why)
		}
	})
	if !errors.Is(err, why) || op.State != api.OperationCancelled {
		t.Errorf("state %s, error %v", op.State, err)
	}
	if _, err := c.Image(context.Background(), "mine"); !errors.Is(err, layer.ErrNotFound) {
		t.Errorf("the image is there: %v", err)
	}
}

// TestClientStreamCutOff: an import whose sender goes away is undone, and its operation tells.
func TestClientStreamCutOff(t *testing.T) {
	b := newBench(t)
	c := b.serveUnix()
	r, w := io.Pipe()
	defer w.Close()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() {
		_, err := c.ImportStream(ctx, r, api.ImportParams{Name: "cut"}, client.OpOptions{ID: "cut"})
		done <- err
	}()
	w.Write(bytes.Repeat([]byte("x"), 100000))
	for {
		if _, err := c.Operation(context.Background(), "cut", 0); err == nil {
			break
		} else if !errors.Is(err, layer.ErrNotFound) {
			t.Fatal(err)
		}
		time.Sleep(time.Millisecond)
	}
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}
	op, err := c.Operation(context.Background(), "cut", 10*time.Second)
	if err != nil || op.State == api.OperationRunning || op.State == api.OperationDone {
		t.Errorf("operation %+v, %v", op, err)
	}
	if _, err := c.Image(context.Background(), "cut"); !errors.Is(err, layer.ErrNotFound) {
		t.Errorf("the image is there: %v", err)
	}
}

// TestClientStreamDaemonDies: an import whose daemon goes away ends, also when its source does not
// speak.
func TestClientStreamDaemonDies(t *testing.T) {
	b := newBench(t)
	run := t.TempDir()
	stop := b.listenUnix(run)
	c := client.New(run)
	r, w := io.Pipe()
	defer w.Close()
	done := make(chan error, 1)
	go func() {
		_, err := c.ImportStream(context.Background(), r, api.ImportParams{Name: "cut"}, client.OpOptions{ID: "cut"})
		done <- err
	}()
	w.Write(bytes.Repeat([]byte("x"), 100000))
	for {
		if _, err := c.Operation(context.Background(), "cut", 0); err == nil {
			break
		}
		time.Sleep(time.Millisecond)
	}
	stop()
	select {
	case err := <-done:
		if err == nil || !strings.Contains(err.Error(), "went away") {
			t.Errorf("error %v", err)
		}
	case <-time.After(10 * time.Second):
		t.Error("the import hangs")
	}
}

// TestClientEventsOverRestart: a reader of events sees those of before and after a restart of the
// server, each once.
func TestClientEventsOverRestart(t *testing.T) {
	first := newBench(t)
	run := t.TempDir()
	stop := first.listenUnix(run)
	c := client.New(run)
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	first.s.hub.publish("update", "container/one", "", time.Time{})
	zero := uint64(0)
	var got []string
	enough := errors.New("enough")
	seen := make(chan struct{}, 10)
	ended := make(chan error, 1)
	go func() {
		ended <- c.Events(ctx, client.EventOptions{After: &zero}, 20*time.Second, func(e api.Event) error {
			got = append(got, e.Kind+" "+e.Object)
			seen <- struct{}{}
			if e.Object == "container/three" {
				return enough
			}
			return nil
		})
	}()
	<-seen
	first.s.hub.publish("update", "container/two", "", time.Time{})
	<-seen
	stop()
	second := newBench(t)
	second.s.hub.publish(api.EventStart, "daemon", "", time.Time{})
	second.listenUnix(run)
	second.s.hub.publish("update", "container/three", "", time.Time{})
	if err := <-ended; !errors.Is(err, enough) {
		t.Fatalf("ended with %v after %v", err, got)
	}
	// The second server cannot know what it missed, so it says that something may be lost.
	want := []string{"update container/one", "update container/two", "lost ", "start daemon", "update container/three"}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
}

// TestClientBadAnswers: what is not an answer of a daemon is an error, not a panic or a success.
func TestClientBadAnswers(t *testing.T) {
	for _, answer := range []string{
		"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n{",
		"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
		"HTTP/1.1 500 Oops\r\nContent-Length: 4\r\n\r\noops",
		"HTTP/1.1 404 Not Found\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}",
		"nonsense\r\n\r\n",
		"",
	} {
		run := t.TempDir()
		l, err := net.Listen("unix", filepath.Join(run, api.SocketName))
		if err != nil {
			t.Fatal(err)
		}
		go func() {
			for {
				conn, err := l.Accept()
				if err != nil {
					return
				}
				conn.Read(make([]byte, 4096))
				io.WriteString(conn, answer)
				conn.Close()
			}
		}()
		if _, err := client.New(run).Status(context.Background()); err == nil {
			t.Errorf("answer %q: no error", answer)
		}
		l.Close()
	}
}
