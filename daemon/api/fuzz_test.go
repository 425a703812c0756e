package api

import (
	"encoding/json"
	"testing"
	"time"

	"mica/internal/mutate"
)

var textSeeds = [][]byte{[]byte("90s"), []byte("36h"), []byte("7d"), []byte("-2w"), []byte("1.5h"), []byte("15250w"), []byte("15251w"), []byte("d"), nil,
	[]byte(`{"code":"busy","message":"m","details":{"holders":["a"]}}`), []byte(`{"ttl":"7d","labels":{"a":null}}`), []byte(`{"ttl":7}`)}

// FuzzText: any text as a duration, an error and a container's change is refused or reads back.
func FuzzText(f *testing.F) { mutate.Fuzz(f, textSeeds, readText) }

// TestTextMutated is FuzzText for a moment.
func TestTextMutated(t *testing.T) {
	mutate.Test(t, "FuzzText", textSeeds, mutate.Options{Inputs: 5000, MaxBytes: 4 << 10, AllocBase: 1 << 20, AllocPerByte: 200,
		Words: []string{`"ttl":`, `"code":`, `"details":`, "h", "d", "w", "ns", "-", `null`, `{`, `[`}}, readText)
}

func readText(t *testing.T, b []byte) {
	if d, err := ParseDuration(string(b)); err == nil {
		again, err := ParseDuration(d.String())
		if err != nil || again != d {
			t.Errorf("duration %q is %v, which reads back as %v, %v", b, d, again, err)
		}
		text, err := json.Marshal(Duration(d))
		var j Duration
		if err == nil {
			err = json.Unmarshal(text, &j)
		}
		if err != nil || time.Duration(j) != d {
			t.Errorf("duration %v as JSON %s is %v, %v", d, text, j, err)
		}
	}
	var e Error
	if json.Unmarshal(b, &e) == nil {
		if s := e.Status(); s < 400 || s > 599 {
			t.Errorf("error %+v has status %d", e, s)
		}
		_ = e.Error()
		for _, c := range Codes() {
			_ = e.Is(&Error{Code: c})
		}
		if _, err := json.Marshal(&e); err != nil {
			t.Errorf("error %+v: %v", e, err)
		}
	}
	var u UpdateContainer
	if json.Unmarshal(b, &u) == nil {
		if _, err := json.Marshal(u); err != nil {
			t.Errorf("change %+v: %v", u, err)
		}
	}
}
