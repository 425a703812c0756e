package fio

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"
)

func TestParse(t *testing.T) {
	const out = `fio: a warning
{"jobs":[
 {"error":0,"read":{"iops":10.5,"bw_bytes":43008,"total_ios":21,"runtime":2000,
   "clat_ns":{"percentile":{"50.000000":1000,"99.000000":5000}}},
  "write":{"iops":0,"total_ios":0},"sync":{"lat_ns":{}}},
 {"error":0,"read":{"total_ios":0},
  "write":{"iops":7,"bw_bytes":28672,"total_ios":14,"runtime":2000,"clat_ns":{"percentile":{"99.000000":9000}}},
  "sync":{"lat_ns":{"percentile":{"50.000000":70,"99.000000":90}}}}]}`
	got, err := parse([]byte(out), 2)
	if err != nil {
		t.Fatal(err)
	}
	want := []Figures{
		{IOPS: 10.5, BytesPerSec: 43008, Requests: 21, Seconds: 2, P50: 1000, P99: 5000},
		{IOPS: 7, BytesPerSec: 28672, Requests: 14, Seconds: 2, P99: 9000, SyncP50: 70, SyncP99: 90},
	}
	for i := range want {
		if got[i] != want[i] {
			t.Errorf("job %d: %+v, want %+v", i, got[i], want[i])
		}
	}
	for name, bad := range map[string]string{
		"no JSON":        "fio: no such file",
		"too few jobs":   `{"jobs":[]}`,
		"failed job":     `{"jobs":[{"error":5,"read":{"total_ios":1}},{"read":{"total_ios":1}}]}`,
		"no request":     `{"jobs":[{"read":{}},{"read":{"total_ios":1}}]}`,
		"cut off":        `{"jobs":[`,
		"nothing at all": "",
	} {
		if _, err := parse([]byte(bad), 2); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

// TestRun lets the real fio write a file with two jobs at once.
func TestRun(t *testing.T) {
	if _, err := exec.LookPath("fio"); err != nil {
		t.Skip("SKIPPED: needs fio")
	}
	file := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(file, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	j := Job{Engine: "psync", Target: file, RW: "randwrite", Block: 4096, Size: 512 << 10, Count: 64, Fsync: 4}
	k := j
	k.Offset, k.RW, k.Fsync, k.Count, k.Runtime = 512<<10, "randread", 0, 0, 50*time.Millisecond
	f, err := Run(context.Background(), j, k)
	if err != nil {
		t.Fatal(err)
	}
	if f[0].Requests != 64 || f[0].SyncP99 == 0 || f[0].IOPS == 0 {
		t.Errorf("writes: %+v, want 64 requests and times of fsync", f[0])
	}
	if f[1].Requests == 0 || f[1].P99 == 0 || f[1].SyncP99 != 0 {
		t.Errorf("reads: %+v", f[1])
	}
	if _, err := Run(context.Background(), Job{Engine: "psync", Target: file + "x", RW: "read", Block: 4096, Size: 4096}); err == nil {
		t.Error("a job on a file that is not there: no error")
	}
}
