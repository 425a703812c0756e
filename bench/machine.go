package bench

import (
	"os"
	"os/exec"
	"regexp"
	"runtime"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// A Machine is what a run was done on.
type Machine struct {
	CPU      string            `json:"cpu"`
	CPUs     int               `json:"cpus"`
	MemoryMB int64             `json:"memory_mb"`
	OS       string            `json:"os"`
	Kernel   string            `json:"kernel"`
	Go       string            `json:"go"`
	Load     [2]float64        `json:"load"` // of one minute, at the beginning and at the end
	Tools    map[string]string `json:"tools"`
}

// tools are the programs that take part, with how they tell their version.
var tools = [][]string{
	{"fio", "--version"}, {"nbdkit", "--version"}, {"qemu-nbd", "--version"}, {"mkfs.btrfs", "--version"}, {"thin_check", "--version"},
}

func describeMachine() Machine {
	m := Machine{CPUs: runtime.NumCPU(), Go: runtime.Version(), Tools: map[string]string{}}
	m.CPU = firstMatch("/proc/cpuinfo", `(?m)^model name\s*: (.*)$`)
	kb, _ := strconv.ParseInt(firstMatch("/proc/meminfo", `(?m)^MemTotal:\s*(\d+) kB`), 10, 64)
	m.MemoryMB = kb >> 10
	m.OS = firstMatch("/etc/os-release", `(?m)^PRETTY_NAME="?(.*?)"?$`)
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		m.Kernel = unix.ByteSliceToString(u.Release[:])
	}
	for _, t := range tools {
		out, err := exec.Command(t[0], t[1:]...).CombinedOutput()
		if err != nil {
			continue
		}
		if v := regexp.MustCompile(`\d+\.\d+(\.\d+)*`).Find(out); v != nil {
			m.Tools[t[0]] = string(v)
		}
	}
	m.Load[0] = loadNow()
	return m
}

func loadNow() float64 {
	b, _ := os.ReadFile("/proc/loadavg")
	v, _ := strconv.ParseFloat(strings.SplitN(string(b), " ", 2)[0], 64)
	return v
}

func firstMatch(file, pattern string) string {
	b, _ := os.ReadFile(file)
	if m := regexp.MustCompile(pattern).FindSubmatch(b); m != nil {
		return string(m[1])
	}
	return ""
}

// describeMedium says what a directory lies on.
func describeMedium(dir string) string {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return dir
	}
	name, ok := map[int64]string{
		unix.TMPFS_MAGIC: "memory (tmpfs)", unix.EXT4_SUPER_MAGIC: "disk (ext4)", unix.XFS_SUPER_MAGIC: "disk (xfs)",
		unix.BTRFS_SUPER_MAGIC: "disk (btrfs)", unix.OVERLAYFS_SUPER_MAGIC: "overlayfs",
	}[int64(st.Type)]
	if !ok {
		name = "file system 0x" + strconv.FormatInt(int64(st.Type), 16)
	}
	return name
}
