package vm

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
)

// Udev returns what Config.Files needs so that udevd runs in the guest: Debian's, with its rules
// and those of device-mapper and LVM as far as they are installed here. It is started with
//
//	/lib/systemd/systemd-udevd --daemon
func Udev() (map[string]string, error) {
	dir := filepath.Join(cacheDir(), "udev")
	udevadm := filepath.Join(dir, "bin", "udevadm")
	if _, err := os.Stat(udevadm); err != nil {
		return nil, fmt.Errorf("%w: no udev in %s (scripts/setup.sh vm fetches it)", ErrUnavailable, dir)
	}
	files, err := Libraries(udevadm)
	if err != nil {
		return nil, err
	}
	files = maps.Clone(files)
	if files == nil {
		files = map[string]string{}
	}
	files["/bin/udevadm"], files["/lib/systemd/systemd-udevd"] = udevadm, udevadm
	for _, glob := range []string{filepath.Join(dir, "rules.d", "*.rules"), "/lib/udev/rules.d/*dm*.rules", "/lib/udev/rules.d/*lvm*.rules", "/lib/udev/rules.d/99-systemd.rules"} {
		list, err := filepath.Glob(glob)
		if err != nil {
			return nil, err
		}
		for _, file := range list {
			if !strings.Contains(filepath.Base(file), "mica") {
				files["/lib/udev/rules.d/"+filepath.Base(file)] = file
			}
		}
	}
	return files, nil
}
