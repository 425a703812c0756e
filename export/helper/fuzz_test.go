package helper

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"os"
	"sync"
	"testing"

	"mica/internal/mutate"
)

var callSeeds = [][]byte{
	[]byte(`{"id":1,"name":"echo","args":{"a":1}}` + "\n" + `{"id":2,"name":"fail"}` + "\n"),
	[]byte(`{"id":1,"name":"echo","tag":"a tag that is longer than a thread's name may be"}` + "\n" + `{"cancel":1}` + "\n"),
	[]byte(`{"id":3,"name":"typed","args":[]}` + "\n"), []byte(`{"id":3,"name":"typed","args":{"n":7}}` + "\n"), []byte(`{"id":4,"name":"none"}`),
	[]byte("\n"), []byte("[]\n"), []byte("null\n{}\n"), nil, []byte(`{"id":18446744073709551615,"name":"echo","tag":"\u0000"}` + "\n"), bytes.Repeat([]byte("x"), 70<<10),
}

// FuzzCalls gives any bytes to a helper. It ends with an error or at the end of its input, and what
// it answers is a line of JSON for a call that it was given, with an error whose kind is known.
func FuzzCalls(f *testing.F) { mutate.Fuzz(f, callSeeds, answersCalls) }

// TestCallsMutated is FuzzCalls for a moment.
func TestCallsMutated(t *testing.T) {
	mutate.Test(t, "FuzzCalls", callSeeds, mutate.Options{Inputs: 1000, MaxBytes: 72 << 10, Words: []string{`"id":`, `"name":"echo"`, `"args":`, `"cancel":`, `"tag":`, "\n", "{}"}}, answersCalls)
}

var errKnown = errors.New("known")

// answers collects what a helper says; calls may still be under way when Run returns.
type answers struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (a *answers) Write(p []byte) (int, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.b.Write(p)
}

func answersCalls(t *testing.T, b []byte) {
	dir, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	defer os.Chdir(dir)
	out := &answers{}
	given := map[uint64]bool{}
	for line := range bytes.Lines(b) {
		var c call
		if json.Unmarshal(line, &c) == nil {
			given[c.ID] = true
		}
	}
	calls := Calls{
		"echo": func(_ context.Context, args json.RawMessage) (any, error) { return args, nil },
		"fail": func(context.Context, json.RawMessage) (any, error) { return nil, errKnown },
		"typed": Call(func(_ context.Context, a struct{ N int }) (int, error) {
			return a.N, nil
		}),
	}
	known := Errors{"known": errKnown}
	if err := Run(context.Background(), bytes.NewReader(b), out, calls, known); err != nil && len(b) == 0 {
		t.Errorf("at the end of nothing: %v", err)
	}
	out.mu.Lock()
	text := bytes.Clone(out.b.Bytes())
	out.mu.Unlock()
	for line := range bytes.Lines(text) {
		var a answer
		if err := json.Unmarshal(line, &a); err != nil {
			t.Fatalf("answer %q: %v", line, err)
		}
		if !given[a.ID] {
			t.Errorf("answer to call %d, which was not made", a.ID)
		}
		if err := a.err(known); err != nil && len(a.Codes) > 0 && !errors.Is(err, errKnown) {
			t.Errorf("answer %q: error %v of no kind", line, err)
		}
	}
}
