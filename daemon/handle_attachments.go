package daemon

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	"mica/daemon/api"
	"mica/layer"
)

func (s *server) attachmentList(ctx context.Context, owner string) ([]api.AttachmentOf, error) {
	list, err := s.store.Containers(ctx, layer.Filter{Owner: owner})
	if err != nil {
		return nil, err
	}
	out := []api.AttachmentOf{}
	for _, c := range list {
		if c.Attachment != nil {
			out = append(out, api.AttachmentOf{Container: c.Name, Attachment: *c.Attachment})
		}
	}
	return out, nil
}

func (s *server) attachments(q *request) (int, any, error) {
	list, err := s.attachmentList(q.Context(), q.str("owner"))
	if err != nil {
		return 0, nil, err
	}
	return http.StatusOK, pageSorted(list, q, func(a api.AttachmentOf) string { return a.Container }), nil
}

func (s *server) createAttachment(q *request) (int, any, error) {
	b := q.body.(*api.CreateAttachment)
	q.object = b.Container
	as := layer.As(b.As)
	switch as {
	case "":
		as = layer.AsBlock
	case layer.AsBlock, layer.AsNBD:
	default:
		return 0, nil, api.Errorf(api.CodeInvalid, "attach %q: as is %q, want block or nbd", b.Container, b.As)
	}
	if b.TCP && (s.nbdTCP == nil || !s.nbdTCP()) {
		return 0, nil, api.Errorf(api.CodeUnsupported, "attach %q over TCP: the daemon listens on no TCP address: set nbd.listen in its configuration and restart it", b.Container)
	}
	c, err := s.store.Container(q.Context(), b.Container)
	if err != nil {
		return 0, nil, err
	}
	status := http.StatusCreated
	if c.Attachment != nil {
		status = http.StatusOK
	}
	a, err := s.store.Attach(q.Context(), b.Container, layer.AttachOptions{As: as, ReadOnly: b.ReadOnly, TCP: b.TCP, TrustGuest: b.TrustGuest})
	return status, api.AttachmentOf{Container: b.Container, Attachment: a}, err
}

func (s *server) attachment(q *request) (int, any, error) {
	name := q.path("container")
	c, err := s.store.Container(q.Context(), name)
	if err != nil {
		return 0, nil, err
	}
	if c.Attachment == nil {
		return 0, nil, api.Errorf(api.CodeNotFound, "container %q is not attached", name)
	}
	return http.StatusOK, api.AttachmentOf{Container: name, Attachment: *c.Attachment}, nil
}

func (s *server) removeAttachment(q *request) (int, any, error) {
	return http.StatusNoContent, nil, s.store.Detach(q.Context(), q.path("container"), layer.DetachOptions{Deferred: q.flag("deferred")})
}

// shutdown detaches everything and lets the daemon end. Who uses what is looked at first, so
// that a refusal leaves everything as it was. Changes are refused meanwhile.
func (s *server) shutdown(q *request) (int, any, error) {
	timeout := 5 * time.Second
	if t := q.body.(*api.Shutdown).Timeout; t > 0 {
		timeout = min(time.Duration(t), api.MaxWait)
	}
	if !s.closing.CompareAndSwap(false, true) {
		return 0, nil, api.Errorf(api.CodeClosing, "the daemon is shutting down")
	}
	if err := s.detachAll(q.Context(), timeout); err != nil {
		s.closing.Store(false)
		return 0, nil, err
	}
	s.quit()
	return http.StatusNoContent, nil, nil
}

func (s *server) detachAll(ctx context.Context, timeout time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	list, err := s.attachmentList(ctx, "*")
	if err != nil {
		return err
	}
	var holders []string
	deadline := time.Now().Add(usersLeave)
	for _, a := range list {
		if a.Node == "" || strings.Contains(a.Container, "/") { // containerd's are looked at below
			continue
		}
		for _, who := range s.lastingUsers(ctx, a.Node, deadline) {
			holders = append(holders, a.Container+": "+who)
		}
	}
	holders = append(holders, s.snapHolders(ctx, deadline)...)
	if len(holders) > 0 {
		return busyError("nothing was detached", holders)
	}
	detached := 0
	for _, a := range list {
		if strings.Contains(a.Container, "/") {
			continue
		}
		err := s.store.Detach(ctx, a.Container, layer.DetachOptions{})
		switch {
		case err == nil || errors.Is(err, layer.ErrNotFound):
			detached++
		case errors.Is(err, layer.ErrBusy):
			holders = append(holders, fmt.Sprintf("%s: %v", a.Container, err))
		default:
			return fmt.Errorf("detach %q: %w", a.Container, err)
		}
	}
	if s.snaps != nil {
		busy, err := s.snaps.DetachSnaps(ctx)
		if err != nil {
			return err
		}
		holders = append(holders, busy...)
	}
	if len(holders) > 0 {
		return busyError(fmt.Sprintf("%d of %d were detached", detached, len(list)), holders)
	}
	return nil
}

// usersLeave is how long a shutdown waits for users that may be about to leave.
const usersLeave = 2 * time.Second

// lastingUsers names who still uses a node at the deadline. Others have it for moments only: udev
// opens what changes, and a process that starts in a mount namespace of its own, such as any
// helper, has a copy of every mount until it drops it.
func (s *server) lastingUsers(ctx context.Context, node string, deadline time.Time) []string {
	for {
		users := s.busy(node)
		if len(users) == 0 || ctx.Err() != nil || time.Now().After(deadline) {
			return users
		}
		t := time.NewTimer(20 * time.Millisecond)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
		}
	}
}

func busyError(what string, holders []string) error {
	shown := holders
	more := ""
	if len(shown) > 5 {
		more = fmt.Sprintf("; and %d more", len(shown)-5)
		shown = shown[:5]
	}
	e := api.Errorf(api.CodeBusy, "devices are in use, %s: %s%s", what, strings.Join(shown, "; "), more)
	e.Details = map[string]any{"holders": holders}
	return e
}
