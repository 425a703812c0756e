package mutate

import (
	"bytes"
	"math/rand/v2"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"
)

// TestFinds: what a property does wrong fails the test, with the seed and the input. Each case
// runs in a process of its own, because it fails.
func TestFinds(t *testing.T) {
	for name, want := range map[string]string{
		"panic": "index out of range", "hang": "not over after", "alloc": "bytes allocated for an input",
		"fatal": "a fatal property", "change": "the input was changed", "": "",
	} {
		t.Run("child "+name, func(t *testing.T) {
			c := exec.Command(os.Args[0], "-test.run=^TestChild$", "-test.v")
			c.Env = append(os.Environ(), "MUTATE_CHILD=x"+name)
			out, err := c.CombinedOutput()
			if want == "" {
				if err != nil || !strings.Contains(string(out), "PASS") {
					t.Fatalf("a property that holds: %v\n%s", err, out)
				}
				return
			}
			if err == nil || !strings.Contains(string(out), want) || !strings.Contains(string(out), "MICA_MUTATE_SEED=") {
				t.Errorf("%v, want %q and the seed\n%s", err, want, out)
			}
		})
	}
}

var sink []byte

func TestChild(t *testing.T) {
	kind, ok := strings.CutPrefix(os.Getenv("MUTATE_CHILD"), "x")
	if !ok {
		t.Skip("is run by TestFinds")
	}
	o := Options{AllocBase: 1 << 20, AllocPerByte: 10, Limit: 200 * time.Millisecond, Words: []string{"magic"}}
	Test(t, "FuzzNothing", [][]byte{[]byte("seed one"), []byte("another seed")}, o, func(t *testing.T, b []byte) {
		if !bytes.Contains(b, []byte("magic")) {
			return
		}
		switch kind {
		case "panic":
			_ = b[len(b)]
		case "hang":
			select {}
		case "alloc":
			sink = make([]byte, 2<<20)
		case "fatal":
			t.Fatal("a fatal property")
		case "change":
			b[0]++
		}
	})
}

// TestMutations: they differ, reach every kind of change, keep to the length, and do not touch
// what they are made from.
func TestMutations(t *testing.T) {
	seeds := [][]byte{[]byte("0123456789abcdef"), nil, bytes.Repeat([]byte("x"), 100)}
	kept := [][]byte{bytes.Clone(seeds[0]), nil, bytes.Clone(seeds[2])}
	r := rand.New(rand.NewPCG(1, 1))
	seen := map[string]bool{}
	for i := range 3000 {
		b := Mutate(r, seeds[i%3], seeds, Options{MaxBytes: 200, Words: []string{"word"}})
		if len(b) > 200 {
			t.Fatalf("%d bytes", len(b))
		}
		seen[string(b)] = true
	}
	if len(seen) < 2000 {
		t.Errorf("%d different inputs of 3000", len(seen))
	}
	for i := range seeds {
		if !bytes.Equal(seeds[i], kept[i]) {
			t.Errorf("seed %d was changed to %q", i, seeds[i])
		}
	}
	again := rand.New(rand.NewPCG(7, 1))
	once := rand.New(rand.NewPCG(7, 1))
	for range 100 {
		if !bytes.Equal(Mutate(again, seeds[0], seeds, Options{MaxBytes: 99}), Mutate(once, seeds[0], seeds, Options{MaxBytes: 99})) {
			t.Fatal("one seed, two results")
		}
	}
}

// TestCorpus: what the fuzzer kept is read back.
func TestCorpus(t *testing.T) {
	t.Chdir(t.TempDir())
	if err := os.MkdirAll("testdata/fuzz/FuzzX", 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile("testdata/fuzz/FuzzX/a", []byte("go test fuzz v1\n[]byte(\"a\\x00\\\"b\")\nint(3)\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	got := corpus(t, "FuzzX")
	if len(got) != 1 || string(got[0]) != "a\x00\"b" {
		t.Errorf("got %q", got)
	}
}
