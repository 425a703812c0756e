package trial

import (
	"bufio"
	"fmt"
	"io"
	"slices"
	"strings"
)

// A Kind is what an operation does.
type Kind uint8

const (
	Create   Kind = iota // an empty device in Slot
	Snap                 // Slot to Other
	Snap2                // Slot to Other and Third, one moment
	Delete               // Slot
	Reopen               // Slot: close, open
	Write                // sectors [Off, Off+N) of Slot
	FUA                  // Write, then Flush
	Zero                 // write zeroes
	ZeroKeep             // write zeroes that stay allocated
	Discard              //
	Read                 // and compare
	Peek                 // read what another worker may be changing: all must be the device's own
	Flush                // Slot
	Commit               // the pool
	GrowData             // by N blocks
	GrowMeta             // by N metadata blocks
	TxID                 // transaction id + 1
	Hold                 // reserve the metadata snapshot
	Unhold               // release it
	Trim                 // give free blocks to the host
	kinds
)

var kindNames = [kinds]string{"create", "snap", "snap2", "delete", "reopen", "write", "fua", "zero", "zerokeep",
	"discard", "read", "peek", "flush", "commit", "growdata", "growmeta", "txid", "hold", "unhold", "trim"}

func (k Kind) String() string { return kindNames[k] }

// An Op is one operation of one worker. The operations of a worker run in order, those of
// different workers at the same time. An operation on a slot that is empty, or is not to be, does
// nothing, so that any part of a list is a list.
type Op struct {
	Worker             int
	Kind               Kind
	Slot, Other, Third int
	Off, N             int64 // sectors; of growth N is blocks
}

func (o Op) String() string {
	return fmt.Sprintf("%d %v slot=%d other=%d third=%d off=%d n=%d", o.Worker, o.Kind, o.Slot, o.Other, o.Third, o.Off, o.N)
}

// Ops is a list of operations, one a line as text.
type Ops []Op

func (l Ops) String() string {
	var b strings.Builder
	for _, o := range l {
		b.WriteString(o.String())
		b.WriteByte('\n')
	}
	return b.String()
}

// ParseOps reads what String wrote. Empty lines and lines that begin with # are skipped.
func ParseOps(r io.Reader) (Ops, error) {
	var l Ops
	s := bufio.NewScanner(r)
	for s.Scan() {
		t := strings.TrimSpace(s.Text())
		if t == "" || t[0] == '#' {
			continue
		}
		var o Op
		var kind string
		if _, err := fmt.Sscanf(t, "%d %s slot=%d other=%d third=%d off=%d n=%d", &o.Worker, &kind, &o.Slot, &o.Other, &o.Third, &o.Off, &o.N); err != nil {
			return nil, fmt.Errorf("operation %q: %w", t, err)
		}
		i := slices.Index(kindNames[:], kind)
		if i < 0 {
			return nil, fmt.Errorf("operation %q: kind %q", t, kind)
		}
		o.Kind = Kind(i)
		l = append(l, o)
	}
	return l, s.Err()
}

// Shrink makes a list that fails shorter while it goes on failing, and returns it. fails may be
// wrong now and then (operations run at the same time): a shorter list is taken only if it
// failed. It stops after so many attempts.
func Shrink(l Ops, attempts int, fails func(Ops) bool) Ops {
	for size := (len(l) + 1) / 2; size > 0; {
		shorter := false
		for at := 0; at < len(l) && attempts > 0; {
			part := slices.Concat(l[:at], l[min(at+size, len(l)):])
			attempts--
			if fails(part) {
				l, shorter = part, true
			} else {
				at += size
			}
		}
		if attempts <= 0 {
			break
		}
		if !shorter || size > len(l) {
			size /= 2
		}
	}
	return l
}
