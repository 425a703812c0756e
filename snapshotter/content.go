package snapshotter

import (
	"context"
	"errors"
	"fmt"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/content/proxy"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/defaults"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

// A Contents reaches containerd's content store over containerd's own socket, where the blobs are
// that the diff service reads and writes.
type Contents struct {
	address string
	conn    *grpc.ClientConn
}

// DialContents prepares the connection; it is made at the first use, and again when containerd was
// restarted.
func DialContents(address string) (*Contents, error) {
	conn, err := grpc.NewClient("unix://"+address, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(defaults.DefaultMaxRecvMsgSize), grpc.MaxCallSendMsgSize(defaults.DefaultMaxSendMsgSize)))
	if err != nil {
		return nil, fmt.Errorf("containerd at %s: %w", address, err)
	}
	return &Contents{address: address, conn: conn}, nil
}

// Of returns the content store for a call that containerd made: in its namespace, and with its
// lease, so that what is written is not collected.
func (c *Contents) Of(ctx context.Context) (context.Context, content.Store, error) {
	ns, ok := namespaces.Namespace(ctx)
	if !ok {
		return ctx, nil, as(errors.New("the call names no namespace"), errdefs.ErrInvalidArgument)
	}
	ctx = namespaces.WithNamespace(ctx, ns)
	if id, ok := leases.FromContext(ctx); ok {
		ctx = leases.WithLease(ctx, id)
	}
	return ctx, proxy.NewContentStore(contentapi.NewContentClient(c.conn)), nil
}

// Close ends the connection.
func (c *Contents) Close() error { return c.conn.Close() }
