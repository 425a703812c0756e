package client

import (
	"context"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"mica/daemon/api"
	"mica/layer"
)

// Status asks for the state of the daemon.
func (c *Client) Status(ctx context.Context) (st api.Status, err error) {
	_, err = c.call(ctx, "GET", "/status", nil, nil, &st)
	return st, err
}

// Shutdown detaches everything and ends the daemon. CodeBusy: nothing was done.
func (c *Client) Shutdown(ctx context.Context, o api.Shutdown) error {
	_, err := c.call(ctx, "POST", "/shutdown", nil, o, nil)
	return err
}

// A Filter selects from a listing.
type Filter struct {
	Labels []string // K=V, or K for any value
	Owner  string   // empty: mica; "*": all
	Prefix string
	Image  string // containers only
}

func (f Filter) query() url.Values {
	q := url.Values{}
	for _, l := range f.Labels {
		q.Add("label", l)
	}
	for k, v := range map[string]string{"owner": f.Owner, "prefix": f.Prefix, "image": f.Image} {
		if v != "" {
			q.Set(k, v)
		}
	}
	return q
}

// Images lists images.
func (c *Client) Images(ctx context.Context, f Filter) ([]layer.Image, error) {
	return pages[layer.Image](ctx, c, "/images", f.query())
}

// Image returns one image.
func (c *Client) Image(ctx context.Context, name string) (i layer.Image, err error) {
	_, err = c.call(ctx, "GET", "/images/"+escape(name), nil, nil, &i)
	return i, err
}

// RemoveImage removes an image's name, and what nothing else needs.
func (c *Client) RemoveImage(ctx context.Context, name string) error {
	_, err := c.call(ctx, "DELETE", "/images/"+escape(name), nil, nil, nil)
	return err
}

// TagImage gives an image a further name.
func (c *Client) TagImage(ctx context.Context, name, newName string) (i layer.Image, err error) {
	_, err = c.call(ctx, "POST", "/images/"+escape(name)+"/tags", nil, api.TagImage{Name: newName}, &i)
	return i, err
}

// Layers lists image layers.
func (c *Client) Layers(ctx context.Context) ([]layer.Layer, error) {
	var l api.List[layer.Layer]
	_, err := c.call(ctx, "GET", "/layers", nil, nil, &l)
	return l.Items, err
}

// ImportFile lets the daemon import a file of its host, in the background.
func (c *Client) ImportFile(ctx context.Context, in api.ImportFile, o OpOptions) (op api.Operation, err error) {
	_, err = c.call(ctx, "POST", "/images", o.query(), in, &op)
	return op, err
}

// ImportStream sends an archive and returns when it is imported. Meanwhile the operation with
// the id in o shows the progress.
func (c *Client) ImportStream(ctx context.Context, r io.Reader, p api.ImportParams, o OpOptions) (op api.Operation, err error) {
	q := o.query()
	for k, v := range map[string]string{"name": p.Name, "platform": p.Platform, "ref": p.Ref} {
		if v != "" {
			q.Set(k, v)
		}
	}
	if p.Replace {
		q.Set("replace", "true")
	}
	for k, v := range p.Labels {
		q.Add("label", k+"="+v)
	}
	body, stop := abandonable(ctx, r)
	defer stop()
	resp, err := c.once(stop).send(ctx, "POST", "/images", q, api.MediaOctets, body)
	if err != nil {
		return op, err
	}
	defer resp.Body.Close()
	return op, decodeJSON(resp, &op)
}

// Containers lists containers.
func (c *Client) Containers(ctx context.Context, f Filter) ([]api.Container, error) {
	return pages[api.Container](ctx, c, "/containers", f.query())
}

// Container returns one container.
func (c *Client) Container(ctx context.Context, name string) (v api.Container, err error) {
	_, err = c.call(ctx, "GET", "/containers/"+escape(name), nil, nil, &v)
	return v, err
}

// CreateContainer makes a container; created is false if one with the same parameters was there.
func (c *Client) CreateContainer(ctx context.Context, in api.CreateContainer) (v api.Container, created bool, err error) {
	status, err := c.call(ctx, "POST", "/containers", nil, in, &v)
	return v, status == http.StatusCreated, err
}

// UpdateContainer changes labels or the time to live.
func (c *Client) UpdateContainer(ctx context.Context, name string, in api.UpdateContainer) (v api.Container, err error) {
	_, err = c.call(ctx, "PATCH", "/containers/"+escape(name), nil, in, &v)
	return v, err
}

// RemoveContainer removes a container.
func (c *Client) RemoveContainer(ctx context.Context, name string, o layer.RemoveOptions) error {
	q := url.Values{}
	if o.Deferred {
		q.Set("deferred", "true")
	}
	if o.Snapshots {
		q.Set("snapshots", "true")
	}
	_, err := c.call(ctx, "DELETE", "/containers/"+escape(name), q, nil, nil)
	return err
}

// Fork makes copies of a container.
func (c *Client) Fork(ctx context.Context, name string, in api.ForkContainer) (r api.ForkResult, err error) {
	_, err = c.call(ctx, "POST", "/containers/"+escape(name)+"/fork", nil, in, &r)
	return r, err
}

// Rollback gives a detached container the contents of a snapshot.
func (c *Client) Rollback(ctx context.Context, name, snap string) (v api.Container, err error) {
	_, err = c.call(ctx, "POST", "/containers/"+escape(name)+"/rollback", nil, api.RollbackContainer{Snapshot: snap}, &v)
	return v, err
}

// Commit starts to make an image from a container.
func (c *Client) Commit(ctx context.Context, name string, in api.CommitContainer, o OpOptions) (op api.Operation, err error) {
	_, err = c.call(ctx, "POST", "/containers/"+escape(name)+"/commit", o.query(), in, &op)
	return op, err
}

// Resize enlarges a container.
func (c *Client) Resize(ctx context.Context, name string, sizeBytes int64) (v api.Container, err error) {
	_, err = c.call(ctx, "POST", "/containers/"+escape(name)+"/resize", nil, api.ResizeContainer{SizeBytes: sizeBytes}, &v)
	return v, err
}

// NoteMount and ForgetMount keep the list of where the node was mounted.
func (c *Client) NoteMount(ctx context.Context, name, dir string) error {
	_, err := c.call(ctx, "POST", "/containers/"+escape(name)+"/mounts", nil, api.MountNote{Directory: dir}, nil)
	return err
}

// ForgetMount is the reverse of NoteMount.
func (c *Client) ForgetMount(ctx context.Context, name, dir string) error {
	_, err := c.call(ctx, "DELETE", "/containers/"+escape(name)+"/mounts", nil, api.MountNote{Directory: dir}, nil)
	return err
}

// Snapshots lists the snapshots of a container, or of all if the name is empty.
func (c *Client) Snapshots(ctx context.Context, container string) ([]layer.Snapshot, error) {
	q := url.Values{}
	if container != "" {
		q.Set("container", container)
	}
	return pages[layer.Snapshot](ctx, c, "/snapshots", q)
}

// Snapshot returns one snapshot.
func (c *Client) Snapshot(ctx context.Context, container, name string) (v layer.Snapshot, err error) {
	_, err = c.call(ctx, "GET", "/snapshots/"+escape(container)+"/"+escape(name), nil, nil, &v)
	return v, err
}

// CreateSnapshot keeps a container's contents as of now.
func (c *Client) CreateSnapshot(ctx context.Context, in api.CreateSnapshot) (v layer.Snapshot, created bool, err error) {
	status, err := c.call(ctx, "POST", "/snapshots", nil, in, &v)
	return v, status == http.StatusCreated, err
}

// RemoveSnapshot removes a snapshot.
func (c *Client) RemoveSnapshot(ctx context.Context, container, name string) error {
	_, err := c.call(ctx, "DELETE", "/snapshots/"+escape(container)+"/"+escape(name), nil, nil, nil)
	return err
}

// Attachments lists what is attached.
func (c *Client) Attachments(ctx context.Context, owner string) ([]api.AttachmentOf, error) {
	q := url.Values{}
	if owner != "" {
		q.Set("owner", owner)
	}
	return pages[api.AttachmentOf](ctx, c, "/attachments", q)
}

// Attach exports a container; created is false if it was attached in the same way.
func (c *Client) Attach(ctx context.Context, in api.CreateAttachment) (v api.AttachmentOf, created bool, err error) {
	status, err := c.call(ctx, "POST", "/attachments", nil, in, &v)
	return v, status == http.StatusCreated, err
}

// Detach takes a container's node away.
func (c *Client) Detach(ctx context.Context, container string, deferred bool) error {
	q := url.Values{}
	if deferred {
		q.Set("deferred", "true")
	}
	_, err := c.call(ctx, "DELETE", "/attachments/"+escape(container), q, nil, nil)
	return err
}

// Pool asks for the pool and its space.
func (c *Client) Pool(ctx context.Context) (p api.Pool, err error) {
	_, err = c.call(ctx, "GET", "/pool", nil, nil, &p)
	return p, err
}

// DF asks what uses the pool's space.
func (c *Client) DF(ctx context.Context) (d layer.DF, err error) {
	_, err = c.call(ctx, "GET", "/pool/df", nil, nil, &d)
	return d, err
}

// GrowPool starts to enlarge the pool.
func (c *Client) GrowPool(ctx context.Context, in api.GrowPool, o OpOptions) (op api.Operation, err error) {
	_, err = c.call(ctx, "POST", "/pool/grow", o.query(), in, &op)
	return op, err
}

// TrimPool starts to give free blocks back to the host.
func (c *Client) TrimPool(ctx context.Context, o OpOptions) (op api.Operation, err error) {
	_, err = c.call(ctx, "POST", "/pool/trim", o.query(), nil, &op)
	return op, err
}

// CheckPool starts to check the pool's metadata.
func (c *Client) CheckPool(ctx context.Context, o OpOptions) (op api.Operation, err error) {
	_, err = c.call(ctx, "POST", "/pool/check", o.query(), nil, &op)
	return op, err
}

// OpOptions say how long work is started.
type OpOptions struct {
	ID   string        // chosen by the client, so that the request can be repeated; may be empty
	Wait time.Duration // for the end, before the answer
}

func (o OpOptions) query() url.Values {
	q := url.Values{}
	if o.ID != "" {
		q.Set("operation", o.ID)
	}
	if o.Wait > 0 {
		q.Set("wait", o.Wait.String())
	}
	return q
}

// Operations lists long work.
func (c *Client) Operations(ctx context.Context) ([]api.Operation, error) {
	return pages[api.Operation](ctx, c, "/operations", nil)
}

// Operation asks for an operation, after its end or wait.
func (c *Client) Operation(ctx context.Context, id string, wait time.Duration) (op api.Operation, err error) {
	q := url.Values{}
	if wait > 0 {
		q.Set("wait", wait.String())
	}
	_, err = c.call(ctx, "GET", "/operations/"+escape(id), q, nil, &op)
	return op, err
}

// CancelOperation cancels an operation and waits for its end, at most wait.
func (c *Client) CancelOperation(ctx context.Context, id string, wait time.Duration) (op api.Operation, err error) {
	_, err = c.call(ctx, "DELETE", "/operations/"+escape(id), url.Values{"wait": {wait.String()}}, nil, &op)
	return op, err
}

// Diff writes what a container changed as a layer tar, whole or with an error.
func (c *Client) Diff(ctx context.Context, container string, w io.Writer, o layer.DiffOptions) (layer.Level, error) {
	q := url.Values{}
	if o.Snapshot != "" {
		q.Set("snapshot", o.Snapshot)
	}
	for k, v := range map[string]bool{"quiesced": o.Quiesced, "crash_ok": o.CrashOK, "trust_guest": o.TrustGuest} {
		if v {
			q.Set(k, strconv.FormatBool(v))
		}
	}
	resp, err := c.send(ctx, "GET", "/containers/"+escape(container)+"/diff", q, "", nil)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	return copyDiff(ctx, w, resp)
}
