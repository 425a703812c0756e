package daemon

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"mica/daemon/api"
	"mica/dev"
)

// lockName is a file in RUN and one in ROOT that the daemon holds locked, with an owner in it.
const lockName = "daemon.lock"

// An owner says who has locked a directory.
type owner struct {
	PID  int    `json:"pid"`
	Root string `json:"root"`
	Run  string `json:"run"`
}

// An InUseError says which daemon has a directory. It is dev.ErrLocked.
type InUseError struct {
	Dir string
	owner
}

func (e *InUseError) Error() string {
	if e.PID == 0 {
		return fmt.Sprintf("%s is in use by another daemon", e.Dir)
	}
	return fmt.Sprintf("%s is in use by another daemon: process %d (mica serve --root %s --run %s)", e.Dir, e.PID, e.Root, e.Run)
}

func (e *InUseError) Is(target error) bool { return target == dev.ErrLocked }

// dying is how long a start waits for a predecessor that no longer answers.
const dying = 10 * time.Second

// lockDir takes the lock of a directory and writes down whose it is. A daemon that holds it and
// answers is refused at once; one that does not may be dying, and gets some time, and rescue, if
// not nil, is told of it.
func lockDir(ctx context.Context, dir string, me owner, wait time.Duration, rescue func(pid int)) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, lockName), os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	deadline := time.Now().Add(wait)
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			break
		}
		if err != unix.EWOULDBLOCK && err != unix.EINTR {
			f.Close()
			return nil, &os.PathError{Op: "lock", Path: f.Name(), Err: err}
		}
		who := readOwner(f)
		if answers(who.Run) || time.Now().After(deadline) || ctx.Err() != nil {
			f.Close()
			return nil, &InUseError{dir, who}
		}
		if rescue != nil {
			rescue(who.PID)
		}
		t := time.NewTimer(50 * time.Millisecond)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
		}
	}
	b, err := json.Marshal(me)
	if err == nil {
		err = f.Truncate(0)
	}
	if err == nil {
		_, err = f.WriteAt(append(b, '\n'), 0)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// readOwner reads what the holder of a lock wrote; zero if there is nothing to read yet.
func readOwner(f *os.File) owner {
	var o owner
	b := make([]byte, 16<<10)
	n, _ := f.ReadAt(b, 0)
	if json.Unmarshal(b[:n], &o) != nil {
		return owner{}
	}
	return o
}

// answers reports whether a daemon answers on the API's socket in run. That somebody takes the
// connection is not enough: a child that a killed daemon was just starting has the listening
// socket, and the locks, until it has become another program.
func answers(run string) bool {
	if run == "" {
		return false
	}
	c, err := net.DialTimeout("unix", filepath.Join(run, api.SocketName), time.Second)
	if err != nil {
		return false
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(time.Second))
	if _, err := c.Write([]byte("HEAD / HTTP/1.0\r\n\r\n")); err != nil {
		return false
	}
	_, err = c.Read(make([]byte, 1))
	return err == nil
}
