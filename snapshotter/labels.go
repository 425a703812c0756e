package snapshotter

import (
	"fmt"
	"maps"
	"strconv"
	"strings"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/docker/go-units"

	"mica/layer"
)

// Labels with which whoever prepares a snapshot says how large its file system shall be: a number
// of bytes, or one with K, M, G or T (powers of 1024). The first that is there counts.
const (
	LabelSize = "containerd.io/snapshot/mica.size"
	// LabelDiskQuota is what other snapshotters with block devices use.
	LabelDiskQuota = "containerd.io/snapshot/disk_quota"
)

// sizeOf reads the size that labels ask for, in bytes, rounded up to whole file system blocks; 0 if
// they do not. hint: it need not be met.
func sizeOf(labels map[string]string) (size int64, hint bool, err error) {
	for _, k := range []string{LabelSize, LabelDiskQuota, snapshots.LabelSnapshotMaxSize} {
		v := labels[k]
		if v == "" {
			continue
		}
		n, err := units.RAMInBytes(v)
		if err != nil || n <= 0 || n > 1<<60 {
			return 0, false, fmt.Errorf("label %s: %w size %q: want a number of bytes, or a number with K, M, G or T", k, layer.ErrInvalid, v)
		}
		return (n + 4095) &^ 4095, k == snapshots.LabelSnapshotMaxSize, nil
	}
	return 0, false, nil
}

// idmapOptions turns the labels of a user namespace into mount options. containerd mounts with them
// so that the owners of files are shown mapped; nothing of the snapshot changes.
func idmapOptions(labels map[string]string) ([]string, error) {
	uid, gid := labels[snapshots.LabelSnapshotUIDMapping], labels[snapshots.LabelSnapshotGIDMapping]
	if uid == "" && gid == "" {
		return nil, nil
	}
	for k, v := range map[string]string{snapshots.LabelSnapshotUIDMapping: uid, snapshots.LabelSnapshotGIDMapping: gid} {
		if err := checkMapping(v); err != nil {
			return nil, fmt.Errorf("label %s: %w", k, err)
		}
	}
	return []string{"uidmap=" + uid, "gidmap=" + gid}, nil
}

// checkMapping accepts "CONTAINER:HOST:LENGTH", several of them with commas between.
func checkMapping(v string) error {
	for _, m := range strings.Split(v, ",") {
		f := strings.Split(m, ":")
		for _, n := range f {
			if _, err := strconv.ParseUint(n, 10, 32); err != nil {
				f = nil
			}
		}
		if len(f) != 3 {
			return fmt.Errorf("%w id mapping %q: want CONTAINER:HOST:LENGTH", layer.ErrInvalid, v)
		}
	}
	return nil
}

// given are the labels of options; empty ones are none, as in containerd's own stores.
func given(labels map[string]string) map[string]string {
	out := maps.Clone(labels)
	maps.DeleteFunc(out, func(_, v string) bool { return v == "" })
	return out
}
