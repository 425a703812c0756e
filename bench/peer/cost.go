package peer

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"
)

// A Cost is what a process has used since it began. Unlike times it hardly depends on what
// else a machine does.
type Cost struct {
	CPU      time.Duration // user and system
	Switches int64         // of context, of all threads that live
	Threads  int
	RSS      int64 // resident bytes
	Anon     int64 // of them anonymous memory
}

// clockTick is the kernel's unit of times in /proc, fixed to 1/100 s for programs.
const clockTick = 10 * time.Millisecond

// CostOf reads what a process has used; zero for pid 0.
func CostOf(pid int) (c Cost, err error) {
	if pid == 0 {
		return c, nil
	}
	dir := "/proc/" + strconv.Itoa(pid)
	b, err := os.ReadFile(dir + "/stat")
	if err != nil {
		return c, err
	}
	f := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
	if len(f) < 13 {
		return c, fmt.Errorf("%s/stat: %d fields", dir, len(f))
	}
	user, _ := strconv.ParseInt(f[11], 10, 64)
	system, _ := strconv.ParseInt(f[12], 10, 64)
	c.CPU = time.Duration(user+system) * clockTick
	tasks, err := os.ReadDir(dir + "/task")
	if err != nil {
		return c, err
	}
	c.Threads = len(tasks)
	for _, t := range tasks {
		s := statusOf(dir + "/task/" + t.Name() + "/status")
		c.Switches += s["voluntary_ctxt_switches"] + s["nonvoluntary_ctxt_switches"]
	}
	s := statusOf(dir + "/status")
	c.RSS, c.Anon = s["VmRSS"]<<10, s["RssAnon"]<<10
	return c, nil
}

// statusOf reads the numbers of a status file of /proc.
func statusOf(path string) map[string]int64 {
	b, _ := os.ReadFile(path)
	m := map[string]int64{}
	for _, line := range strings.Split(string(b), "\n") {
		k, v, ok := strings.Cut(line, ":")
		if f := strings.Fields(v); ok && len(f) > 0 {
			if n, err := strconv.ParseInt(f[0], 10, 64); err == nil {
				m[k] = n
			}
		}
	}
	return m
}
