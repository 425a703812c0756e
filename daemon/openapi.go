package daemon

import (
	"encoding/json"
	"fmt"
	"reflect"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"

	"mica/daemon/api"
)

func sortStrings(s []string) { slices.Sort(s) }

// OpenAPI is the description of the API, as GET /v1/openapi.json answers it and docs/openapi.json
// holds it.
func OpenAPI() []byte { return openAPIPage(routes()) }

func openAPIPage(list []route) []byte {
	s := newSchemas()
	errRef := s.of(reflect.TypeFor[api.Error](), false)
	s.of(reflect.TypeFor[api.Event](), false)
	paths := map[string]map[string]any{}
	for i := range list {
		rt := &list[i]
		p := openPath(rt.path)
		if paths[p] == nil {
			paths[p] = map[string]any{}
		}
		paths[p][strings.ToLower(rt.method)] = operationOf(rt, s, errRef)
	}
	doc := map[string]any{
		"openapi": "3.0.3",
		"info": map[string]any{
			"title":   "mica",
			"version": "1",
			"description": "The API of mica's daemon, over the Unix socket RUN/" + api.SocketName + ". Sizes are bytes. " +
				"Bodies are JSON; unknown fields and parameters are refused. Every error is an Error.",
		},
		"servers":    []any{map[string]any{"url": "http://mica", "description": "any host name will do: the connection is a Unix socket"}},
		"paths":      paths,
		"components": map[string]any{"schemas": s.components},
	}
	b, err := json.MarshalIndent(doc, "", "  ")
	if err != nil {
		panic(err)
	}
	return append(b, '\n')
}

func openPath(path string) string { return strings.ReplaceAll(path, "...}", "}") }

var pathParam = regexp.MustCompile(`\{(\w+)(\.\.\.)?\}`)

func operationOf(rt *route, s *schemas, errRef schema) map[string]any {
	tag := strings.Split(strings.TrimPrefix(rt.path, api.Version+"/"), "/")[0]
	op := map[string]any{"operationId": routeName(rt), "summary": rt.summary, "tags": []string{strings.TrimSuffix(tag, ".json")}}
	if rt.doc != "" {
		op["description"] = rt.doc
	}
	var ps []any
	for _, m := range pathParam.FindAllStringSubmatch(rt.path, -1) {
		p := map[string]any{"name": m[1], "in": "path", "required": true, "schema": schema{"type": "string"}}
		if m[2] != "" {
			p["description"] = "slashes need not be escaped"
		}
		ps = append(ps, p)
	}
	for _, p := range rt.query {
		sc := schema{"type": p.kind}
		switch p.kind {
		case "duration":
			sc = schema{"type": "string", "format": "duration"}
		case "integer":
			sc["minimum"] = 0
			sc["format"] = "int64"
		}
		v := map[string]any{"name": p.name, "in": "query", "description": p.doc, "schema": sc}
		if p.many {
			v["schema"] = schema{"type": "array", "items": sc}
			v["explode"] = true
		}
		ps = append(ps, v)
	}
	if ps != nil {
		op["parameters"] = ps
	}
	content := map[string]any{}
	if rt.body != nil {
		content["application/json"] = map[string]any{"schema": s.of(reflect.TypeOf(rt.body), true)}
	}
	if rt.stream != "" {
		content[rt.stream] = map[string]any{"schema": schema{"type": "string", "format": "binary"}}
	}
	if len(content) > 0 {
		op["requestBody"] = map[string]any{"content": content}
	}
	replies := map[string]any{}
	for status, body := range rt.replies {
		replies[strconv.Itoa(status)] = replyOf(s, body)
	}
	for status, codes := range errorReplies(rt) {
		replies[strconv.Itoa(status)] = map[string]any{
			"description": "Error with code " + strings.Join(codes, " or "),
			"content":     map[string]any{"application/json": map[string]any{"schema": errRef}},
		}
	}
	op["responses"] = replies
	return op
}

func replyOf(s *schemas, body any) map[string]any {
	switch b := body.(type) {
	case nil:
		return map[string]any{"description": "Done"}
	case streamed:
		sc := schema{"type": "string"}
		if b.media == "application/json" {
			sc = schema{"type": "object"}
		}
		return map[string]any{"description": b.doc, "content": map[string]any{b.media: map[string]any{"schema": sc}}}
	}
	t := reflect.TypeOf(body)
	return map[string]any{
		"description": componentName(t),
		"content":     map[string]any{"application/json": map[string]any{"schema": s.of(t, false)}},
	}
}

// errorReplies are the codes a route can answer with, by status.
func errorReplies(rt *route) map[int][]string {
	codes := append([]api.Code{api.CodeInvalid, api.CodeInternal, api.CodeClosing}, rt.codes...)
	if rt.body != nil {
		codes = append(codes, api.CodeTooLarge)
	}
	by := map[int][]string{}
	for _, c := range codes {
		st := (&api.Error{Code: c}).Status()
		if !slices.Contains(by[st], string(c)) {
			by[st] = append(by[st], string(c))
		}
	}
	for _, list := range by {
		slices.Sort(list)
	}
	return by
}

// routeName is the name of the method that serves the route.
func routeName(rt *route) string {
	full := runtime.FuncForPC(reflect.ValueOf(rt.handle).Pointer()).Name()
	name := full[strings.LastIndexByte(full, '.')+1:]
	if name == "" {
		panic(fmt.Sprintf("%s %s has no handler name", rt.method, rt.path))
	}
	return strings.TrimSuffix(name, "-fm")
}
