package layer

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"mica/layer/catalog"
)

// Kinds of records. A record's key is the chain id of a layer, the name of an image or container,
// CONTAINER/NAME of a snapshot, the file system's type of the base.
const (
	kindBase      = "base"
	kindLayer     = "layer"
	kindImage     = "image"
	kindContainer = "container"
	kindSnapshot  = "snapshot"
	kindSnap      = "snap"   // of containerd: see Snap
	kindExport    = "export" // what views of one device share
)

// What is common to devices with a file system.
type deviceBody struct {
	ID         string            `json:"id,omitempty"` // never reused
	SizeBytes  int64             `json:"size_bytes"`
	FSType     string            `json:"fs_type"`
	Owner      string            `json:"owner"`
	Labels     map[string]string `json:"labels,omitempty"`
	Created    time.Time         `json:"created"`
	GuestOwned bool              `json:"guest_owned,omitempty"`
	// OwnBlocks were provisioned since the device was made, less those discarded; counted when
	// it was last closed. OwnStale: it has been opened for writing since.
	OwnBlocks int64 `json:"own_blocks"`
	OwnStale  bool  `json:"own_stale,omitempty"`
}

type baseBody struct {
	deviceBody
	UUID string `json:"uuid"`
}

type layerBody struct {
	deviceBody
	Parent string `json:"parent,omitempty"` // chain id
	DiffID string `json:"diff_id,omitempty"`
}

type imageBody struct {
	ChainID   string            `json:"chain_id"`
	Config    json.RawMessage   `json:"config"`
	Digest    string            `json:"digest"`
	MediaType string            `json:"media_type,omitempty"`
	Platform  string            `json:"platform,omitempty"`
	Labels    map[string]string `json:"labels,omitempty"`
	Owner     string            `json:"owner"`
	Created   time.Time         `json:"created"`
}

type containerBody struct {
	deviceBody
	Image   string        `json:"image,omitempty"`
	ChainID string        `json:"chain_id"`
	TTL     time.Duration `json:"ttl,omitempty"`
	Expires *time.Time    `json:"expires,omitempty"`
	Attach  *attachBody   `json:"attach,omitempty"`
	Mounts  []string      `json:"mounts,omitempty"`
	// AskedSize is what Create was asked for, to tell a repeated call from another one.
	AskedSize int64 `json:"asked_size,omitempty"`
}

// attachBody is an attachment that is to exist.
type attachBody struct {
	As       As     `json:"as"`
	ReadOnly bool   `json:"read_only,omitempty"`
	TCP      bool   `json:"tcp,omitempty"` // AsNBD: served over TCP too
	Boot     string `json:"boot"`          // boot id: after a reboot it comes back when asked for
}

type snapshotBody struct {
	deviceBody
	Container string `json:"container"` // name
	Name      string `json:"name"`
	ChainID   string `json:"chain_id"`
	Level     Level  `json:"level"`
}

// removalBody lets the next start find the node of a container that was removed while busy.
type removalBody struct {
	ID        string `json:"id"`
	SizeBytes int64  `json:"size_bytes"`
	ReadOnly  bool   `json:"read_only,omitempty"`
}

// A record is a catalog record with its body decoded.
type record[T any] struct {
	catalog.Record
	body T
}

func decode[T any](r catalog.Record) (record[T], error) {
	d := record[T]{Record: r}
	if err := json.Unmarshal(r.Body, &d.body); err != nil {
		return d, fmt.Errorf("catalog: %s: %w", r.Ref(), err)
	}
	return d, nil
}

// put writes a record with its body.
func put[T any](tx *catalog.Tx, r record[T]) error {
	var err error
	if r.Body, err = json.Marshal(r.body); err != nil {
		return err
	}
	return tx.Put(r.Record)
}

// get reads one record in a transaction; ErrNotFound if there is none.
func get[T any](tx *catalog.Tx, kind, key string) (record[T], error) {
	r, err := tx.Get(kind, key)
	if errors.Is(err, catalog.ErrNoRecord) {
		return record[T]{}, fmt.Errorf("%s %q: %w", kind, key, ErrNotFound)
	}
	if err != nil {
		return record[T]{}, err
	}
	return decode[T](r)
}

// load reads one record.
func load[T any](s *Store, kind, key string) (rec record[T], err error) {
	err = s.cat.View(func(tx *catalog.Tx) error {
		rec, err = get[T](tx, kind, key)
		return err
	})
	return rec, s.wrap(err)
}

// list reads the records of a kind whose key begins with prefix and lies after the key after.
func list[T any](s *Store, kind, prefix, after string, keep func(record[T]) (bool, error)) error {
	return s.wrap(s.cat.View(func(tx *catalog.Tx) error {
		return tx.Each(kind, prefix, after, func(r catalog.Record) (bool, error) {
			d, err := decode[T](r)
			if err != nil {
				return false, err
			}
			return keep(d)
		})
	}))
}

// lockRecord is how a change of an object begins: the store accepts changes, those that others make of
// the object are over, and it is there. The caller unlocks.
func lockRecord[T any](ctx context.Context, s *Store, kind, key string) (r record[T], unlock func(), err error) {
	if err := s.writable(); err != nil {
		return r, nil, err
	}
	if unlock, err = s.locks.lock(ctx, kind+"/"+key); err != nil {
		return r, nil, err
	}
	if r, err = load[T](s, kind, key); err != nil {
		unlock()
		return r, nil, err
	}
	return r, unlock, nil
}

func layerRef(chain string) string { return kindLayer + "/" + chain }

// usable returns why a record cannot be used.
func (s *Store) usable(ref string) error {
	if why := s.cat.Broken(ref); why != "" {
		return fmt.Errorf("%s is %w: %s", strings.Replace(ref, "/", " ", 1), ErrBroken, why)
	}
	return nil
}
