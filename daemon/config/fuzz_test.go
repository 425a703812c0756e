package config

import (
	"reflect"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/pelletier/go-toml/v2"

	"mica/internal/mutate"
)

var textSeeds = [][]byte{
	nil,
	[]byte("[pool]\nsize = \"10G\"\n"),
	[]byte("[limits]\nstall_timeout = \"2w\"\n"),
	[]byte("[auto_extend]\nenabled = true\nthreshold = \"75%\"\n"),
	[]byte("root = \"/srv/mica\"\nrun = '/run/x'\n[nbd]\nlisten = \"127.0.0.1:10809\"\n"),
	[]byte("[nbd]\nlisten = \":1\"\ntls_certificate = \"/c\"\ntls_key = \"/k\"\ntls_client_ca = \"/a\"\ntls_clients = [\"x\", \"y\"]\n"),
	[]byte("[containerd.snapshotters.kata]\nguest_owned = true\nmount_options = [\"noatime\"]\n[images]\nmax_ratio = 5\n"),
	[]byte("[limits]\nmemory = 0x10000000\nevents = 1_000\n[pool]\nno_space_timeout = \"1h30m\"\nlow_water = 5\n"),
	[]byte(Reference()),
}

// FuzzParse: any text is refused, or is a configuration that is valid and reads back as itself.
func FuzzParse(f *testing.F) { mutate.Fuzz(f, textSeeds, parseAny) }

// TestParseMutated is FuzzParse for a moment.
func TestParseMutated(t *testing.T) {
	mutate.Test(t, "FuzzParse", textSeeds, mutate.Options{Inputs: 2500, MaxBytes: 16 << 10, AllocBase: 4 << 20, AllocPerByte: 4000,
		Words: []string{"[", "]", "[[", "\"\"\"", "'''", "= ", "\n", "[pool]\n", "[nbd]\n", "-", "inf", "nan", "1979-05-27", "{a={b=", "[[[[[[[[", "a.b.c.d = 1\n"}}, parseAny)
}

func parseAny(t *testing.T, b []byte) {
	c, err := Parse(b)
	if err != nil {
		return
	}
	if err := c.Validate(); err != nil {
		t.Errorf("accepted, but not valid: %v", err)
	}
	text, err := toml.Marshal(plain(reflect.ValueOf(c)))
	if err != nil {
		t.Fatal(err)
	}
	again, err := Parse(text)
	if err != nil {
		t.Fatalf("what it says does not read back: %v\n%s", err, text)
	}
	if d := cmp.Diff(c, again, cmpopts.EquateEmpty()); d != "" {
		t.Errorf("reads back as another:\n%s", d)
	}
}

// plain is a value of the configuration with what TOML has: durations as text, sizes as numbers.
func plain(v reflect.Value) any {
	switch x := v.Interface().(type) {
	case Duration:
		return time.Duration(x).String()
	case Size:
		return int64(x)
	case Percent:
		return int64(x)
	}
	switch v.Kind() {
	case reflect.Struct:
		m := map[string]any{}
		for i := range v.NumField() {
			m[v.Type().Field(i).Tag.Get("toml")] = plain(v.Field(i))
		}
		return m
	case reflect.Map:
		m := map[string]any{}
		for _, k := range v.MapKeys() {
			m[k.String()] = plain(v.MapIndex(k))
		}
		return m
	case reflect.Slice:
		s := []any{}
		for i := range v.Len() {
			s = append(s, plain(v.Index(i)))
		}
		return s
	}
	return v.Interface()
}

// FuzzValues: any text as a size, a duration and a percentage is refused, or reads back.
func FuzzValues(f *testing.F) { mutate.Fuzz(f, valueSeeds, readValues) }

// TestValuesMutated is FuzzValues for a moment.
func TestValuesMutated(t *testing.T) {
	mutate.Test(t, "FuzzValues", valueSeeds, mutate.Options{Inputs: 5000, MaxBytes: 100, Words: []string{"K", "GiB", "1e9", "-", "d", "w", "h", "%", ".", "0x"}}, readValues)
}

var valueSeeds = [][]byte{[]byte("10G"), []byte("4096"), []byte("1.5T"), []byte("90s"), []byte("36h"), []byte("7d"), []byte("80%"), []byte("-1"), nil, []byte("9223372036854775807"), []byte("8388608T")}

func readValues(t *testing.T, b []byte) {
	var s, s2 Size
	if s.UnmarshalText(b) == nil {
		if err := s2.UnmarshalText([]byte(s.String())); err != nil || s < 0 || s2 != s {
			t.Errorf("size %q is %d, written %q, read %d, %v", b, s, s, s2, err)
		}
	}
	var d, d2 Duration
	if d.UnmarshalText(b) == nil {
		if err := d2.UnmarshalText([]byte(d.String())); err != nil || d < 0 || d2 != d {
			t.Errorf("duration %q is %d, written %q, read %d, %v", b, d, d, d2, err)
		}
	}
	var p, p2 Percent
	if p.UnmarshalText(b) == nil {
		if err := p2.UnmarshalText([]byte(p.String())); err != nil || p < 0 || p > 100 || p2 != p {
			t.Errorf("percentage %q is %d, written %q, read %d, %v", b, p, p, p2, err)
		}
	}
}
