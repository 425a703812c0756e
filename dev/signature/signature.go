// Package signature finds out whether a block device carries something already, before it is
// formatted.
package signature

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"strings"

	"mica/dev"
)

// ErrFound: a device that is to be formatted carries something already.
var ErrFound = errors.New("there is something on the device")

// Check refuses a device on which wipefs or blkid finds a file system, a partition table, a RAID
// or LVM label or the like: the error is ErrFound with the names of what was found. Where neither
// tool is there, only a device whose first and last MiB are zeros passes.
func Check(ctx context.Context, path string) error {
	if tool, err := exec.LookPath("wipefs"); err == nil {
		out, err := exec.CommandContext(ctx, tool, "--no-act", "--noheadings", "--output", "TYPE,OFFSET", "--", path).CombinedOutput()
		if err != nil {
			return fmt.Errorf("look for signatures on %s: %w: %s", path, err, strings.TrimSpace(string(out)))
		}
		if found := strings.Fields(string(out)); len(found) > 0 {
			return fmt.Errorf("%s: %w: %s", path, ErrFound, strings.Join(found, " "))
		}
		return nil
	}
	if tool, err := exec.LookPath("blkid"); err == nil {
		out, err := exec.CommandContext(ctx, tool, "--probe", "--output", "value", "--match-tag", "TYPE", "--", path).Output()
		var ee *exec.ExitError
		switch {
		case err == nil:
			return fmt.Errorf("%s: %w: %s", path, ErrFound, strings.TrimSpace(string(out)))
		case errors.As(err, &ee) && ee.ExitCode() == 2: // nothing found
			return nil
		default:
			return fmt.Errorf("look for signatures on %s: %w", path, err)
		}
	}
	return checkEnds(path)
}

// checkEnds refuses a device whose first or last MiB is not zero.
func checkEnds(path string) error {
	d, err := dev.Open(path, dev.OpenOptions{ReadOnly: true})
	if err != nil {
		return err
	}
	defer d.Close()
	n := min(d.Size(), 1<<20)
	for _, off := range []int64{0, d.Size() - n} {
		b := make([]byte, n)
		if _, err := d.ReadAt(b, off); err != nil {
			return err
		}
		for i, c := range b {
			if c != 0 {
				return fmt.Errorf("%s: %w: byte %d is not zero", path, ErrFound, off+int64(i))
			}
		}
	}
	return nil
}
