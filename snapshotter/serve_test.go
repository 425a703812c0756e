package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/proxy"
	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
)

// clientRole calls Stat on a socket and prints the code of the answer; the test starts it as somebody
// else.
func clientRole(sock string) error {
	conn, err := grpc.NewClient("unix://"+sock, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	_, err = snapshotsapi.NewSnapshotsClient(conn).Stat(ctx, &snapshotsapi.StatSnapshotRequest{Key: "k"})
	fmt.Println(status.Code(err), err)
	return nil
}

// brokenSnapshotter panics, or fails without a class.
type brokenSnapshotter struct{ snapshots.Snapshotter }

func (brokenSnapshotter) Stat(context.Context, string) (snapshots.Info, error) { panic("broken") }
func (brokenSnapshotter) Walk(context.Context, snapshots.WalkFunc, ...string) error {
	return as(errors.New("no such filter"), errdefs.ErrInvalidArgument)
}

// TestNoServer: without a daemon a client learns that, and which socket does not answer.
func TestNoServer(t *testing.T) {
	sock := filepath.Join(t.TempDir(), "none.sock")
	conn, err := grpc.NewClient("unix://"+sock, grpc.WithTransportCredentials(insecure.NewCredentials()))
	ok(t, err)
	defer conn.Close()
	sn := proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(conn), "mica")
	_, err = sn.Prepare(tctx(t), "k", "")
	wantClass(t, err, errdefs.IsUnavailable, sock)
	wantClass(t, sn.Remove(tctx(t), "k"), errdefs.IsUnavailable, sock)
}

// TestServer: only root and the daemon's own user are answered, whatever the socket's mode is; a panic
// is an error and not the end; errors of streams have classes; calls are counted.
func TestServer(t *testing.T) {
	dir, err := os.MkdirTemp("", "mica-serve-")
	ok(t, err)
	defer os.RemoveAll(dir)
	ok(t, os.Chmod(dir, 0o755))
	sock := filepath.Join(dir, "s.sock")
	l, err := net.Listen("unix", sock)
	ok(t, err)
	ok(t, os.Chmod(sock, 0o666))
	calls := make(chan string, 10)
	srv := NewServer(ServerOptions{Snapshotter: brokenSnapshotter{}, UID: os.Getuid(), Logger: testLogger(),
		Observe: func(method, code string, _ time.Duration) { calls <- method + " " + code }})
	go srv.Serve(l)
	defer srv.Stop(time.Second)
	conn, err := grpc.NewClient("unix://"+sock, grpc.WithTransportCredentials(insecure.NewCredentials()))
	ok(t, err)
	defer conn.Close()
	_, err = snapshotsapi.NewSnapshotsClient(conn).Stat(tctx(t), &snapshotsapi.StatSnapshotRequest{Key: "k"})
	if status.Code(err) != codes.Internal || !strings.Contains(err.Error(), "broken") {
		t.Errorf("a panic: %v", err)
	}
	sn := proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(conn), "mica")
	wantClass(t, sn.Walk(tctx(t), nil), errdefs.IsInvalidArgument, "no such filter")
	for _, want := range []string{"Stat Internal", "List InvalidArgument"} {
		if got := <-calls; got != want {
			t.Errorf("observed %q, want %q", got, want)
		}
	}
	if os.Geteuid() != 0 {
		t.Skip("SKIPPED: only root can call as somebody else")
	}
	text, err := os.ReadFile("/proc/self/exe")
	ok(t, err)
	program := filepath.Join(dir, "client")
	ok(t, os.WriteFile(program, text, 0o755))
	cmd := exec.Command(program, "role-client", sock)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.HasPrefix(string(out), "PermissionDenied") || !strings.Contains(string(out), "user 65534") {
		t.Errorf("a call of another user: %v\n%s", err, out)
	}
}
