package snapshotter

import (
	"context"
	"fmt"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/testsuite"
)

// TestSuite is containerd's own suite for snapshotters, through the library. Each of its tests has a
// snapshotter of its own; all of them share one store.
func TestSuite(t *testing.T) {
	eachFS(t, testSuite)
}

func testSuite(t *testing.T, fs string) {
	runSuite(t, fs, func(sn *Snapshotter, _ string) (snapshots.Snapshotter, func()) { return sn, func() {} })
}

// TestSuiteSocket is the same through the socket, with containerd's client.
func TestSuiteSocket(t *testing.T) {
	runSuite(t, "ext4", func(sn *Snapshotter, sock string) (snapshots.Snapshotter, func()) { return serveOn(t, sn, sock) })
}

func runSuite(t *testing.T, fs string, wrap func(sn *Snapshotter, sock string) (snapshots.Snapshotter, func())) {
	r := newRig(t, 8<<30)
	r.o.FSType = fs
	r.open()
	before := r.used()
	var n atomic.Int32
	t.Run("suite", func(t *testing.T) {
		testsuite.SnapshotterSuite(t, "mica", func(ctx context.Context, root string) (snapshots.Snapshotter, func() error, error) {
			name := fmt.Sprintf("suite%d", n.Add(1))
			sn, err := New(Options{Name: name, Store: r.store, ShareLayers: true, Logger: r.log})
			if err != nil {
				return nil, nil, err
			}
			client, stop := wrap(sn, filepath.Join(r.dir, name+".sock"))
			return client, func() error {
				stop()
				if err := sn.Close(); err != nil {
					return err
				}
				return removeAll(r, name)
			}, nil
		})
	})
	if after := r.used(); after != before {
		t.Errorf("pool holds %d blocks, %d before; queue %+v", after, before, r.store.Queue())
	}
}

// removeAll removes what a test left, children first.
func removeAll(r *rig, name string) error {
	sn, err := New(Options{Name: name, Store: r.store, Logger: r.log})
	if err != nil {
		return err
	}
	for ctx := context.Background(); ; {
		var names []string
		err := sn.Walk(ctx, func(_ context.Context, i snapshots.Info) error { names = append(names, i.Name); return nil })
		if err != nil || len(names) == 0 {
			return err
		}
		removed := 0
		for _, name := range names {
			err := sn.Remove(ctx, name)
			if err == nil {
				removed++
			} else if !strings.Contains(err.Error(), "were made from it") {
				return err
			}
		}
		if removed == 0 {
			return fmt.Errorf("%d snapshots cannot be removed: %v", len(names), names)
		}
	}
}
