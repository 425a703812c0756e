package main

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"mica/daemon/api"
	"mica/layer"
)

// TestMainJob is the whole everyday job with the real program: a daemon without configuration, an
// image, containers on it, snapshots, forks, a commit, and removal of everything.
func TestMainJob(t *testing.T) {
	b := newBox(t)
	b.start()
	empty := b.settle()

	if out := b.mica("image", "import", b.testImage()); !strings.HasPrefix(out, "test:1  ") || !strings.HasSuffix(out, "2 layers, 2 new") {
		t.Errorf("image import: %q", out)
	}
	in := b.command("image", "import", "-", "--name", "again", "--label", "k=v")
	f, err := os.Open(filepath.Join(b.dir, "image.tar"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	in.Stdin = f
	if out, err := in.Output(); err != nil || !strings.HasSuffix(string(out), "2 layers, 0 new\n") {
		t.Errorf("import of the same from a stream: %q %v", out, err)
	}
	images := asJSON[[]layer.Image](b, "image", "ls", "--label", "k=v")
	if len(images) != 1 || images[0].Name != "again" || len(images[0].Layers) != 2 {
		t.Errorf("images: %+v", images)
	}
	withImage := b.settle()

	// Create is idempotent with the same parameters, and costs nothing.
	b.mica("create", "test:1", "web", "--label", "team=a")
	b.mica("create", "test:1", "web", "--label", "team=a")
	if msg := b.fails("create", "again", "web"); !strings.Contains(msg, `container "web" already exists`) {
		t.Errorf("create with another image: %s", msg)
	}
	if n := b.settle().DataUsed; n != withImage.DataUsed {
		t.Errorf("a new container takes %d blocks, want none", n-withImage.DataUsed)
	}

	// The file system shows the layers: the upper one's file, not the one that it deleted.
	dir := b.mica("mount", "web")
	if want := filepath.Join(b.run, "mnt", "web"); dir != want {
		t.Errorf("mounted on %q, want %q", dir, want)
	}
	if got := b.read(dir + "/etc/hostname"); got != "high\n" {
		t.Errorf("hostname %q", got)
	}
	if _, err := os.Stat(dir + "/etc/motd"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a file that the upper layer deletes: %v", err)
	}
	if got := b.read(dir + "/big"); got != string(pattern(1, 8<<20)) {
		t.Error("big is not what the image has")
	}
	if again := b.mica("mount", "web"); again != dir {
		t.Errorf("mounted again on %q", again)
	}

	// A snapshot and two forks of a mounted container, while it changes.
	b.write(dir+"/state", "one")
	if out := b.mica("snapshot", "web", "one"); out != "one" {
		t.Errorf("snapshot: %q", out)
	}
	// The same again takes nothing, and says so; another of the name is an error.
	if out, stderr, code := b.try("snapshot", "web", "one"); code != 0 || out != "one\n" || !strings.Contains(stderr, `"one" since 20`) {
		t.Errorf("a snapshot that is there: exit status %d, %q, %q", code, out, stderr)
	}
	b.fails("snapshot", "web", "one", "--label", "x=y")
	b.write(dir+"/state", "two")
	if out := b.mica("fork", "web", "f1", "f2"); out != "f1\nf2" {
		t.Errorf("fork: %q", out)
	}
	b.write(dir+"/state", "three")
	forked := b.mica("mount", "f1")
	if got := b.read(forked + "/state"); got != "two" {
		t.Errorf("the fork has state %q, want two", got)
	}
	b.write(forked+"/state", "fork")
	if got := b.read(dir + "/state"); got != "three" {
		t.Errorf("a write to the fork changed the container: %q", got)
	}

	// Rollback needs it detached; the error says what to do.
	if msg := b.fails("rollback", "web", "one"); !strings.Contains(msg, "detach it first") {
		t.Errorf("rollback of what is mounted: %s", msg)
	}
	if msg := b.fails("detach", "web"); !strings.Contains(msg, "mounted on "+dir) {
		t.Errorf("detach of what is mounted does not name the mount: %s", msg)
	}
	b.mica("umount", "web", "f1")
	if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the default directory after umount: %v", err)
	}
	b.mica("rollback", "web", "one")
	dir = b.mica("mount", "web")
	if got := b.read(dir + "/state"); got != "one" {
		t.Errorf("after the rollback the state is %q", got)
	}

	// diff is a layer tar with what changed; a commit is an image with one layer more.
	if err := os.Remove(dir + "/etc/hostname"); err != nil {
		t.Fatal(err)
	}
	diff := tarNames(t, []byte(b.mica("diff", "web")))
	if !slices.Contains(diff, "state") || !slices.Contains(diff, "etc/.wh.hostname") || slices.Contains(diff, "big") {
		t.Errorf("diff: %q", diff)
	}
	out := filepath.Join(b.dir, "diff.tar")
	b.mica("diff", "web", "-o", out)
	if got := tarNames(t, []byte(b.read(out))); !slices.Equal(got, diff) {
		t.Errorf("diff -o: %q, want %q", got, diff)
	}
	b.fails("diff", "none", "-o", out+".2")
	if _, err := os.Stat(out + ".2"); !errors.Is(err, os.ErrNotExist) {
		t.Error("a failed diff left a file")
	}
	r := asJSON[layer.CommitResult](b, "commit", "web", "mine:1", "--comment", "a test")
	if len(r.Image.Layers) != 3 || r.Image.Name != "mine:1" {
		t.Errorf("commit: %+v", r)
	}
	if msg := b.fails("commit", "web", "mine:1"); !strings.Contains(msg, "mine:1") {
		t.Errorf("commit onto a name that is taken: %s", msg)
	}
	b.mica("create", "mine:1", "second")
	second := b.mica("mount", "second", "--read-only")
	if got := b.read(second + "/state"); got != "one" {
		t.Errorf("a container of the new image has state %q", got)
	}
	if err := os.WriteFile(second+"/x", nil, 0o644); err == nil {
		t.Error("a read-only mount can be written")
	}
	b.mica("umount", "second", "web")

	// Resize, in and out of use.
	if out := b.mica("resize", "web", "12G"); out != "web: 12G" {
		t.Errorf("resize: %q", out)
	}
	if msg := b.fails("resize", "web", "1G"); !strings.Contains(msg, "1073741824") {
		t.Errorf("shrinking: %s", msg)
	}
	dir = b.mica("mount", "web", b.mkdir("here"))
	if got := statfsBytes(t, dir); got < 11<<30 {
		t.Errorf("the file system has %d bytes after a resize to 12G", got)
	}

	// Lists and figures.
	list := asJSON[[]api.Container](b, "ls", "--label", "team=a")
	if len(list) != 3 { // the forks took the labels over
		t.Errorf("ls: %d containers", len(list))
	}
	if text := b.mica("ls"); !strings.Contains(text, dir) {
		t.Errorf("ls does not show the mount:\n%s", text)
	}
	df := asJSON[layer.DF](b, "df")
	kinds := map[string]int{}
	for _, e := range df.Entries {
		kinds[e.Kind]++
	}
	if kinds["container"] != 4 || kinds["layer"] != 3 || kinds["snapshot"] != 1 || kinds["base"] != 1 {
		t.Errorf("df: %v", kinds)
	}
	var v api.Container
	if err := json.Unmarshal([]byte(b.mica("inspect", "web")), &v); err != nil || v.SizeBytes != 12<<30 || v.Attachment == nil {
		t.Errorf("inspect: %+v %v", v, err)
	}
	if text := b.mica("inspect", "web/one"); !strings.Contains(text, `"container": "web"`) {
		t.Errorf("inspect of a snapshot: %s", text)
	}
	if text := b.mica("inspect", "mine:1"); !strings.Contains(text, `"digest"`) {
		t.Errorf("inspect of an image: %s", text)
	}
	for _, want := range []string{"Pool Name: root-pool", "Pool Blocksize: 64K", "Base Device Size: 10G", "Backing Filesystem: ext4",
		"Data file: " + b.root + "/pool/data", "Data Space Used:", "Metadata Space Available:", "Mode: rw", "Holder: process ", "Foreign Devices: 0"} {
		if text := b.mica("status"); !strings.Contains(text, want) {
			t.Errorf("status has no %q:\n%s", want, text)
		}
	}
	if text := b.mica("pool", "check"); !strings.Contains(text, "clean") {
		t.Errorf("pool check: %s", text)
	}
	b.mica("pool", "trim")
	b.mica("pool", "grow", "--metadata-size", "64M")
	if n := asJSON[api.Status](b, "status").Pool.MetadataSpaceBytes; n != 64<<20 {
		t.Errorf("metadata of %d bytes after growing", n)
	}

	// Removal gives everything back.
	if msg := b.fails("rm", "web"); !strings.Contains(msg, "snapshot") && !strings.Contains(msg, "mounted") {
		t.Errorf("rm of what is mounted and has a snapshot: %s", msg)
	}
	b.mica("umount", "web")
	b.mica("snapshot", "rm", "web", "one")
	b.mica("rm", "web", "second", "f1", "f2")
	if msg := b.fails("rm", "web", "f1"); strings.Count(msg, "not found") != 2 {
		t.Errorf("rm of what is not there does not name both: %s", msg)
	}
	b.mica("image", "rm", "test:1", "again", "mine:1")
	if end := b.settle(); end.DataUsed != empty.DataUsed {
		t.Errorf("%d blocks are used at the end, %d were at the beginning", end.DataUsed, empty.DataUsed)
	}
	b.mica("shutdown")
	if code := b.waitEnd(); code != 0 {
		t.Errorf("the daemon ended with %d", code)
	}
	if text := b.mica("thin", "check", b.root+"/pool"); strings.Contains(text, "fatal") {
		t.Errorf("thin check: %s", text)
	}
	if tool, err := exec.LookPath("thin_check"); err == nil {
		if out, err := exec.Command(tool, b.root+"/pool/metadata").CombinedOutput(); err != nil {
			t.Errorf("thin_check: %v\n%s", err, out)
		}
	}
}

func (b *box) mkdir(name string) string {
	b.Helper()
	dir := filepath.Join(b.dir, name)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		b.Fatal(err)
	}
	return dir
}

func tarNames(t *testing.T, text []byte) []string {
	t.Helper()
	var names []string
	for r := tar.NewReader(bytes.NewReader(text)); ; {
		h, err := r.Next()
		if err == io.EOF {
			return names
		}
		if err != nil {
			t.Fatal(err)
		}
		names = append(names, strings.TrimPrefix(h.Name, "./"))
	}
}

// TestEventsCommand: what happened can be asked for afterwards, with ids to go on from.
func TestEventsCommand(t *testing.T) {
	b := newBox(t)
	b.start()
	b.settle()
	b.mica("image", "import", b.testImage())
	b.mica("create", "test:1", "web", "--ttl", "1s")
	b.eventually("web is removed when its time is over", func() bool { return b.mica("ls", "--json") == "[]" })
	b.settle()
	events := func(args ...string) (list []api.Event) {
		t.Helper()
		d := json.NewDecoder(strings.NewReader(b.mica(append([]string{"events", "--no-follow", "--json"}, args...)...)))
		for d.More() {
			var e api.Event
			if err := d.Decode(&e); err != nil {
				t.Fatal(err)
			}
			list = append(list, e)
		}
		return list
	}
	all := events()
	var kinds []string
	for i, e := range all {
		kinds = append(kinds, e.Kind+" "+e.Object)
		if i > 0 && e.ID <= all[i-1].ID {
			t.Errorf("event %d after %d", e.ID, all[i-1].ID)
		}
	}
	at := 0
	for _, want := range []string{"start daemon", "import image/test:1", "create container/web", "expire container/web"} {
		i := slices.Index(kinds[at:], want)
		if i < 0 {
			t.Errorf("no %q behind event %d of %q", want, at, kinds)
			continue
		}
		at += i
	}
	if rest := events("--after", jsonNumber(all[2].ID)); len(rest) < len(all)-3 || rest[0].ID != all[3].ID {
		t.Errorf("%d events after the third of %d", len(rest), len(all))
	}
	for _, e := range events("--object", "container/web") {
		if e.Object != "container/web" {
			t.Errorf("event about %s", e.Object)
		}
	}
}

func jsonNumber(n uint64) string { b, _ := json.Marshal(n); return string(b) }

// TestCurl: the socket is plain HTTP with JSON, for any client.
func TestCurl(t *testing.T) {
	b := newBox(t)
	curl, err := exec.LookPath("curl")
	if err != nil {
		t.Skip("SKIPPED: needs curl")
	}
	b.start()
	b.settle()
	get := func(args ...string) string {
		t.Helper()
		out, err := exec.Command(curl, append([]string{"-sS", "--unix-socket", b.run + "/mica.sock"}, args...)...).CombinedOutput()
		if err != nil {
			t.Fatalf("curl %q: %v\n%s", args, err, out)
		}
		return string(out)
	}
	if out := get("-T", b.testImage(), "-X", "POST", "http://mica/v1/images?name=a/b:1"); !strings.Contains(out, `"state":"done"`) {
		t.Errorf("import: %s", out)
	}
	if out := get("http://mica/v1/images/a/b:1"); !strings.Contains(out, `"name":"a/b:1"`) {
		t.Errorf("image: %s", out)
	}
	if out := get("-d", `{"name":"web","image":"a/b:1"}`, "http://mica/v1/containers"); !strings.Contains(out, `"name":"web"`) {
		t.Errorf("create: %s", out)
	}
	if out := get("-d", `{"name":"web","image":"none"}`, "http://mica/v1/containers"); !strings.Contains(out, `"code":`) {
		t.Errorf("create of what is there: %s", out)
	}
	if out := get("http://mica/v1/openapi.json"); !strings.Contains(out, `"openapi": "3.0.3"`) {
		t.Errorf("page: %.200s", out)
	}
	st, err := os.Stat(b.run + "/mica.sock")
	if err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("socket mode %v %v", st.Mode(), err)
	}
}
