package daemon

import (
	"regexp"
	"strings"
	"testing"
	"time"
)

// TestMetricsPage: figures are in Prometheus's format: every family once, with its type, histograms
// that add up.
func TestMetricsPage(t *testing.T) {
	var c callStats
	c.observe("mica", "Prepare", "OK", 3*time.Millisecond)
	c.observe("mica", "Prepare", "OK", 2*time.Second)
	c.observe("mica", "Commit", "DeadlineExceeded", 6*time.Second)
	var p metricsPage
	callMetrics(&p, c.list())
	p.one("mica_x", "gauge", "Help.", 12345678)
	want := `# HELP mica_containerd_call_seconds How long calls of containerd took, by snapshotter (or diff), method and gRPC code.
# TYPE mica_containerd_call_seconds histogram
mica_containerd_call_seconds_bucket{server="mica",method="Commit",code="DeadlineExceeded",le="0.005"} 0
mica_containerd_call_seconds_bucket{server="mica",method="Commit",code="DeadlineExceeded",le="0.025"} 0
mica_containerd_call_seconds_bucket{server="mica",method="Commit",code="DeadlineExceeded",le="0.1"} 0
mica_containerd_call_seconds_bucket{server="mica",method="Commit",code="DeadlineExceeded",le="0.5"} 0
mica_containerd_call_seconds_bucket{server="mica",method="Commit",code="DeadlineExceeded",le="1"} 0
mica_containerd_call_seconds_bucket{server="mica",method="Commit",code="DeadlineExceeded",le="5"} 0
mica_containerd_call_seconds_bucket{server="mica",method="Commit",code="DeadlineExceeded",le="+Inf"} 1
mica_containerd_call_seconds_sum{server="mica",method="Commit",code="DeadlineExceeded"} 6
mica_containerd_call_seconds_count{server="mica",method="Commit",code="DeadlineExceeded"} 1
mica_containerd_call_seconds_bucket{server="mica",method="Prepare",code="OK",le="0.005"} 1
mica_containerd_call_seconds_bucket{server="mica",method="Prepare",code="OK",le="0.025"} 1
mica_containerd_call_seconds_bucket{server="mica",method="Prepare",code="OK",le="0.1"} 1
mica_containerd_call_seconds_bucket{server="mica",method="Prepare",code="OK",le="0.5"} 1
mica_containerd_call_seconds_bucket{server="mica",method="Prepare",code="OK",le="1"} 1
mica_containerd_call_seconds_bucket{server="mica",method="Prepare",code="OK",le="5"} 2
mica_containerd_call_seconds_bucket{server="mica",method="Prepare",code="OK",le="+Inf"} 2
mica_containerd_call_seconds_sum{server="mica",method="Prepare",code="OK"} 2.003
mica_containerd_call_seconds_count{server="mica",method="Prepare",code="OK"} 2
# HELP mica_x Help.
# TYPE mica_x gauge
mica_x 1.2345678e+07
`
	if p.String() != want {
		t.Errorf("got:\n%swant:\n%s", p.String(), want)
	}
	line := regexp.MustCompile(`^(#.*|[a-z_]+(\{[^}]*\})? [-+0-9.e]+)$`)
	for l := range strings.Lines(p.String()) {
		if !line.MatchString(strings.TrimSuffix(l, "\n")) {
			t.Errorf("line %q", l)
		}
	}
}
