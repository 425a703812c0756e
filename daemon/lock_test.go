package daemon

import (
	"context"
	"errors"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"testing"
	"time"

	"mica/daemon/api"
	"mica/dev"
)

// TestLockOfTheDying: who holds a lock and does not answer gets time to go, although it still has
// the listening socket; who answers is refused at once.
func TestLockOfTheDying(t *testing.T) {
	dir := t.TempDir()
	me := owner{PID: os.Getpid(), Root: dir, Run: dir}
	held, err := lockDir(context.Background(), dir, me, 0, nil)
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", filepath.Join(dir, api.SocketName))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	time.AfterFunc(300*time.Millisecond, func() { held.Close() })
	held2, err := lockDir(context.Background(), dir, me, time.Minute, nil)
	if err != nil {
		t.Fatalf("lock of one that goes: %v", err)
	}
	defer held2.Close()

	go http.Serve(l, http.NotFoundHandler())
	var in *InUseError
	_, err = lockDir(context.Background(), dir, owner{}, time.Hour, nil)
	if !errors.As(err, &in) || in.PID != me.PID || !errors.Is(err, dev.ErrLocked) {
		t.Errorf("lock of one that answers: %v, want InUseError naming %d", err, me.PID)
	}
}
