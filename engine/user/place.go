package user

import (
	"mica/dev"
	"mica/thin"
)

// PlaceRead finds a range that is mapped to one run of the data device. It is pinned by a token of
// a read: the blocks are not handed out again before Release.
func (t *Thin) PlaceRead(off, n int64) (dev.Place, bool) {
	fd := t.p.data.fd
	if fd < 0 || n <= 0 || dev.CheckRange(off, n, t.size.Load()) != nil {
		return dev.Place{}, false
	}
	token, ok := t.d.r.tryEnter()
	if !ok {
		return dev.Place{}, false
	}
	if l := t.d.table.at(thin.VBlock(off / t.bs)); l != nil && !t.closed.Load() {
		if run, pos := t.runIn(l, off, n); pos >= 0 && run == n {
			return dev.Place{FD: fd, Off: pos, Pinner: t, Token: token}, true
		}
	}
	t.d.r.exit(token)
	return dev.Place{}, false
}

// Unpin ends the read of a place.
func (t *Thin) Unpin(token uint32) { t.d.r.exit(token) }
