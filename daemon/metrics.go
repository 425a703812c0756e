package daemon

import (
	"bytes"
	"cmp"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"mica/daemon/api"
)

// metricsMedia is Prometheus's text format.
const metricsMedia = "text/plain; version=0.0.4; charset=utf-8"

// callBuckets are upper bounds of how long calls take, in seconds. containerd holds locks meanwhile;
// five seconds is where a call is given up.
var callBuckets = []float64{0.005, 0.025, 0.1, 0.5, 1, 5}

// callStats count the calls of containerd.
type callStats struct {
	mu sync.Mutex
	m  map[[3]string]*callStat // guarded by mu
}

// A callStat is one kind of call with one outcome.
type callStat struct {
	server, method, code string
	count                uint64
	seconds              float64
	buckets              []uint64 // calls that took no longer than callBuckets, not summed up
}

func (c *callStats) observe(server, method, code string, took time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.m == nil {
		c.m = map[[3]string]*callStat{}
	}
	key := [3]string{server, method, code}
	s := c.m[key]
	if s == nil {
		s = &callStat{server: server, method: method, code: code, buckets: make([]uint64, len(callBuckets))}
		c.m[key] = s
	}
	s.count++
	s.seconds += took.Seconds()
	if i, _ := slices.BinarySearch(callBuckets, took.Seconds()); i < len(callBuckets) {
		s.buckets[i]++
	}
}

// list returns the figures as of now.
func (c *callStats) list() []callStat {
	c.mu.Lock()
	defer c.mu.Unlock()
	out := make([]callStat, 0, len(c.m))
	for _, s := range c.m {
		v := *s
		v.buckets = slices.Clone(s.buckets)
		out = append(out, v)
	}
	slices.SortFunc(out, func(a, b callStat) int {
		return cmp.Or(strings.Compare(a.server, b.server), strings.Compare(a.method, b.method), strings.Compare(a.code, b.code))
	})
	return out
}

// A metricsPage is written family by family.
type metricsPage struct{ bytes.Buffer }

// family begins a metric.
func (p *metricsPage) family(name, kind, help string) {
	fmt.Fprintf(p, "# HELP %s %s\n# TYPE %s %s\n", name, help, name, kind)
}

// sample writes one value; labels are name and value in turn.
func (p *metricsPage) sample(name string, v float64, labels ...string) {
	p.WriteString(name)
	for i := 0; i+1 < len(labels); i += 2 {
		p.WriteByte("{,"[min(i, 1)])
		fmt.Fprintf(p, "%s=%q", labels[i], labels[i+1])
	}
	if len(labels) > 0 {
		p.WriteByte('}')
	}
	p.WriteString(" " + strconv.FormatFloat(v, 'g', -1, 64) + "\n")
}

func (p *metricsPage) one(name, kind, help string, v float64) {
	p.family(name, kind, help)
	p.sample(name, v)
}

func (s *server) metrics(q *request) (int, any, error) {
	pool, err := s.poolNow(q.Context())
	if err != nil {
		return 0, nil, err
	}
	st, err := s.store.Status(q.Context())
	if err != nil {
		return 0, nil, err
	}
	var p metricsPage
	poolMetrics(&p, pool)
	processMetrics(&p)
	for _, v := range []struct {
		name, help string
		n          int
	}{
		{"mica_images", "Images of the store.", st.Images},
		{"mica_layers", "Layers of images.", st.Layers},
		{"mica_containers", "Containers made by mica's own commands.", st.Containers},
		{"mica_snapshots", "Snapshots of containers.", st.Snapshots},
		{"mica_containerd_snapshots", "Snapshots of containerd's snapshotters.", st.Snaps},
		{"mica_attached", "Devices that are attached.", st.Attached},
		{"mica_broken", "Objects whose device is missing.", len(st.Broken)},
	} {
		p.one(v.name, "gauge", v.help, float64(v.n))
	}
	p.family("mica_queue", "gauge", "Work of the background queue, by kind.")
	kinds := map[string]int{"delete": 0, "detach": 0, "expire": 0}
	for _, item := range st.Queue {
		kinds[item.Kind]++
	}
	for _, k := range []string{"delete", "detach", "expire"} {
		p.sample("mica_queue", float64(kinds[k]), "kind", k)
	}
	p.one("mica_operations_running", "gauge", "Long operations under way.", float64(s.ops.running()))
	if s.calls != nil {
		callMetrics(&p, s.calls())
	}
	q.w.Header().Set("Content-Type", metricsMedia)
	q.w.Write(p.Bytes())
	return 0, nil, errAnswered
}

func poolMetrics(p *metricsPage, pool api.Pool) {
	for _, v := range []struct {
		name, kind, help string
		n                float64
	}{
		{"mica_pool_data_bytes", "gauge", "Data space of the pool.", float64(pool.DataSpaceBytes)},
		{"mica_pool_data_used_bytes", "gauge", "Data space that is used.", float64(pool.DataUsedBytes)},
		{"mica_pool_metadata_bytes", "gauge", "Metadata space of the pool.", float64(pool.MetadataSpaceBytes)},
		{"mica_pool_metadata_used_bytes", "gauge", "Metadata space that is used.", float64(pool.MetadataUsedBytes)},
		{"mica_pool_host_free_bytes", "gauge", "What the host's file system under the data file can still take, -1 for a device.", float64(pool.HostFreeBytes)},
		{"mica_pool_writers_waiting", "gauge", "Writes that wait for space.", float64(pool.WaitingForSpace)},
		{"mica_pool_commits_total", "counter", "Commits since the daemon was started.", float64(pool.Commits)},
		{"mica_pool_data_flushes_total", "counter", "Flushes of the data device.", float64(pool.DataFlushes)},
		{"mica_pool_metadata_flushes_total", "counter", "Flushes of the metadata device.", float64(pool.MetaFlushes)},
	} {
		p.one(v.name, v.kind, v.help, v.n)
	}
	p.family("mica_pool_mode", "gauge", "1 for the mode that the pool is in.")
	for _, mode := range []string{"rw", "out_of_data_space", "ro", "Fail"} {
		on := 0.0
		if pool.Mode == mode {
			on = 1
		}
		p.sample("mica_pool_mode", on, "mode", mode)
	}
	check := 0.0
	if pool.NeedsCheck {
		check = 1
	}
	p.one("mica_pool_needs_check", "gauge", "1: the pool must be checked.", check)
}

// processMetrics are the daemon's own figures, under the names that Prometheus's clients use for
// them.
func processMetrics(p *metricsPage) {
	p.one("go_goroutines", "gauge", "Goroutines of the daemon.", float64(runtime.NumGoroutine()))
	if n, err := countEntries("/proc/self/fd"); err == nil {
		p.one("process_open_fds", "gauge", "Open file descriptors of the daemon.", float64(n))
	}
	if n, err := countEntries("/proc/self/task"); err == nil {
		p.one("process_threads", "gauge", "Threads of the daemon.", float64(n))
	}
	p.one("mica_memory_bytes", "gauge", "Anonymous resident memory of the daemon.", float64(anonymousMemory()))
}

func countEntries(dir string) (int, error) {
	list, err := os.ReadDir(dir)
	return len(list), err
}

func callMetrics(p *metricsPage, calls []callStat) {
	const name = "mica_containerd_call_seconds"
	p.family(name, "histogram", "How long calls of containerd took, by snapshotter (or diff), method and gRPC code.")
	for _, c := range calls {
		labels := []string{"server", c.server, "method", c.method, "code", c.code}
		sum := uint64(0)
		for i, b := range callBuckets {
			sum += c.buckets[i]
			p.sample(name+"_bucket", float64(sum), append(slices.Clone(labels), "le", strconv.FormatFloat(b, 'g', -1, 64))...)
		}
		p.sample(name+"_bucket", float64(c.count), append(slices.Clone(labels), "le", "+Inf")...)
		p.sample(name+"_sum", c.seconds, labels...)
		p.sample(name+"_count", float64(c.count), labels...)
	}
}
