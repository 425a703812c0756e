package nbd

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// errGoodbye: the client ended the handshake as the protocol wants it.
var errGoodbye = errors.New("client aborted the handshake")

// maxOptions bounds the options of one handshake, beside its time.
const maxOptions = 256

// exportTable is where a handshake finds exports.
type exportTable interface {
	// lookup returns the export of that name ("" is the default one), nil if there is none.
	lookup(name string) *export
	// list returns the names and descriptions for LIST.
	list() []ExportInfo
	// enter ties the connection to the export that lookup(name) finds, so that the export
	// cannot be removed behind its back. It returns nil if there is none any more.
	enter(name string) *export
	// closing: no client may enter any more.
	closing() bool
}

// A handshake is the state of one negotiation. It reads exactly what the client sends for each
// option and nothing beyond, so that the socket is at the first request afterwards.
type handshake struct {
	rw       io.ReadWriter
	table    exportTable
	noZeroes bool

	// upgrade starts TLS on the connection and returns what to go on with; nil: there is no TLS
	// here. If it is set, nothing but STARTTLS and ABORT is served before it was called: the
	// protocol's FORCEDTLS. There is no mode in which the client chooses.
	upgrade func() (io.ReadWriter, error)
	secure  bool // it was called

	structured bool
	metaName   string // export name of the last SET_META_CONTEXT
	metaSet    bool   // it selected base:allocation

	out []byte // replies to the current option
}

// run negotiates. It returns the export and the terms to serve it on, errGoodbye, or the reason
// why the connection must be closed.
func (h *handshake) run() (*export, terms, error) {
	var b [18]byte
	binary.BigEndian.PutUint64(b[:], magicServer)
	binary.BigEndian.PutUint64(b[8:], magicOption)
	binary.BigEndian.PutUint16(b[16:], flagFixedNewstyle|flagNoZeroes)
	if _, err := h.rw.Write(b[:]); err != nil {
		return nil, terms{}, err
	}
	if _, err := io.ReadFull(h.rw, b[:4]); err != nil {
		return nil, terms{}, err
	}
	cf := binary.BigEndian.Uint32(b[:])
	if cf&^(flagFixedNewstyle|flagNoZeroes) != 0 {
		return nil, terms{}, fmt.Errorf("unknown client flags 0x%x", cf)
	}
	h.noZeroes = cf&flagNoZeroes != 0

	for range maxOptions {
		opt, data, err := h.readOption()
		if err != nil {
			return nil, terms{}, err
		}
		h.out = h.out[:0]
		if opt == optStartTLS && len(data) == 0 && h.upgrade != nil && !h.secure {
			if err := h.startTLS(); err != nil {
				return nil, terms{}, err
			}
			continue
		}
		e, t, err := h.option(opt, data)
		if len(h.out) > 0 {
			if _, werr := h.rw.Write(h.out); err == nil {
				err = werr
			}
		}
		if err != nil || e != nil {
			return e, t, err
		}
	}
	return nil, terms{}, fmt.Errorf("more than %d options", maxOptions)
}

// readOption reads one option: magic, number, length of data, data.
func (h *handshake) readOption() (uint32, []byte, error) {
	var b [optionSize]byte
	if _, err := io.ReadFull(h.rw, b[:]); err != nil {
		return 0, nil, err
	}
	if m := binary.BigEndian.Uint64(b[:]); m != magicOption {
		return 0, nil, fmt.Errorf("option magic 0x%016x, want 0x%016x", m, uint64(magicOption))
	}
	opt, n := binary.BigEndian.Uint32(b[8:]), binary.BigEndian.Uint32(b[12:])
	longest := uint32(maxOption)
	if h.plain() {
		longest = maxPlain
	}
	if n > longest {
		return 0, nil, fmt.Errorf("option %d with %d bytes of data, longest is %d", opt, n, longest)
	}
	data := make([]byte, n)
	if _, err := io.ReadFull(h.rw, data); err != nil {
		return 0, nil, fmt.Errorf("data of option %d: %w", opt, err)
	}
	return opt, data, nil
}

// plain tells whether the client must start TLS first.
func (h *handshake) plain() bool { return h.upgrade != nil && !h.secure }

// startTLS answers STARTTLS and goes on in TLS. Nothing that was sent before counts afterwards;
// what the client sent together with the option, in the clear, is not TLS and ends it.
func (h *handshake) startTLS() error {
	h.reply(optStartTLS, repAck, nil)
	if _, err := h.rw.Write(h.out); err != nil {
		return err
	}
	rw, err := h.upgrade()
	if err != nil {
		return fmt.Errorf("TLS: %w", err)
	}
	h.rw, h.secure = rw, true
	return nil
}

// option serves one option: replies go to h.out. A non-nil export ends the handshake well.
func (h *handshake) option(opt uint32, data []byte) (*export, terms, error) {
	if opt == optAbort {
		h.reply(opt, repAck, nil)
		return nil, terms{}, errGoodbye
	}
	if h.plain() {
		switch opt {
		case optExportName: // which has no error reply
			return nil, terms{}, errors.New("the client asked for an export without TLS")
		case optStartTLS: // with data
			h.replyErr(opt, repErrInvalid, "option takes no data")
		default:
			h.replyErr(opt, repErrTLSReqd, "start TLS first")
		}
		return nil, terms{}, nil
	}
	if opt == optExportName {
		return h.exportName(data)
	}
	if h.table.closing() {
		h.replyErr(opt, repErrShutdown, "server is shutting down")
		return nil, terms{}, nil
	}
	switch opt {
	case optGo, optInfo:
		return h.goOrInfo(opt, data)
	case optList:
		h.list(data)
	case optStructuredReply:
		if len(data) != 0 {
			h.replyErr(opt, repErrInvalid, "option takes no data")
			break
		}
		h.structured = true
		h.reply(opt, repAck, nil)
	case optListMetaContext, optSetMetaContext:
		h.metaContext(opt, data)
	case optStartTLS:
		if h.secure {
			h.replyErr(opt, repErrInvalid, "TLS was started already")
			break
		}
		fallthrough // there is none here
	default:
		h.replyErr(opt, repErrUnsup, fmt.Sprintf("option %d is not supported", opt))
	}
	return nil, terms{}, nil
}

// exportName serves EXPORT_NAME, which cannot report an error but by closing.
func (h *handshake) exportName(data []byte) (*export, terms, error) {
	name := string(data)
	if err := checkString(name, "export name"); err != nil {
		return nil, terms{}, err
	}
	e := h.table.enter(name)
	if e == nil {
		return nil, terms{}, fmt.Errorf("no export %q", name)
	}
	t := h.terms(e, name)
	h.out = binary.BigEndian.AppendUint64(h.out, t.size)
	h.out = binary.BigEndian.AppendUint16(h.out, t.flags)
	if !h.noZeroes {
		h.out = append(h.out, make([]byte, legacyPadding)...)
	}
	return e, t, nil
}

func (h *handshake) goOrInfo(opt uint32, data []byte) (*export, terms, error) {
	q, err := parseInfoQuery(data)
	if err != nil {
		h.replyErr(opt, repErrInvalid, err.Error())
		return nil, terms{}, nil
	}
	var e *export
	if opt == optGo {
		e = h.table.enter(q.name)
	} else {
		e = h.table.lookup(q.name)
	}
	if e == nil {
		h.replyErr(opt, repErrUnknown, fmt.Sprintf("no export %q", q.name))
		return nil, terms{}, nil
	}
	t := h.terms(e, q.name)
	b := binary.BigEndian.AppendUint16(nil, infoExport)
	b = binary.BigEndian.AppendUint64(b, t.size)
	h.reply(opt, repInfo, binary.BigEndian.AppendUint16(b, t.flags))
	if q.wantName {
		h.reply(opt, repInfo, append(binary.BigEndian.AppendUint16(nil, infoName), e.name...))
	}
	if q.wantDescr && e.description != "" {
		h.reply(opt, repInfo, append(binary.BigEndian.AppendUint16(nil, infoDescription), e.description...))
	}
	b = binary.BigEndian.AppendUint16(nil, infoBlockSize) // also to clients that did not ask
	b = binary.BigEndian.AppendUint32(b, minBlock)
	b = binary.BigEndian.AppendUint32(b, e.preferred)
	h.reply(opt, repInfo, binary.BigEndian.AppendUint32(b, maxPayload))
	h.reply(opt, repAck, nil)
	if opt == optInfo {
		e = nil
	}
	return e, t, nil
}

// terms settles what the connection may do on export e, entered under name.
func (h *handshake) terms(e *export, name string) terms {
	t := e.terms(h.structured)
	t.allocation = h.structured && h.metaSet && h.metaName == name && e.extenter != nil
	return t
}

func (h *handshake) list(data []byte) {
	if len(data) != 0 {
		h.replyErr(optList, repErrInvalid, "option takes no data")
		return
	}
	for _, e := range h.table.list() {
		b := binary.BigEndian.AppendUint32(nil, uint32(len(e.Name)))
		h.reply(optList, repServer, append(append(b, e.Name...), e.Description...))
	}
	h.reply(optList, repAck, nil)
}

func (h *handshake) metaContext(opt uint32, data []byte) {
	if opt == optSetMetaContext {
		h.metaSet = false // replaced even if this one fails
	}
	if !h.structured {
		h.replyErr(opt, repErrInvalid, "structured replies must be negotiated first")
		return
	}
	q, err := parseMetaQuery(data)
	if err != nil {
		rep := uint32(repErrInvalid)
		if errors.Is(err, errTooManyQueries) {
			rep = repErrTooBig
		}
		h.replyErr(opt, rep, err.Error())
		return
	}
	e := h.table.lookup(q.name)
	if e == nil {
		h.replyErr(opt, repErrUnknown, fmt.Sprintf("no export %q", q.name))
		return
	}
	listing := opt == optListMetaContext
	match := listing && len(q.queries) == 0
	for _, s := range q.queries {
		match = match || matchesAllocation(s, listing)
	}
	if match && e.extenter != nil {
		id := uint32(0) // reserved in a listing
		if !listing {
			id = contextAllocationID
			h.metaSet, h.metaName = true, q.name
		}
		h.reply(opt, repMetaContext, append(binary.BigEndian.AppendUint32(nil, id), contextAllocation...))
	}
	h.reply(opt, repAck, nil)
}

// reply appends an option reply: magic, option, type, length, data.
func (h *handshake) reply(opt, typ uint32, data []byte) {
	h.out = binary.BigEndian.AppendUint64(h.out, magicOptionReply)
	h.out = binary.BigEndian.AppendUint32(h.out, opt)
	h.out = binary.BigEndian.AppendUint32(h.out, typ)
	h.out = binary.BigEndian.AppendUint32(h.out, uint32(len(data)))
	h.out = append(h.out, data...)
}

func (h *handshake) replyErr(opt, typ uint32, why string) {
	if len(why) > maxString {
		why = why[:maxString]
	}
	h.reply(opt, typ, []byte(why))
}
