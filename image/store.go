package image

import (
	"context"

	"mica/layer"
)

// A LayerStore is where Import puts what it read; *layer.Store is one. The store's sessions
// (layer.Import) promise what Import relies on: a layer becomes visible only after its stream
// was read to a clean end, two imports of one layer make it once, and what no image needs after
// an Abort or a crash goes away again.
type LayerStore interface {
	BeginImport(ctx context.Context) (layer.Import, error)
	Image(ctx context.Context, name string) (layer.Image, error)
	RemoveImage(ctx context.Context, name string) error
}
