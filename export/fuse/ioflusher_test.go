package fuse

import (
	"errors"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"
)

func TestIOFlusher(t *testing.T) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // never unlocked: the thread ends with its setting
		_, err := IOFlusher()
		if errors.Is(err, unix.EPERM) {
			if err := SetIOFlusher(); !errors.Is(err, unix.EPERM) {
				t.Errorf("set without the capability: %v, want EPERM", err)
			}
			t.Log("no CAP_SYS_RESOURCE here: only the refusal was tested")
			return
		}
		if err != nil {
			t.Error(err)
			return
		}
		if err := SetIOFlusher(); err != nil {
			t.Error(err)
			return
		}
		if on, err := IOFlusher(); !on || err != nil {
			t.Errorf("after setting it: %v, %v", on, err)
		}
	}()
	<-done
}
