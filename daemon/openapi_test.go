package daemon

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"math"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"mica/daemon/api"
)

var update = flag.Bool("update", false, "rewrite docs/openapi.json")

// openPage is a parsed OpenAPI page.
type openPage struct {
	Paths      map[string]map[string]openOperation
	Components struct{ Schemas map[string]map[string]any }
}

type openOperation struct {
	OperationID string
	Responses   map[string]struct {
		Content map[string]struct{ Schema map[string]any }
	}
}

func parsePage(t *testing.T, b []byte) *openPage {
	var p openPage
	if err := json.Unmarshal(b, &p); err != nil {
		t.Fatal(err)
	}
	return &p
}

// checkAnswer fails the test unless the answer is one that the page describes for the route.
func (p *openPage) checkAnswer(t *testing.T, s *server, req *http.Request, resp *http.Response, body []byte) {
	t.Helper()
	_, pattern := s.mux.Handler(req)
	if pattern == "" {
		p.checkSchema(t, "answer without a route", p.Components.Schemas["Error"], body)
		return
	}
	method, path, _ := strings.Cut(pattern, " ")
	op, ok := p.Paths[openPath(path)][strings.ToLower(method)]
	if !ok {
		t.Errorf("%s is not in the page", pattern)
		return
	}
	answer, ok := op.Responses[strconv.Itoa(resp.StatusCode)]
	if !ok {
		t.Errorf("%s answered with status %d, which the page does not list: %s", pattern, resp.StatusCode, body)
		return
	}
	if answer.Content == nil {
		if len(body) > 0 {
			t.Errorf("%s answered with a body, the page says none: %s", pattern, body)
		}
		return
	}
	media, _, _ := strings.Cut(resp.Header.Get("Content-Type"), ";")
	c, ok := answer.Content[media]
	if !ok {
		t.Errorf("%s answered with %q, which the page does not list", pattern, media)
		return
	}
	if media == "application/json" {
		p.checkSchema(t, pattern, c.Schema, body)
	}
	if resp.StatusCode >= 400 {
		var e api.Error
		json.Unmarshal(body, &e)
		if e.Status() != resp.StatusCode {
			t.Errorf("%s: code %s with status %d, want %d", pattern, e.Code, resp.StatusCode, e.Status())
		}
	}
}

func (p *openPage) checkSchema(t *testing.T, what string, s map[string]any, body []byte) {
	t.Helper()
	var v any
	if err := json.Unmarshal(body, &v); err != nil {
		t.Errorf("%s: %v in %q", what, err, body)
		return
	}
	if err := p.validate(s, v, "$"); err != nil {
		t.Errorf("%s: %v\n%s", what, err, body)
	}
}

// validate checks a value against a schema, as far as the page uses schemas. Properties that the
// schema does not list are errors: the page is complete.
func (p *openPage) validate(s map[string]any, v any, at string) error {
	if v == nil && s["nullable"] == true {
		return nil
	}
	if ref, ok := s["$ref"].(string); ok {
		c := p.Components.Schemas[strings.TrimPrefix(ref, "#/components/schemas/")]
		if c == nil {
			return fmt.Errorf("%s: %s is not there", at, ref)
		}
		return p.validate(c, v, at)
	}
	if all, ok := s["allOf"].([]any); ok {
		for _, one := range all {
			if err := p.validate(one.(map[string]any), v, at); err != nil {
				return err
			}
		}
		return nil
	}
	bad := func() error { return fmt.Errorf("%s is %T %.60v, want %v", at, v, v, s["type"]) }
	switch s["type"] {
	case nil:
		return nil
	case "boolean":
		if _, ok := v.(bool); !ok {
			return bad()
		}
	case "integer":
		f, ok := v.(float64)
		if m, min := s["minimum"].(float64); !ok || f != math.Trunc(f) || min && f < m {
			return bad()
		}
	case "string":
		str, ok := v.(string)
		if !ok {
			return bad()
		}
		if enum, ok := s["enum"].([]any); ok && !slices.Contains(enum, any(str)) {
			return fmt.Errorf("%s is %q, want one of %v", at, str, enum)
		}
		switch s["format"] {
		case "date-time":
			if _, err := time.Parse(time.RFC3339Nano, str); err != nil {
				return fmt.Errorf("%s: %v", at, err)
			}
		case "duration":
			if _, err := api.ParseDuration(str); err != nil {
				return fmt.Errorf("%s: %v", at, err)
			}
		}
	case "array":
		list, ok := v.([]any)
		if !ok {
			return bad()
		}
		for i, e := range list {
			if err := p.validate(s["items"].(map[string]any), e, fmt.Sprintf("%s[%d]", at, i)); err != nil {
				return err
			}
		}
	case "object":
		obj, ok := v.(map[string]any)
		if !ok {
			return bad()
		}
		props, _ := s["properties"].(map[string]any)
		more, open := s["additionalProperties"].(map[string]any)
		if req, ok := s["required"].([]any); ok {
			for _, k := range req {
				if _, ok := obj[k.(string)]; !ok {
					return fmt.Errorf("%s has no %s", at, k)
				}
			}
		}
		for k, e := range obj {
			ps, known := props[k].(map[string]any)
			switch {
			case known:
			case open:
				ps = more
			case props == nil:
				continue
			default:
				return fmt.Errorf("%s has %s, which the page does not list", at, k)
			}
			if err := p.validate(ps, e, at+"."+k); err != nil {
				return err
			}
		}
	default:
		return errors.New("no check for " + fmt.Sprint(s["type"]))
	}
	return nil
}

// TestOpenAPIFile: the page in docs is the one that the daemon serves.
func TestOpenAPIFile(t *testing.T) {
	const path = "../docs/openapi.json"
	if *update {
		if err := os.MkdirAll("../docs", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, OpenAPI(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(b, OpenAPI()) {
		t.Errorf("docs/openapi.json is not what the code says (go test ./daemon -run OpenAPIFile -update):\n%s", cmp.Diff(string(b), string(OpenAPI())))
	}
}

// TestOpenAPIComplete: every method of server that takes a request is in the table of routes
// once, and every path of the page reaches the handler that it names.
func TestOpenAPIComplete(t *testing.T) {
	b := newBench(t)
	named := map[string]int{}
	for path, ops := range b.page.Paths {
		for method, op := range ops {
			named[op.OperationID]++
			url := pathParam.ReplaceAllString(path, "x")
			req, _ := http.NewRequest(strings.ToUpper(method), "http://mica"+url, nil)
			_, pattern := b.s.mux.Handler(req)
			if want := strings.ToUpper(method) + " " + path; openPath(pattern) != want {
				t.Errorf("%s %s reaches %q, want %q", method, url, pattern, want)
			}
			for status := range op.Responses {
				if n, err := strconv.Atoi(status); err != nil || http.StatusText(n) == "" {
					t.Errorf("%s %s: status %q", method, path, status)
				}
			}
		}
	}
	for _, name := range handlerMethods(t) {
		if named[name] != 1 {
			t.Errorf("handler %s is in the page %d times, want once", name, named[name])
		}
		delete(named, name)
	}
	for name := range named {
		t.Errorf("the page names %s, which is not a handler", name)
	}
}

// handlerMethods finds the methods func (s *server) x(q *request) (int, any, error) in the source.
func handlerMethods(t *testing.T) []string {
	pkgs, err := parser.ParseDir(token.NewFileSet(), ".", nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, f := range pkgs["daemon"].Files {
		for _, d := range f.Decls {
			fn, ok := d.(*ast.FuncDecl)
			if !ok || fn.Recv == nil || len(fn.Type.Params.List) != 1 || fn.Type.Results == nil || len(fn.Type.Results.List) != 3 {
				continue
			}
			star, ok := fn.Type.Params.List[0].Type.(*ast.StarExpr)
			if !ok {
				continue
			}
			if id, ok := star.X.(*ast.Ident); ok && id.Name == "request" {
				names = append(names, fn.Name.Name)
			}
		}
	}
	if len(names) < 20 {
		t.Fatalf("found only %d handlers in the source", len(names))
	}
	return names
}
