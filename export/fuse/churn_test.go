package fuse

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"mica/dev"
	"mica/export"
)

func churnOptions(dir string) Options {
	socket := filepath.Join(dir, "holder.sock")
	return Options{
		RunDir: filepath.Join(dir, "run"), LinkDir: filepath.Join(dir, "links"), Logger: quiet(),
		HolderSocket: socket, HolderCommand: []string{"/proc/self/exe", "role-holder", socket},
		HelperCommand: []string{"/proc/self/exe", "role-helper"},
	}
}

// churnRole ends what its predecessor left and attaches and detaches until it is killed.
func churnRole(dir string) error {
	e, err := New(churnOptions(dir))
	if err != nil {
		return err
	}
	names, err := e.Survivors(context.Background())
	if err != nil {
		return err
	}
	for i, name := range names {
		if i%2 == 0 {
			err = e.Drop(context.Background(), name)
		} else {
			var a export.Attachment
			if a, err = e.Adopt(context.Background(), name, dev.NewMem(16<<20)); err == nil {
				err = a.Detach(context.Background())
			} else if errors.Is(err, export.ErrNotFound) {
				err = nil
			}
		}
		if err != nil {
			return err
		}
	}
	fmt.Println("ready", len(names))
	errs := make(chan error)
	for w := range 3 {
		go func() {
			for i := 0; ; i++ {
				name := fmt.Sprintf("churn%d-%d", w, i%2)
				a, err := e.Attach(context.Background(), name, dev.NewMem(16<<20), export.AttachOptions{})
				if err != nil {
					errs <- err
					return
				}
				for {
					err := a.Detach(context.Background())
					if err == nil {
						break
					}
					if !errors.Is(err, export.ErrBusy) {
						errs <- err
						return
					}
				}
			}
		}()
	}
	return <-errs
}

// TestKillAnywhere kills an exporter that attaches and detaches all the time. Whatever it was
// doing, the next one starts, and at the end nothing is left.
func TestKillAnywhere(t *testing.T) {
	needRoot(t)
	s := &setup{t: t, dir: shmDir(t), o: Options{}}
	s.useHolder(t)
	loops := len(loopNames(t))
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 1))
	survivors := 0
	for i := range 2 * kills(t) {
		c := exec.Command("/proc/self/exe", "role-churn", s.dir)
		c.Stderr = os.Stderr
		out, err := c.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		ch := &child{c: c}
		var n int
		line, err := bufio.NewReader(out).ReadString('\n')
		if _, serr := fmt.Sscanf(line, "ready %d", &n); err != nil || serr != nil {
			ch.kill(t)
			t.Fatalf("kill %d: next exporter said %q, %v", i, line, err)
		}
		survivors += n
		time.Sleep(time.Duration(rnd.IntN(60000)) * time.Microsecond)
		ch.kill(t)
	}
	t.Logf("%d survivors met", survivors)
	e, err := New(churnOptions(s.dir))
	if err != nil {
		t.Fatal(err)
	}
	names, err := e.Survivors(ctx(t))
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		if err := e.Drop(ctx(t), name); err != nil {
			t.Error(err)
		}
	}
	s.nothingLeft(t)
	if err := e.Close(); err != nil {
		t.Error(err)
	}
	if n := len(loopNames(t)); n > loops {
		t.Logf("%d free loop devices that killed exporters made stay, %d before", n, loops)
	}
}
