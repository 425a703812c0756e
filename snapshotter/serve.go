package snapshotter

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"runtime/debug"
	"strings"
	"time"

	diffapi "github.com/containerd/containerd/api/services/diff/v1"
	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/contrib/diffservice"
	"github.com/containerd/containerd/v2/contrib/snapshotservice"
	"github.com/containerd/containerd/v2/core/diff"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/defaults"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
)

// A Server answers containerd on Unix sockets.
type Server struct {
	g *grpc.Server
	o ServerOptions
}

// ServerOptions of NewServer.
type ServerOptions struct {
	// Snapshotter and Diff are what is served; nil: not that.
	Snapshotter snapshots.Snapshotter
	Diff        DiffService
	// UID is a user beside root who may call.
	UID int
	// Observe, if not nil, is told of every call: "Prepare", the gRPC code ("OK"), how long it took.
	Observe func(method, code string, took time.Duration)
	Logger  *slog.Logger
}

// A DiffService is both halves of containerd's diff service.
type DiffService interface {
	diff.Applier
	diff.Comparer
}

// NewServer makes a server for one service, or for both.
func NewServer(o ServerOptions) *Server {
	if o.Logger == nil {
		o.Logger = slog.Default()
	}
	s := &Server{o: o}
	s.g = grpc.NewServer(
		grpc.Creds(peerCreds{}),
		grpc.UnaryInterceptor(s.unary), grpc.StreamInterceptor(s.stream),
		grpc.MaxRecvMsgSize(defaults.DefaultMaxRecvMsgSize), grpc.MaxSendMsgSize(defaults.DefaultMaxSendMsgSize),
	)
	if o.Snapshotter != nil {
		snapshotsapi.RegisterSnapshotsServer(s.g, snapshotservice.FromSnapshotter(o.Snapshotter))
	}
	if o.Diff != nil {
		diffapi.RegisterDiffServer(s.g, diffservice.FromApplierAndComparer(o.Diff, o.Diff))
	}
	return s
}

// Serve answers on a listener until Stop, or until the listener fails.
func (s *Server) Serve(l net.Listener) error { return s.g.Serve(l) }

// Stop closes the listeners and lets calls end that are under way, for some time.
func (s *Server) Stop(wait time.Duration) {
	done := make(chan struct{})
	go func() {
		s.g.GracefulStop()
		close(done)
	}()
	t := time.NewTimer(wait)
	defer t.Stop()
	select {
	case <-done:
	case <-t.C:
		s.g.Stop()
		<-done
	}
}

// allow refuses callers that are not root and not this process's user.
func (s *Server) allow(ctx context.Context, method string) error {
	p, ok := peer.FromContext(ctx)
	if ok {
		if a, ok := p.AuthInfo.(peerInfo); ok && (a.uid == 0 || a.uid == s.o.UID) {
			return nil
		} else if ok {
			return status.Errorf(codes.PermissionDenied, "%s: process %d runs as user %d, which may not use this socket", method, a.pid, a.uid)
		}
	}
	return status.Errorf(codes.PermissionDenied, "%s: the caller is not known", method)
}

func (s *Server) unary(ctx context.Context, req any, i *grpc.UnaryServerInfo, h grpc.UnaryHandler) (resp any, err error) {
	if err := s.allow(ctx, i.FullMethod); err != nil {
		return nil, err
	}
	start := time.Now()
	defer func() { err = s.end(i.FullMethod, start, recover(), err) }()
	return h(ctx, req)
}

func (s *Server) stream(srv any, ss grpc.ServerStream, i *grpc.StreamServerInfo, h grpc.StreamHandler) (err error) {
	if err := s.allow(ss.Context(), i.FullMethod); err != nil {
		return err
	}
	start := time.Now()
	defer func() { err = s.end(i.FullMethod, start, recover(), err) }()
	return h(srv, ss)
}

// end makes an answer of what a call came to. A panic of ours becomes an error: others' I/O goes
// through this process.
func (s *Server) end(method string, start time.Time, v any, err error) error {
	if v != nil {
		s.o.Logger.Error("panic in a call", "method", method, "panic", v, "stack", string(debug.Stack()))
		err = status.Error(codes.Internal, fmt.Sprintf("%s: internal error: %v", method, v))
	}
	if err != nil {
		if _, ok := status.FromError(err); !ok {
			err = errgrpc.ToGRPC(err)
		}
		s.o.Logger.Debug("call", "method", method, "took", time.Since(start).Round(time.Microsecond), "err", err)
	}
	if s.o.Observe != nil {
		s.o.Observe(method[strings.LastIndexByte(method, '/')+1:], status.Code(err).String(), time.Since(start))
	}
	return err
}
