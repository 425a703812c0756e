package daemon

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
)

// directories makes ROOT, which nobody else may read, and RUN, which a group may have to pass, and
// refuses those that others could change: what they put there would be opened, followed, replaced.
func (d *daemon) directories() error {
	list := []struct {
		dir  string
		mode os.FileMode
	}{
		{d.c.Root, 0o700}, {filepath.Join(d.c.Root, "spool"), 0o700}, {d.c.Run, 0o711},
	}
	if d.c.Root == d.c.Run {
		list = list[1:]
	}
	for _, v := range list {
		if err := ownDir(v.dir, v.mode); err != nil {
			return err
		}
	}
	return nil
}

// ownDir makes a directory, or takes one that belongs to this user (or root) and that only its owner
// can write; everything else is refused. One that others can read stays so: it may hold more than
// what is ours, and our files in it are for their owner only.
func ownDir(dir string, mode os.FileMode) error {
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return err
	}
	err := os.Mkdir(dir, mode)
	if err == nil {
		err = os.Chmod(dir, mode) // whatever the umask
	}
	if err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	st, err := os.Stat(dir) // it may be a link to where there is room
	if err != nil {
		return err
	}
	if !st.IsDir() {
		return fmt.Errorf("%s is not a directory (%s)", dir, st.Mode())
	}
	if link, err := os.Lstat(dir); err != nil {
		return err
	} else if err := mine(dir, link); err != nil {
		return err
	}
	if err := mine(dir, st); err != nil {
		return err
	}
	have := st.Mode().Perm()
	if have&0o022 != 0 {
		return fmt.Errorf("directory %s: mode %04o: others than its owner can write there: chmod go-w it, and look what they put there", dir, have)
	}
	return nil
}

// mine refuses what belongs to another user.
func mine(path string, st os.FileInfo) error {
	if s, ok := st.Sys().(*syscall.Stat_t); ok && s.Uid != 0 && int(s.Uid) != os.Geteuid() {
		return fmt.Errorf("directory %s: it belongs to user %d, the daemon runs as user %d", path, s.Uid, os.Geteuid())
	}
	return nil
}
