package nbd

import "mica/dev"

// terms are what the handshake settled for one connection. Immutable afterwards.
type terms struct {
	size       uint64 // bytes, a multiple of minBlock
	flags      uint16 // transmission flags as sent to the client
	structured bool   // structured replies
	allocation bool   // base:allocation was selected for this export
}

// terms of an export for a client that negotiated structured replies or not.
func (e *export) terms(structured bool) terms {
	t := terms{size: uint64(e.d.Size()) &^ (minBlock - 1), structured: structured}
	t.flags = flagHasFlags | flagSendFlush | flagSendFUA | flagMultiConn
	if structured {
		t.flags |= flagSendDF
	}
	if e.readOnly {
		t.flags |= flagReadOnly
		return t
	}
	t.flags |= flagSendZeroes | flagSendFastZero
	if e.discarder != nil {
		t.flags |= flagSendTrim
	}
	return t
}

// check says why a request is turned down before anything is done, or nil. It is safe for any
// header. The payload of a write, of up to maxPayload bytes, follows the header even then.
func (t *terms) check(r *request) error {
	var allowed uint16 = cmdFlagFUA // must be accepted everywhere
	changes := false
	switch r.cmd {
	case cmdRead:
		if t.structured {
			allowed |= cmdFlagDF
		}
	case cmdWrite:
		changes = true
	case cmdFlush:
		if r.flags&^allowed != 0 || r.off != 0 || r.n != 0 {
			return refuse(EINVAL, "flush: flags 0x%x, offset %d, length %d, want none", r.flags, r.off, r.n)
		}
		return nil
	case cmdTrim:
		changes = true
		if t.flags&(flagSendTrim|flagReadOnly) == 0 {
			return refuse(EINVAL, "trim: not supported by this export")
		}
	case cmdWriteZeroes:
		changes = true
		allowed |= cmdFlagNoHole | cmdFlagFastZero
	case cmdBlockStatus:
		allowed |= cmdFlagReqOne
		if !t.allocation {
			return refuse(EINVAL, "block status: no metadata context was selected")
		}
	default:
		return refuse(EINVAL, "%s: unknown", commandName(r.cmd))
	}
	if r.flags&^allowed != 0 {
		return refuse(EINVAL, "%s: flags 0x%x, allowed are 0x%x", commandName(r.cmd), r.flags, allowed)
	}
	if changes && t.flags&flagReadOnly != 0 {
		return refuse(EPERM, "%s: export is read-only", commandName(r.cmd))
	}
	if r.n == 0 || (r.off|uint64(r.n))&(minBlock-1) != 0 {
		return refuse(EINVAL, "%s: offset %d, length %d, want multiples of %d and a length", commandName(r.cmd), r.off, r.n, minBlock)
	}
	if r.off > t.size || uint64(r.n) > t.size-r.off {
		e := EINVAL
		if r.cmd == cmdWrite || r.cmd == cmdWriteZeroes {
			e = ENOSPC // what the protocol asks for
		}
		return refuse(e, "%s: bytes [%d, +%d) of an export of %d bytes: %v", commandName(r.cmd), r.off, r.n, t.size, dev.ErrOutOfRange)
	}
	if r.cmd == cmdRead {
		if r.n > maxPayload {
			return refuse(EINVAL, "read: length %d, largest is %d", r.n, maxPayload)
		}
		if r.flags&cmdFlagDF != 0 && r.n > wholeSize {
			return refuse(EOVERFLOW, "read: length %d unfragmented, largest is %d", r.n, wholeSize)
		}
	}
	return nil
}
