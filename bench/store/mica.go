package store

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/core/snapshots/proxy"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"mica/daemon/api"
	"mica/daemon/client"
)

// A Daemon is a mica daemon with a pool of its own.
type Daemon struct {
	*client.Client
	exe, dir string
	cmd      *exec.Cmd
	exited   chan struct{}
}

// Mica is mica's snapshotter over the socket of a daemon of the program exe.
func Mica(exe string) Maker {
	return Maker{"mica", func(ctx context.Context, dir string, size int64) (*Store, error) {
		d, err := StartDaemon(ctx, exe, dir, size)
		if err != nil {
			return nil, err
		}
		conn, err := grpc.NewClient("unix://"+filepath.Join(dir, "run", "snapshotter.sock"), grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			d.Stop()
			return nil, err
		}
		s := &Store{Name: "mica", Snapshotter: proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(conn), "mica"), daemon: d}
		s.onClose(d.Stop)
		s.onClose(conn.Close)
		s.used = func(ctx context.Context) (int64, error) {
			p, err := d.Pool(ctx)
			return p.DataUsedBytes, err
		}
		return s, nil
	}}
}

// StartDaemon starts a daemon with a pool of size bytes, all below dir, and waits for it.
func StartDaemon(ctx context.Context, exe, dir string, size int64) (*Daemon, error) {
	if err := os.MkdirAll(dir, 0o711); err != nil {
		return nil, err
	}
	config := filepath.Join(dir, "mica.toml")
	text := fmt.Sprintf("root = %q\nrun = %q\n[log]\nlevel = \"warn\"\n[pool]\nsize = \"%dM\"\n[exports]\nlink_dir = %q\n",
		filepath.Join(dir, "root"), filepath.Join(dir, "run"), size>>20, filepath.Join(dir, "links"))
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		return nil, err
	}
	log, err := os.Create(filepath.Join(dir, "mica.log"))
	if err != nil {
		return nil, err
	}
	defer log.Close()
	d := &Daemon{Client: client.New(filepath.Join(dir, "run")), exe: exe, dir: dir, exited: make(chan struct{})}
	d.cmd = exec.Command(exe, "serve", "--config", config)
	d.cmd.Stdout, d.cmd.Stderr = log, log
	d.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := d.cmd.Start(); err != nil {
		return nil, err
	}
	go func() {
		d.cmd.Wait()
		close(d.exited)
	}()
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	for {
		st, err := d.Status(ctx)
		if err == nil && st.Store.BaseReady {
			return d, nil
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-d.exited:
			return nil, fmt.Errorf("the daemon ended: %s", d.logged())
		case <-ctx.Done():
			d.Stop()
			return nil, fmt.Errorf("the daemon is not ready: %w: %s", ctx.Err(), d.logged())
		}
	}
}

// Pid of the daemon.
func (d *Daemon) Pid() int { return d.cmd.Process.Pid }

func (d *Daemon) logged() string {
	b, _ := os.ReadFile(filepath.Join(d.dir, "mica.log"))
	return string(b[max(0, len(b)-2000):])
}

// Stop detaches everything and ends the daemon.
func (d *Daemon) Stop() error {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	err := d.Shutdown(ctx, api.Shutdown{})
	select {
	case <-d.exited:
	case <-time.After(20 * time.Second):
		d.cmd.Process.Signal(syscall.SIGQUIT) // its log then says what it waits for
		<-d.exited
		err = errors.Join(errors.New("the daemon did not end"), err)
	}
	if err != nil {
		err = fmt.Errorf("%w: %s", err, d.logged())
	}
	return err
}
