package bench

import (
	"encoding/json"
	"os"
	"path/filepath"
	"testing"
)

// TestPage: docs/performance.md and its drawings are what results.json and findings.md make
// (mica bench --report docs/performance/results.json --out docs).
func TestPage(t *testing.T) {
	const docs = "../docs"
	b, err := os.ReadFile(filepath.Join(docs, partsDir, resultsFile))
	if err != nil {
		t.Fatal(err)
	}
	var res Result
	if err := json.Unmarshal(b, &res); err != nil {
		t.Fatal(err)
	}
	if res.Quick {
		t.Error("the page shows a quick run")
	}
	findings, err := os.ReadFile(filepath.Join(docs, partsDir, findingsFile))
	if err != nil {
		t.Fatal(err)
	}
	files := Report(&res, string(findings))
	for name, want := range files {
		got, err := os.ReadFile(filepath.Join(docs, name))
		if err != nil || string(got) != string(want) {
			t.Errorf("docs/%s is not what results.json makes (%v)", name, err)
		}
	}
	drawings, err := filepath.Glob(filepath.Join(docs, partsDir, "*.svg"))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range drawings {
		if files[filepath.Join(partsDir, filepath.Base(f))] == nil {
			t.Errorf("%s belongs to no table", f)
		}
	}
}
