package fuse

import (
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"mica/dev"
	"mica/export"
)

// fioVerify writes with random block sizes from 512 bytes in 4 jobs, each in its own part, and
// verifies everything.
func fioVerify(t testing.TB, file string, direct bool, jobMiB int, more ...string) {
	t.Helper()
	d := 0
	bs := "bsrange=512-128k"
	if direct {
		d = 1
	}
	args := []string{"fio", "--name=v", "--filename=" + file, "--rw=randwrite", "--" + bs, "--bs_unaligned=0",
		"--ioengine=libaio", "--iodepth=16", fmt.Sprintf("--direct=%d", d), "--numjobs=4", fmt.Sprintf("--size=%dm", jobMiB),
		fmt.Sprintf("--offset_increment=%dm", jobMiB), "--verify=crc32c", "--verify_state_save=0", "--verify_fatal=1", "--verify_dump=0",
		"--randseed=4711", "--group_reporting", "--allow_file_create=1", "--output-format=terse"}
	out := run(t, append(args, more...)...)
	if strings.Contains(out, "verify:") || strings.Contains(out, "error=") {
		t.Fatalf("fio: %s", out)
	}
}

func TestFioVerify(t *testing.T) {
	needTool(t, "fio", "mkfs.ext4")
	for _, c := range []struct {
		name string
		dev  func() dev.Device
	}{
		{"workers", func() dev.Device { return dev.NewMem(256 << 20) }},
		{"inline", func() dev.Device { return inline(dev.NewMem(256 << 20)) }},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := newSetup(t, false)
			a := s.attach("fio", c.dev(), export.AttachOptions{})
			fioVerify(t, a.Node(), true, 32)
			fioVerify(t, a.Node(), false, 32)
			run(t, "mkfs.ext4", "-q", a.Node())
			mnt := filepath.Join(s.dir, "mnt")
			mount(t, a.Node(), mnt)
			fioVerify(t, filepath.Join(mnt, "direct"), true, 16)
			fioVerify(t, filepath.Join(mnt, "buffered"), false, 16)
			unmountFS(t, mnt)
			run(t, "e2fsck", "-fn", a.Node())
		})
	}
}
