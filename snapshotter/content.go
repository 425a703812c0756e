package snapshotter

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"strings"
	"time"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	leasesapi "github.com/containerd/containerd/api/services/leases/v1"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/content/proxy"
	"github.com/containerd/containerd/v2/core/leases"
	leaseproxy "github.com/containerd/containerd/v2/core/leases/proxy"
	"github.com/containerd/containerd/v2/defaults"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

// leaseTime is how long a blob is kept for a caller that holds no lease of its own.
const leaseTime = 15 * time.Minute

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
//
// Some releases of containerd pass neither on to a differ. Then the namespace is that of one of the
// snapshots whose mounts the call is about, and what is written is kept for leaseTime.
func (c *Contents) Of(ctx context.Context, snaps []string, write bool) (context.Context, content.Store, error) {
	ns, ok := namespaces.Namespace(ctx)
	if !ok {
		if ns, ok = namespaceOf(snaps); !ok {
			return ctx, nil, as(errors.New("the call names no namespace, and its mounts belong to none"), errdefs.ErrInvalidArgument)
		}
	}
	ctx = namespaces.WithNamespace(ctx, ns)
	if id, ok := leases.FromContext(ctx); ok {
		ctx = leases.WithLease(ctx, id)
	} else if write {
		var b [8]byte
		rand.Read(b[:])
		m := leaseproxy.NewLeaseManager(leasesapi.NewLeasesClient(c.conn))
		l, err := m.Create(ctx, leases.WithID(fmt.Sprintf("mica-diff-%x", b)), leases.WithExpiration(leaseTime))
		if err != nil {
			return ctx, nil, fmt.Errorf("containerd at %s: lease: %w", c.address, err)
		}
		ctx = leases.WithLease(ctx, l.ID)
	}
	return ctx, proxy.NewContentStore(contentapi.NewContentClient(c.conn)), nil
}

// namespaceOf reads the namespace in the names that containerd gives to snapshots: NAMESPACE/NUMBER/KEY.
func namespaceOf(snaps []string) (string, bool) {
	for _, name := range snaps {
		if f := strings.SplitN(name, "/", 3); len(f) == 3 && f[0] != "" && f[1] != "" && strings.Trim(f[1], "0123456789") == "" {
			return f[0], true
		}
	}
	return "", false
}

// Close ends the connection.
func (c *Contents) Close() error { return c.conn.Close() }
