package daemon

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"net/url"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"

	"mica/daemon/api"
)

// maxBody is the longest JSON body in bytes. Archives are bounded by what they unpack to.
const maxBody = 1 << 20

// A request is one call of a route: the HTTP request with its parameters read and checked.
type request struct {
	*http.Request
	w      http.ResponseWriter
	route  *route
	query  url.Values
	body   any    // pointer to a value of the route's body type; nil if there is none
	object string // what the call is about, for errors
}

// readRequest checks a request against its route: no unknown parameter, parameters of the right
// kind, a body of the right form.
func readRequest(w http.ResponseWriter, r *http.Request, rt *route) (*request, error) {
	q := &request{Request: r, w: w, route: rt}
	var err error
	if q.query, err = url.ParseQuery(r.URL.RawQuery); err != nil {
		return nil, api.Errorf(api.CodeInvalid, "query: %v", err)
	}
	for name, values := range q.query {
		i := slices.IndexFunc(rt.query, func(p param) bool { return p.name == name })
		if i < 0 {
			return nil, api.Errorf(api.CodeInvalid, "unknown parameter %q; %s %s takes %s", name, rt.method, rt.path, paramNames(rt.query))
		}
		p := rt.query[i]
		if len(values) > 1 && !p.many {
			return nil, api.Errorf(api.CodeInvalid, "parameter %q is given %d times", name, len(values))
		}
		for _, v := range values {
			if err := p.check(v); err != nil {
				return nil, api.Errorf(api.CodeInvalid, "parameter %q: %v", name, err)
			}
		}
	}
	media := mediaType(r)
	switch {
	case rt.stream != "" && media != "application/json":
		return q, nil
	case rt.body == nil:
		switch n, err := io.ReadFull(r.Body, make([]byte, 1)); {
		case n > 0:
			return nil, api.Errorf(api.CodeInvalid, "%s %s takes no body", rt.method, rt.path)
		case err != io.EOF:
			return nil, api.Errorf(api.CodeInvalid, "body: %v", err)
		}
		return q, nil
	}
	// curl's default for --data is let through: it says nothing about the body.
	if media != "" && media != "application/json" && media != "application/x-www-form-urlencoded" {
		return nil, api.Errorf(api.CodeInvalid, "body of type %s: want application/json", media)
	}
	body := reflect.New(reflect.TypeOf(rt.body)).Interface()
	if err := decode(http.MaxBytesReader(w, r.Body, maxBody), body); err != nil {
		return nil, err
	}
	q.body = body
	return q, nil
}

func mediaType(r *http.Request) string {
	t, _, err := mime.ParseMediaType(r.Header.Get("Content-Type"))
	if err != nil {
		return ""
	}
	return t
}

// decode reads one JSON value: no unknown field, nothing after it. An empty body is the zero
// value.
func decode(r io.Reader, v any) error {
	d := json.NewDecoder(r)
	d.DisallowUnknownFields()
	err := d.Decode(v)
	if err == io.EOF {
		return nil
	}
	if err == nil {
		if _, err = d.Token(); err == io.EOF {
			return nil
		}
		if err == nil {
			err = errors.New("something follows the JSON value")
		}
	}
	var tooLong *http.MaxBytesError
	if errors.As(err, &tooLong) {
		return api.Errorf(api.CodeTooLarge, "body is longer than %d bytes", tooLong.Limit)
	}
	return api.Errorf(api.CodeInvalid, "body: %s", strings.TrimPrefix(err.Error(), "json: "))
}

// A param is one parameter of a query.
type param struct {
	name string
	kind string // "string", "boolean", "integer", "duration"
	many bool
	doc  string
}

func (p param) check(v string) error {
	var err error
	switch p.kind {
	case "boolean":
		_, err = parseBool(v)
	case "integer":
		if _, err = strconv.ParseUint(v, 10, 63); err != nil {
			err = fmt.Errorf("%q is not a whole number from 0", v)
		}
	case "duration":
		var d time.Duration
		if d, err = api.ParseDuration(v); err == nil && d < 0 {
			err = fmt.Errorf("duration %q is negative", v)
		}
	}
	return err
}

// parseBool reads true and false, and takes "?deferred" for true.
func parseBool(v string) (bool, error) {
	switch v {
	case "", "1", "true":
		return true, nil
	case "0", "false":
		return false, nil
	}
	return false, fmt.Errorf("%q is neither true nor false", v)
}

func paramNames(list []param) string {
	if len(list) == 0 {
		return "none"
	}
	names := make([]string, len(list))
	for i, p := range list {
		names[i] = p.name
	}
	return strings.Join(names, ", ")
}

// The readers below are for parameters that readRequest has checked.

func (q *request) str(name string) string { return q.query.Get(name) }

func (q *request) flag(name string) bool {
	if !q.query.Has(name) {
		return false
	}
	b, _ := parseBool(q.query.Get(name))
	return b
}

func (q *request) number(name string) uint64 {
	n, _ := strconv.ParseUint(q.query.Get(name), 10, 63)
	return n
}

func (q *request) duration(name string) time.Duration {
	if !q.query.Has(name) {
		return 0
	}
	d, _ := api.ParseDuration(q.query.Get(name))
	return min(d, api.MaxWait)
}

// labels reads label=K=V parameters. With exists, label=K alone asks for the label whatever it
// holds.
func (q *request) labels(exists bool) (map[string]string, error) {
	var m map[string]string
	for _, l := range q.query["label"] {
		k, v, ok := strings.Cut(l, "=")
		if k == "" || !ok && !exists {
			return nil, api.Errorf(api.CodeInvalid, "label %q: want KEY=VALUE", l)
		}
		if m == nil {
			m = map[string]string{}
		}
		m[k] = v
	}
	return m, nil
}

// path returns a part of the path and remembers it as the object of the call.
func (q *request) path(name string) string {
	v := q.PathValue(name)
	q.object = v
	return v
}
