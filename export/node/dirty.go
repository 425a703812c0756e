package node

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// LimitDirty bounds what the kernel keeps in memory of writes to a node until it writes them back;
// at half of it, it begins to. 0 takes the bound of an earlier owner of the minor away. It is a
// matter of speed only: where the kernel (before Linux 6.2) has no such bound, nothing happens.
//
// Source of the names: the kernel's Documentation/ABI/testing/sysfs-class-bdi.
func LimitDirty(node string, bytes int64) {
	real, err := filepath.EvalSymlinks(node)
	if err != nil {
		return
	}
	dir := filepath.Join("/sys/block", filepath.Base(real), "bdi")
	strict := filepath.Join(dir, "strict_limit")
	now, err := os.ReadFile(strict)
	if err != nil || bytes <= 0 && strings.TrimSpace(string(now)) == "0" {
		return
	}
	if bytes <= 0 {
		_ = os.WriteFile(strict, []byte("0"), 0)
		_ = os.WriteFile(filepath.Join(dir, "max_ratio"), []byte("100"), 0)
		return
	}
	if os.WriteFile(filepath.Join(dir, "max_bytes"), strconv.AppendInt(nil, bytes, 10), 0) == nil {
		_ = os.WriteFile(strict, []byte("1"), 0)
	}
}
