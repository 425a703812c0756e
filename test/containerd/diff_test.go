package containerd

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"io"
	"slices"
	"strings"
	"testing"
	"time"

	diffapi "github.com/containerd/containerd/api/services/diff/v1"
	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/core/diff"
	diffproxy "github.com/containerd/containerd/v2/core/diff/proxy"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/proxy"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/rootfs"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

func (b *box) dial(socket string) *grpc.ClientConn {
	b.Helper()
	c, err := grpc.NewClient("unix://"+b.path(socket), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { c.Close() })
	return c
}

// leased is a context for calls of a client that keeps what it makes: in the test's namespace, with a
// lease.
func (b *box) leased(id string) context.Context {
	b.Helper()
	b.ctr("leases", "create", "--id", id)
	ctx, cancel := context.WithTimeout(namespaces.WithNamespace(context.Background(), b.ns), time.Minute)
	b.Cleanup(cancel)
	return leases.WithLease(ctx, id)
}

// TestCommitRunning commits a container that runs and writes, as nerdctl and BuildKit do it: the
// difference to its image becomes a layer in containerd's content store. An image made of the old
// layers and that one runs, and holds what the container held.
func TestCommitRunning(t *testing.T) {
	eachFS(t, func(t *testing.T, b *box) {
		b.up()
		before := b.settled()
		layers := [][]byte{shell(t), layerOf(t, entry{name: "etc/"}, entry{name: "etc/old", data: "old\n"}, entry{name: "gone", data: "x"})}
		b.load(b.archive(imageName, layers...))
		b.run(imageName, "writer", "echo new > /etc/new; rm /gone; i=0; while true; do i=$((i+1)); echo $i >> /log; cp /log /copy; done")
		b.waitFor("some lines", func() bool { return b.count("writer") > 50 })

		ctx := b.leased("keep")
		var differ diff.Comparer = diffproxy.NewDiffApplier(diffapi.NewDiffClient(b.dial("run/diff.sock"))).(diff.Comparer)
		if b.major >= 2 { // through containerd, which knows the proxy
			differ = diffproxy.NewDiffApplier(diffapi.NewDiffClient(b.dial("c.sock"))).(diff.Comparer)
		}
		sn := proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(b.dial("c.sock")), "mica")
		lines := b.count("writer")
		desc, err := rootfs.CreateDiff(ctx, "writer", sn, differ)
		if err != nil {
			b.logs()
			t.Fatal(err)
		}
		b.withoutNamespace(ctx, sn)
		b.waitFor("more lines", func() bool { return b.count("writer") > lines+10 })
		b.kill("writer")

		blob := b.ctr("content", "get", desc.Digest.String())
		z, err := gzip.NewReader(strings.NewReader(blob))
		if err != nil {
			t.Fatal(err)
		}
		plain, err := io.ReadAll(z)
		if err != nil {
			t.Fatal(err)
		}
		names := tarNames(t, plain)
		t.Logf("%d bytes, %v", len(blob), names)
		for _, n := range []string{"etc/new", ".wh.gone", "log"} {
			if !strings.Contains(" "+strings.Join(names, " ")+" ", " "+n+" ") {
				t.Errorf("the layer does not have %s: %v", n, names)
			}
		}
		b.ctr("images", "rm", "--sync", imageName)
		b.load(b.archive("docker.io/library/committed:latest", append(layers, plain)...))
		out := b.in("docker.io/library/committed:latest", "again", "cat /etc/new /etc/old; ls /gone 2>/dev/null; wc -l < /log; tail -n 1 /log")
		f := strings.Fields(out)
		if len(f) != 4 || f[0] != "new" || f[1] != "old" || f[2] != f[3] {
			t.Errorf("the committed image holds %q", out)
		}
		b.ctr("leases", "delete", "keep")
		for _, id := range b.diffLeases() { // containerd 2.4 passes no lease on to a differ
			b.ctr("leases", "delete", id)
		}
		b.ctr("images", "rm", "--sync", "docker.io/library/committed:latest")
		b.wantBack(before)
	})
}

// withoutNamespace calls the differ as releases of containerd do that pass on neither namespace nor
// lease.
func (b *box) withoutNamespace(ctx context.Context, sn snapshots.Snapshotter) {
	b.Helper()
	lower, err := sn.View(ctx, "lower", b.parentOf(ctx, sn, "writer"))
	if err != nil {
		b.Fatal(err)
	}
	upper, err := sn.Mounts(ctx, "writer")
	if err != nil {
		b.Fatal(err)
	}
	d := diffproxy.NewDiffApplier(diffapi.NewDiffClient(b.dial("run/diff.sock"))).(diff.Comparer)
	bare, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	before := b.diffLeases()
	desc, err := d.Compare(bare, lower, upper)
	if err != nil {
		b.Fatal(err)
	}
	b.ctr("content", "get", desc.Digest.String())
	var fresh []string
	for _, id := range b.diffLeases() {
		if !slices.Contains(before, id) {
			fresh = append(fresh, id)
			b.ctr("leases", "delete", id)
		}
	}
	if len(fresh) != 1 {
		b.Errorf("leases %v keep the layer, want one", fresh)
	}
	if err := sn.Remove(ctx, "lower"); err != nil {
		b.Fatal(err)
	}
}

// diffLeases are those that mica made for callers without one.
func (b *box) diffLeases() (ids []string) {
	b.Helper()
	for line := range strings.Lines(b.ctr("leases", "ls")) {
		if f := strings.Fields(line); len(f) > 0 && strings.HasPrefix(f[0], "mica-diff-") {
			ids = append(ids, f[0])
		}
	}
	return ids
}

func (b *box) parentOf(ctx context.Context, sn snapshots.Snapshotter, key string) string {
	b.Helper()
	i, err := sn.Stat(ctx, key)
	if err != nil {
		b.Fatal(err)
	}
	return i.Parent
}

func tarNames(t *testing.T, text []byte) (names []string) {
	t.Helper()
	for r := tar.NewReader(bytes.NewReader(text)); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return names
		}
		if err != nil {
			t.Fatal(err)
		}
		names = append(names, strings.TrimSuffix(h.Name, "/"))
	}
}

// TestApply unpacks through the diff service: the helper process gets the blob and the node.
func TestApply(t *testing.T) {
	each(t, func(t *testing.T, b *box) {
		b.up()
		before := b.settled()
		b.ctr("images", "import", "--no-unpack", b.archive(imageName, shell(t)))
		ctx := b.leased("keep")
		d := diffproxy.NewDiffApplier(diffapi.NewDiffClient(b.dial("run/diff.sock"))).(diff.Applier)
		sn := proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(b.dial("c.sock")), "mica")
		m, err := sn.Prepare(ctx, "unpacked", "")
		if err != nil {
			t.Fatal(err)
		}
		desc := b.layerDescriptor(layerName(t, shell(t)))
		got, err := d.Apply(ctx, desc, m)
		if err != nil {
			b.logs()
			t.Fatal(err)
		}
		if got.Digest.String() != layerName(t, shell(t)) {
			t.Errorf("applied %s, want %s", got.Digest, layerName(t, shell(t)))
		}
		if text := b.readSnapshot("unpacked", "etc/passwd"); !strings.HasPrefix(text, "root:") {
			t.Errorf("unpacked %q", text)
		}
		// Not ours: containerd is told to ask the next differ.
		if _, err := d.Apply(ctx, desc, []mount.Mount{{Type: "bind", Source: b.dir, Options: []string{"rbind"}}}); err == nil || !strings.Contains(err.Error(), "not mounts of this store") {
			t.Errorf("apply to a directory: %v", err)
		}
		if err := sn.Remove(ctx, "unpacked"); err != nil {
			t.Fatal(err)
		}
		b.ctr("leases", "delete", "keep")
		b.ctr("images", "rm", "--sync", imageName)
		b.wantBack(before)
	})
}
