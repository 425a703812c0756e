package helper

import (
	"context"
	"fmt"
	"io"
	"time"

	"mica/layer/archive"
)

// A Client starts helpers. Its fields do not change after the first use. Safe for concurrent use.
type Client struct {
	// Command is the program and first arguments of the helper role.
	Command []string
	// Dir is an existing directory; helpers mount under it, each in its own namespace.
	Dir string
	// Timeout bounds one short operation (60 s if 0); mkfs, grow and trim have ten times that.
	Timeout time.Duration
	// Stall is how long an apply or diff may move no byte before it is killed (5 min if 0).
	Stall time.Duration
	// Limits bound what an applied layer may bring.
	Limits archive.Limits
	// Freeze is how long a file system stays frozen at the most (2 s if 0).
	Freeze time.Duration
}

// Stats count what an apply or diff moved.
type Stats struct {
	Entries  int64 // tar entries
	Bytes    int64 // file contents
	Trimmed  int64 // bytes given back to the pool at the end
	Warnings []string
}

func (c *Client) timeout() time.Duration {
	if c.Timeout > 0 {
		return c.Timeout
	}
	return time.Minute
}

func (c *Client) stall() time.Duration {
	if c.Stall > 0 {
		return c.Stall
	}
	return 5 * time.Minute
}

// longFactor is how much longer than Timeout an operation may take whose work grows with the
// size of the file system.
const longFactor = 10

// short does an operation without a stream, long one that may take longer.
func (c *Client) short(ctx context.Context, req Request) (Response, error) {
	return c.bounded(ctx, req, c.timeout())
}

func (c *Client) long(ctx context.Context, req Request) (Response, error) {
	return c.bounded(ctx, req, longFactor*c.timeout())
}

func (c *Client) bounded(ctx context.Context, req Request, limit time.Duration) (Response, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("%w after %v", ErrTimeout, limit))
	defer cancel()
	req.Dir = c.Dir
	p, err := c.start(req, noStream)
	if err != nil {
		return Response{}, err
	}
	defer p.finish()
	return p.receive(ctx)
}

// Mkfs makes an empty file system on a node whose device reads as zeros. uuid is the file
// system's, and the seed of its directory hashes.
func (c *Client) Mkfs(ctx context.Context, node, fstype, uuid string) error {
	_, err := c.long(ctx, Request{Op: opMkfs, Node: node, FSType: fstype, UUID: uuid})
	return err
}

// Replay mounts and unmounts a node that nobody else has mounted, so that its journal is empty.
func (c *Client) Replay(ctx context.Context, node, fstype string) error {
	_, err := c.short(ctx, Request{Op: opReplay, Node: node, FSType: fstype})
	return err
}

// Grow makes the file system as large as the node, mounted elsewhere or not.
func (c *Client) Grow(ctx context.Context, node, fstype string) error {
	_, err := c.long(ctx, Request{Op: opGrow, Node: node, FSType: fstype})
	return err
}

// Trim discards what the file system does not use and returns how many bytes that was.
func (c *Client) Trim(ctx context.Context, node, fstype string) (int64, error) {
	r, err := c.long(ctx, Request{Op: opTrim, Node: node, FSType: fstype})
	return r.Trimmed, err
}

// Probe tells whether anybody has mounted or claimed a node, in whatever mount namespace.
func (c *Client) Probe(ctx context.Context, node string) (State, error) {
	r, err := c.short(ctx, Request{Op: opProbe, Node: node})
	return r.State, err
}

// Thaw takes back a freeze that a dead helper may have left. StateIdle: there was none.
func (c *Client) Thaw(ctx context.Context, node, fstype string) (State, error) {
	r, err := c.short(ctx, Request{Op: opThaw, Node: node, FSType: fstype})
	return r.State, err
}

// Mount mounts a node on an existing directory in the caller's mount namespace.
func (c *Client) Mount(ctx context.Context, node, dir, fstype string, options []string) error {
	_, err := c.short(ctx, Request{Op: opMount, Node: node, Target: dir, FSType: fstype, Options: options})
	return err
}

// Unmount takes a mount of the caller's mount namespace away.
func (c *Client) Unmount(ctx context.Context, dir string) error {
	_, err := c.short(ctx, Request{Op: opUmount, Target: dir})
	return err
}

// Apply changes the tree on a node as the layer tar r says. r is read to its end; its error
// fails the operation. When Apply returns nil everything is on the device and unmounted; after an
// error the tree is half changed. trim gives unused blocks back at the end.
func (c *Client) Apply(ctx context.Context, node, fstype string, trim bool, r io.Reader) (Stats, error) {
	p, err := c.start(Request{Op: opApply, Node: node, FSType: fstype, Trim: trim, Limits: c.Limits, Dir: c.Dir}, streamIn)
	if err != nil {
		return Stats{}, err
	}
	defer p.finish()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	watch := newWatch(c.stall(), cancel)
	defer watch.stop()
	fed := make(chan error, 1)
	go func() { fed <- p.feed(r, watch) }()
	resp, err := p.receive(ctx)
	if err != nil {
		p.kill() // ends the feed: nobody reads the pipe any more
	}
	// The reader's own error (a wrong digest, a cut archive) says more than the helper's.
	feedErr := waitFeed(fed, err != nil)
	if feedErr != nil {
		return Stats{}, feedErr
	}
	return Stats{Entries: resp.Entries, Bytes: resp.Bytes, Trimmed: resp.Trimmed, Warnings: resp.Warnings}, err
}

// Diff writes the layer tar that leads from the tree on lower ("": an empty tree) to the one on
// upper. Both are mounted read-only and must be clean. changed, if not nil, are the inodes that may
// differ between them: archive.DiffOptions.Changed.
func (c *Client) Diff(ctx context.Context, lower, upper, fstype string, changed []archive.InodeRange, w io.Writer) (Stats, error) {
	p, err := c.start(Request{Op: opDiff, Node: upper, Lower: lower, FSType: fstype, Changed: changed, Dir: c.Dir}, streamOut)
	if err != nil {
		return Stats{}, err
	}
	defer p.finish()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	watch := newWatch(c.stall(), cancel)
	defer watch.stop()
	drained := make(chan error, 1)
	go func() { drained <- p.drain(w, watch) }()
	// The contents are complete only at the end of the stream.
	select {
	case err = <-drained:
	case <-ctx.Done():
		p.kill()
		<-drained
		return Stats{}, context.Cause(ctx)
	}
	if err != nil {
		p.kill()
		return Stats{}, err
	}
	resp, err := p.receive(ctx)
	return Stats{Entries: resp.Entries, Bytes: resp.Bytes, Warnings: resp.Warnings}, err
}

// A Frozen is a file system that is held still. Thaw it.
type Frozen struct {
	State State // StateFrozen, or why nothing had to be or could be frozen
	p     *process
}

// FreezeNode freezes what somebody has mounted from node. It thaws by itself when the time is over,
// when the helper or this process dies, or at Thaw. record, if not empty, is a file that the helper
// keeps locked (flock) until it has ended: Thaw says nothing for sure before that.
func (c *Client) FreezeNode(ctx context.Context, node, fstype, record string) (*Frozen, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, c.timeout(), fmt.Errorf("%w after %v", ErrTimeout, c.timeout()))
	defer cancel()
	limit := c.Freeze
	if limit <= 0 {
		limit = DefaultFreeze
	}
	p, err := c.start(Request{Op: opFreeze, Node: node, FSType: fstype, Dir: c.Dir,
		FreezeMS: limit.Milliseconds(), Record: record}, thawing)
	if err != nil {
		return nil, err
	}
	resp, err := p.receive(ctx)
	if err != nil {
		p.finish()
		return nil, err
	}
	f := &Frozen{State: resp.State}
	if resp.State != StateFrozen {
		p.finish()
		return f, nil
	}
	f.p = p
	return f, nil
}

// Thaw lets the writers go on. It returns ErrTimeout if the file system had been thawed before
// because its time was over: what was done meanwhile cannot rely on the freeze. Any other
// error means that it may still be frozen (Client.Thaw).
func (f *Frozen) Thaw(ctx context.Context) error {
	if f.p == nil {
		return nil
	}
	defer f.p.finish()
	f.p.stdin.Close()
	ctx, cancel := context.WithTimeoutCause(ctx, 10*time.Second, fmt.Errorf("thaw: %w", ErrTimeout))
	defer cancel()
	resp, err := f.p.receive(ctx)
	f.p.wait(ctx) // its mount is gone when it has ended
	if err == nil && resp.State == StateExpired {
		return fmt.Errorf("frozen for too long: %w", ErrTimeout)
	}
	return err
}
