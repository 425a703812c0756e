package image

import (
	"context"
	"io"
)

// A LayerStore is where Import puts what it read. Digests are strings such as "sha256:12ab…";
// a chain id names a layer together with everything below it, as the OCI image spec defines it.
// Methods must be safe for concurrent use with different chain ids; Importer never calls
// ApplyLayer twice at once for the same one.
type LayerStore interface {
	// HasLayer says whether the complete layer chainID exists.
	HasLayer(ctx context.Context, chainID string) (bool, error)

	// ApplyLayer makes layer chainID: a copy of parent (the empty base if parent is "") with
	// the changes of the uncompressed tar stream applied. sizeHint is the number of bytes in
	// the archive, mostly compressed, for estimates; -1 if unknown. progress, if not nil, is
	// called now and then with the number of bytes of tar read so far.
	//
	// It must read tar until tar.Read returns io.EOF, also past the end-of-archive marker:
	// digests are checked there, and any other error means that the content is not what the
	// image says. The layer becomes visible only after that; on every error, a cancelled
	// context included, nothing of it remains.
	ApplyLayer(ctx context.Context, parent, chainID, diffID string, sizeHint int64, tar io.Reader, progress func(bytes int64)) error

	// RemoveLayer takes back a layer that a failed import made. It is called only for layers
	// for which ApplyLayer returned nil, children before parents. A layer that an image or a
	// container uses must stay; that is not an error. Removing what does not exist is nil.
	RemoveLayer(ctx context.Context, chainID string) error

	// PutImage records, durably and in one step, the image name with its config (JSON), the
	// digest of its manifest ("" for archives that have none) and its layers, lowest first.
	// An older image of that name is replaced.
	PutImage(ctx context.Context, name string, config []byte, manifestDigest string, chainIDs []string) error
}
