package daemon

import (
	"encoding/json"
	"fmt"
	"reflect"
	"strings"
	"time"

	"mica/daemon/api"
	"mica/layer"
)

// A schema is a JSON schema as OpenAPI 3.0 has them.
type schema map[string]any

// schemas turns Go types into schemas, by the rules of encoding/json. Structs become named
// components.
type schemas struct {
	components map[string]schema
	types      map[string]reflect.Type // what a component was made from
}

// enums lists the values of types that are enumerations.
var enums = map[reflect.Type][]string{
	reflect.TypeFor[layer.Level]():        {string(layer.LevelFileSystem), string(layer.LevelCrash), string(layer.LevelCaller)},
	reflect.TypeFor[layer.As]():           {string(layer.AsBlock), string(layer.AsNBD)},
	reflect.TypeFor[api.OperationState](): {string(api.OperationRunning), string(api.OperationDone), string(api.OperationFailed), string(api.OperationCancelled)},
	reflect.TypeFor[api.Code]():           codeNames(),
}

func codeNames() []string {
	var names []string
	for _, c := range api.Codes() {
		names = append(names, string(c))
	}
	sortStrings(names)
	return names
}

func newSchemas() *schemas {
	return &schemas{components: map[string]schema{}, types: map[string]reflect.Type{}}
}

// of returns the schema of a type; for structs a reference to a component. Objects that closed
// says so have no other properties: the server refuses them.
func (s *schemas) of(t reflect.Type, closed bool) schema {
	switch t {
	case reflect.TypeFor[time.Time]():
		return schema{"type": "string", "format": "date-time"}
	case reflect.TypeFor[json.RawMessage](), reflect.TypeFor[any]():
		return schema{}
	case reflect.TypeFor[api.Duration]():
		return schema{"type": "string", "format": "duration", "example": "36h"}
	}
	if values := enums[t]; values != nil {
		return schema{"type": "string", "enum": values}
	}
	switch t.Kind() {
	case reflect.Bool:
		return schema{"type": "boolean"}
	case reflect.String:
		return schema{"type": "string"}
	case reflect.Int, reflect.Int64:
		return schema{"type": "integer", "format": "int64"}
	case reflect.Uint, reflect.Uint64, reflect.Uint32:
		return schema{"type": "integer", "format": "int64", "minimum": 0}
	case reflect.Pointer:
		return s.of(t.Elem(), closed)
	case reflect.Slice:
		return schema{"type": "array", "items": s.of(t.Elem(), closed)}
	case reflect.Map:
		return schema{"type": "object", "additionalProperties": s.nullable(t.Elem(), closed)}
	case reflect.Struct:
		return s.component(t, closed)
	}
	panic(fmt.Sprintf("no schema for %v", t))
}

// nullable is of, for a place where a nil pointer, slice or map is written as null.
func (s *schemas) nullable(t reflect.Type, closed bool) schema {
	v := s.of(t, closed)
	switch t.Kind() {
	case reflect.Pointer, reflect.Slice, reflect.Map:
		if t == reflect.TypeFor[json.RawMessage]() {
			return v
		}
		if v["$ref"] != nil {
			return schema{"nullable": true, "allOf": []schema{v}}
		}
		v["nullable"] = true
	}
	return v
}

// component makes a struct's component, once, and returns a reference to it.
func (s *schemas) component(t reflect.Type, closed bool) schema {
	name := componentName(t)
	ref := schema{"$ref": "#/components/schemas/" + name}
	if old := s.types[name]; old != nil {
		if old != t {
			panic(fmt.Sprintf("two types are called %s: %v and %v", name, old, t))
		}
		return ref
	}
	s.types[name] = t
	properties, required := map[string]schema{}, []string{}
	for _, f := range jsonFields(t) {
		if f.optional {
			properties[f.name] = s.of(f.typ, closed)
		} else {
			properties[f.name] = s.nullable(f.typ, closed)
			required = append(required, f.name)
		}
	}
	c := schema{"type": "object", "properties": properties}
	if len(required) > 0 {
		sortStrings(required)
		c["required"] = required
	}
	if closed {
		c["additionalProperties"] = false
	}
	s.components[name] = c
	return ref
}

// componentName is the type's name; a list of images is called ImageList.
func componentName(t reflect.Type) string {
	name, arg, generic := strings.Cut(t.Name(), "[")
	if !generic {
		return name
	}
	arg = strings.TrimSuffix(arg, "]")
	return arg[strings.LastIndexByte(arg, '.')+1:] + name
}

type jsonField struct {
	name     string
	typ      reflect.Type
	optional bool
	depth    int
}

// jsonFields are the fields that encoding/json sees: those of embedded structs too, and of two
// with the same name the one that lies less deep.
func jsonFields(t reflect.Type) []jsonField {
	var out []jsonField
	index := map[string]int{}
	var walk func(t reflect.Type, depth int)
	walk = func(t reflect.Type, depth int) {
		for i := range t.NumField() {
			f := t.Field(i)
			name, options, _ := strings.Cut(f.Tag.Get("json"), ",")
			switch {
			case f.Anonymous && name == "":
				walk(f.Type, depth+1)
				continue
			case !f.IsExported() || name == "-":
				continue
			case name == "":
				name = f.Name
			}
			v := jsonField{name, f.Type, strings.Contains(options, "omitempty"), depth}
			if at, ok := index[name]; !ok {
				index[name] = len(out)
				out = append(out, v)
			} else if out[at].depth > depth {
				out[at] = v
			}
		}
	}
	walk(t, 0)
	return out
}
