package daemon

import (
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"mica/daemon/api"
)

func (s *server) operationList(q *request) (int, any, error) {
	list := s.ops.list()
	if want := api.OperationState(q.str("state")); want != "" {
		if !slices.Contains([]api.OperationState{api.OperationRunning, api.OperationDone, api.OperationFailed, api.OperationCancelled}, want) {
			return 0, nil, api.Errorf(api.CodeInvalid, "state %q: want running, done, failed or cancelled", want)
		}
		list = slices.DeleteFunc(list, func(v api.Operation) bool { return v.State != want })
	}
	// By start, so the cursor is the start and the id.
	key := func(v api.Operation) string { return fmt.Sprintf("%020d-%s", v.Start.UnixNano(), v.ID) }
	return http.StatusOK, pageSorted(list, q, key), nil
}

func (s *server) operation(q *request) (int, any, error) {
	op, err := s.ops.get(q.path("id"))
	if err != nil {
		return 0, nil, err
	}
	op.wait(q.Context(), q.duration("wait"))
	return http.StatusOK, op.view(), nil
}

func (s *server) cancelOperation(q *request) (int, any, error) {
	op, err := s.ops.get(q.path("id"))
	if err != nil {
		return 0, nil, err
	}
	s.ops.cancelOrForget(op)
	op.wait(q.Context(), q.duration("wait"))
	return http.StatusOK, op.view(), nil
}

// eventBeat is how often a stream of server-sent events shows that it is alive.
const eventBeat = 15 * time.Second

// events streams until the client goes away or the daemon ends.
func (s *server) events(q *request) (int, any, error) {
	follow := !q.query.Has("follow") || q.flag("follow")
	after, named := q.number("after"), q.query.Has("after")
	if id := q.Header.Get("Last-Event-ID"); !named && id != "" {
		n, err := strconv.ParseUint(id, 10, 63)
		if err != nil {
			return 0, nil, api.Errorf(api.CodeInvalid, "Last-Event-ID %q is not an event id", id)
		}
		after, named = n, true
	}
	if !named && follow {
		after = s.hub.lastID()
	}
	kinds, prefix := q.query["kind"], q.str("object")
	wanted := func(e api.Event) bool {
		return e.Kind == api.EventLost ||
			(len(kinds) == 0 || slices.Contains(kinds, e.Kind)) && strings.HasPrefix(e.Object, prefix)
	}
	sse := strings.Contains(q.Header.Get("Accept"), api.MediaEventStream)
	media := api.MediaJSONLines
	if sse {
		media = api.MediaEventStream
	}
	q.w.Header().Set("Content-Type", media)
	q.w.Header().Set("Cache-Control", "no-store")
	q.w.WriteHeader(http.StatusOK)
	flush := http.NewResponseController(q.w)
	flush.Flush()
	send := func(e api.Event) error {
		if !wanted(e) {
			return nil
		}
		// A client that takes nothing is let go; it can come back and go on after what it has seen.
		defer s.boundWrite(q.w)()
		b, err := json.Marshal(e)
		if err != nil {
			return err
		}
		if sse {
			_, err = fmt.Fprintf(q.w, "id: %d\nevent: %s\ndata: %s\n\n", e.ID, e.Kind, b)
		} else {
			_, err = fmt.Fprintf(q.w, "%s\n", b)
		}
		if err != nil {
			return err
		}
		return flush.Flush()
	}
	if !follow {
		events, _, _ := s.hub.after(after)
		for _, e := range events {
			if send(e) != nil {
				break
			}
		}
		return 0, nil, errAnswered
	}
	var idle func() error
	if sse {
		idle = func() error {
			defer s.boundWrite(q.w)()
			if _, err := fmt.Fprint(q.w, ": alive\n\n"); err != nil {
				return err
			}
			return flush.Flush()
		}
	}
	s.hub.follow(q.Context(), after, eventBeat, send, idle)
	return 0, nil, errAnswered
}
