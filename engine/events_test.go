package engine

import (
	"fmt"
	"testing"
)

func TestEvents(t *testing.T) {
	var e Events
	details := func(ch <-chan Event) (list []string, open bool) {
		for {
			select {
			case ev, ok := <-ch:
				if !ok {
					return list, false
				}
				list = append(list, ev.Detail)
			default:
				return list, true
			}
		}
	}
	want := func(what string, ch <-chan Event, open bool, want ...string) {
		t.Helper()
		if got, is := details(ch); fmt.Sprint(got) != fmt.Sprint(want) || is != open {
			t.Errorf("%s: got %q, open: %v; want %q, %v", what, got, is, want, open)
		}
	}
	e.Send(EventMode, "nobody listens")
	e.Keep(EventJournal, "kept")
	a, cancelA := e.Subscribe()
	b, cancelB := e.Subscribe()
	e.Send(EventMode, "both")
	want("the first who listens", a, true, "kept", "both")
	want("the second", b, true, "both")
	cancelA()
	cancelA()
	want("cancelled", a, false)
	e.Send(EventMode, "one")
	for range 2 * eventBuffer { // does not wait for who does not read
		e.Send(EventMode, "more")
	}
	if got, _ := details(b); len(got) != eventBuffer || got[0] != "one" {
		t.Errorf("who did not read has %d events, first %q; want %d, the oldest ones", len(got), got[0], eventBuffer)
	}
	e.Close()
	e.Close()
	want("closed", b, false)
	cancelB()
	e.Send(EventMode, "too late")
	c, cancel := e.Subscribe()
	want("after the end", c, false)
	cancel()
}
