package layer

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"strings"
	"time"
	"unicode/utf8"

	"mica/layer/catalog"
	"mica/thin"
)

// A SnapKind is a kind of Snap.
type SnapKind string

const (
	SnapActive    SnapKind = "active"    // can be written; becomes a committed one, or goes away
	SnapView      SnapKind = "view"      // a read-only look at its parent
	SnapCommitted SnapKind = "committed" // never changes; others are made from it
)

// A Snap is a snapshot in containerd's sense: it has a name that a client chose, and a parent.
// Each belongs to one snapshotter (see SnapStore), in whose name space it is.
type Snap struct {
	Name    string            `json:"name"`
	Parent  string            `json:"parent,omitempty"` // name of a committed one; empty: the base
	Kind    SnapKind          `json:"kind"`
	Labels  map[string]string `json:"labels,omitempty"`
	Created time.Time         `json:"created"`
	Updated time.Time         `json:"updated"`
	// Device is the snapshot's own; 0 for views, and for names of image layers.
	Device     thin.DevID `json:"device,omitempty"`
	SizeBytes  int64      `json:"size_bytes"` // length of the device
	FSType     string     `json:"fs_type"`
	GuestOwned bool       `json:"guest_owned,omitempty"`
	// ChainID is set on a committed one that is a name of a layer.
	ChainID string `json:"chain_id,omitempty"`
	Broken  string `json:"broken,omitempty"` // why it cannot be used
}

// SnapOptions say how the snapshots of one snapshotter are.
type SnapOptions struct {
	// MountOptions are added to those of the store.
	MountOptions []string
	// GuestOwned: containers are written by guests of virtual machines. Their file systems are
	// not looked into: commits are of blocks, differences are refused. Snapshots made to unpack
	// a layer (SnapSpec.Unpack) are the host's all the same.
	GuestOwned bool
}

// A SnapStore holds the snapshots of one snapshotter, over the store's devices and catalog. Safe
// for concurrent use: operations on different snapshots run in parallel.
//
// What a call returned without error is durable. An operation whose context ends while it waits
// has changed nothing; a step of the catalog that was begun is finished.
type SnapStore struct {
	s    *Store
	name string
	o    SnapOptions
}

// Snaps returns the snapshots of the snapshotter of that name. Two stores of one name are the same
// snapshots.
func (s *Store) Snaps(name string, o SnapOptions) (*SnapStore, error) {
	if err := checkName("snapshotter", name); err != nil {
		return nil, err
	}
	return &SnapStore{s: s, name: name, o: o}, nil
}

// Owner is what the snapshots' devices belong to: "containerd/<snapshotter>".
func (n *SnapStore) Owner() string { return ownerSnaps + n.name }

// ownerSnaps begins the owners of snapshots.
const ownerSnaps = "containerd/"

// A snapshot's record: its key is SNAPSHOTTER/NAME, its parent the record that its device was made
// from (a view and a name of an image layer have no device; they keep their parent all the same).
type snapBody struct {
	deviceBody // ID: of the export; views of one parent share one
	Kind       SnapKind
	ParentName string      `json:"parent_name,omitempty"`
	Updated    time.Time   `json:"updated"`
	Attach     *attachBody `json:"attach,omitempty"`
	ChainID    string      `json:"chain_id,omitempty"`
	// LostWrites: a write to the device failed, most likely for lack of space. What it holds is
	// not what somebody wrote, and it cannot be committed.
	LostWrites bool `json:"lost_writes,omitempty"`
}

// maxSnapName bounds names, in bytes. containerd's are NAMESPACE/NUMBER/KEY.
const maxSnapName = 4096

func checkSnapName(name string) error {
	if name == "" || len(name) > maxSnapName || !utf8.ValidString(name) {
		return fmt.Errorf("%w snapshot name %q: want 1 to %d bytes of UTF-8", ErrInvalid, shorten(name), maxSnapName)
	}
	return nil
}

// checkSnapLabels accepts what containerd does: a key and its value have 4096 bytes together.
func checkSnapLabels(labels map[string]string) error {
	for k, v := range labels {
		if n := len(k) + len(v); n > maxLabelLen || k == "" || !utf8.ValidString(k) || !utf8.ValidString(v) {
			return fmt.Errorf("%w label %q: %d bytes with its value, want 1 to %d of UTF-8", ErrInvalid, shorten(k), n, maxLabelLen)
		}
	}
	return nil
}

func (n *SnapStore) key(name string) string { return n.name + "/" + name }
func (n *SnapStore) ref(name string) string { return kindSnap + "/" + n.key(name) }

// nameOf is the inverse of key.
func nameOf(key string) string {
	_, name, _ := strings.Cut(key, "/")
	return name
}

// record reads a snapshot.
func (n *SnapStore) record(name string) (record[snapBody], error) {
	r, err := load[snapBody](n.s, kindSnap, n.key(name))
	if errors.Is(err, ErrNotFound) {
		err = fmt.Errorf("snapshot %q: %w", shorten(name), ErrNotFound)
	}
	return r, err
}

// lock is lockRecord for a snapshot.
func (n *SnapStore) lock(ctx context.Context, name string) (r record[snapBody], unlock func(), err error) {
	r, unlock, err = lockRecord[snapBody](ctx, n.s, kindSnap, n.key(name))
	if errors.Is(err, ErrNotFound) {
		err = fmt.Errorf("snapshot %q: %w", shorten(name), ErrNotFound)
	}
	return r, unlock, err
}

func (s *Store) describeSnap(r record[snapBody]) Snap {
	b := r.body
	return Snap{Name: nameOf(r.Key), Parent: b.ParentName, Kind: b.Kind, Labels: b.Labels, Created: b.Created,
		Updated: b.Updated, Device: r.Device, SizeBytes: b.SizeBytes, FSType: b.FSType, GuestOwned: b.GuestOwned,
		ChainID: b.ChainID, Broken: s.cat.Broken(r.Ref())}
}

// Stat returns one snapshot.
func (n *SnapStore) Stat(ctx context.Context, name string) (Snap, error) {
	r, err := n.record(name)
	if err != nil {
		return Snap{}, err
	}
	return n.s.describeSnap(r), nil
}

// List returns all snapshots of the snapshotter, in the order of their names.
func (n *SnapStore) List(ctx context.Context) ([]Snap, error) {
	var out []Snap
	err := list(n.s, kindSnap, n.name+"/", "", func(r record[snapBody]) (bool, error) {
		out = append(out, n.s.describeSnap(r))
		return true, ctx.Err()
	})
	return out, err
}

// Update changes a snapshot's labels: fn gets a copy of those that it has.
func (n *SnapStore) Update(ctx context.Context, name string, fn func(labels map[string]string) map[string]string) (Snap, error) {
	_, unlock, err := n.lock(ctx, name)
	if err != nil {
		return Snap{}, err
	}
	defer unlock()
	r, err := n.s.editSnap(ctx, n.key(name), func(b *snapBody) error {
		labels := maps.Clone(b.Labels)
		if labels == nil {
			labels = map[string]string{}
		}
		b.Labels = fn(labels)
		b.Updated = snapNow()
		return checkSnapLabels(b.Labels)
	})
	if err != nil {
		return Snap{}, err
	}
	return n.s.describeSnap(r), nil
}

// editSnap changes a snapshot's record without touching its device.
func (s *Store) editSnap(ctx context.Context, key string, fn func(*snapBody) error) (record[snapBody], error) {
	var out record[snapBody]
	err := s.step(ctx, catalog.Step{FileOnly: true, Apply: func(tx *catalog.Tx) error {
		r, err := get[snapBody](tx, kindSnap, key)
		if err != nil {
			return err
		}
		if err := fn(&r.body); err != nil {
			return err
		}
		out = r
		return put(tx, r)
	}}, nil, nil)
	return out, err
}

// snapNow is a time that is the same after it was written down and read.
func snapNow() time.Time { return time.Now().UTC().Round(0) }

// Usage is what a snapshot provisioned since it was made from its parent, less what it discarded,
// in bytes. O(1), but for the first call after a crash.
func (n *SnapStore) Usage(ctx context.Context, name string) (int64, error) {
	r, err := n.record(name)
	if err != nil {
		return 0, err
	}
	switch {
	case r.body.ChainID != "":
		l, err := n.s.layerRecord(r.body.ChainID)
		if err != nil {
			return 0, err
		}
		return n.s.ownBytes(l.Record, l.body.deviceBody, nil), nil
	case r.body.Kind == SnapView:
		return 0, nil
	}
	return n.s.ownBytes(r.Record, r.body.deviceBody, n.s.liveOf(r.body.ID)), nil
}

// Nudge lets the background try again at once what it could not do before.
func (s *Store) Nudge() { signalLoop(s.wake) }

// Nudge is that of the store.
func (n *SnapStore) Nudge() { n.s.Nudge() }

// Hold keeps a committed snapshot from being removed until release.
func (n *SnapStore) Hold(ctx context.Context, name string) (release func(), err error) {
	_, release, err = n.holdParent(ctx, name)
	return release, err
}

// source is what a snapshot is made from.
type source struct {
	ref   string // of the record that is kept as long as the snapshot
	dev   thin.DevID
	body  deviceBody
	chain string // image layer that it is another name of
}

// holdParent finds what to make a snapshot from, and keeps it until release.
func (n *SnapStore) holdParent(ctx context.Context, parent string) (src source, release func(), err error) {
	s := n.s
	if parent == "" {
		b, err := s.baseRecord(ctx)
		return source{ref: b.Ref(), dev: b.Device, body: b.body.deviceBody}, func() {}, err
	}
	ref := n.ref(parent)
	s.lease(ref, 1)
	drop := func() { s.lease(ref, -1) }
	defer func() {
		if err != nil {
			drop()
		}
	}()
	unlock, err := s.locks.lock(ctx, ref) // a removal under way ends first
	if err != nil {
		return src, nil, err
	}
	unlock()
	r, err := n.record(parent)
	if err != nil {
		return src, nil, fmt.Errorf("parent: %w", err)
	}
	if r.body.Kind != SnapCommitted {
		return src, nil, fmt.Errorf("parent %q is %s, %w: want a committed one", shorten(parent), r.body.Kind, ErrInvalid)
	}
	if err := s.usable(ref); err != nil {
		return src, nil, fmt.Errorf("parent: %w", err)
	}
	src = source{ref: ref, dev: r.Device, body: r.body.deviceBody, chain: r.body.ChainID}
	if src.chain != "" {
		l, err := s.layerRecord(src.chain)
		if err == nil {
			err = s.usable(l.Ref())
		}
		if err != nil {
			return src, nil, fmt.Errorf("parent %q: %w", shorten(parent), err)
		}
		src.dev = l.Device
	}
	return src, drop, nil
}
