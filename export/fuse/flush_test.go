package fuse

import (
	"testing"
	"time"
)

// TestFlushTime: flushes are done where they were read only when they are known to be short.
func TestFlushTime(t *testing.T) {
	var f flushTime
	if f.short() {
		t.Error("short before one was measured")
	}
	f.took(50 * time.Microsecond)
	if !f.short() {
		t.Error("50 us are not short")
	}
	f.took(time.Second) // a stall: once is no disk
	if !f.short() {
		t.Error("one stall among short ones counts as a disk")
	}
	for range 4 {
		f.took(5 * time.Millisecond)
	}
	if f.short() {
		t.Error("5 ms are short")
	}
	for range 40 {
		f.took(30 * time.Microsecond)
	}
	if !f.short() {
		t.Error("it does not learn that flushes have become short")
	}
}
