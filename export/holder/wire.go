package holder

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"

	"golang.org/x/sys/unix"
)

// Bounds of what travels in one packet.
const (
	maxName   = 255
	maxBlob   = 4 << 10
	maxPacket = 64 << 10
	listBytes = 32 << 10 // of names and blobs in one answer to "list"
)

type message struct {
	Op    string          `json:"op"`             // put, blob, get, drop, list, ping, quit
	Name  string          `json:"name,omitempty"` // list: the last name of the previous answer
	Blob  json.RawMessage `json:"blob,omitempty"`
	Force bool            `json:"force,omitempty"` // quit although something is held
}

type answer struct {
	Code    string          `json:"code,omitempty"` // "": done
	Error   string          `json:"error,omitempty"`
	Blob    json.RawMessage `json:"blob,omitempty"`
	Entries []Entry         `json:"entries,omitempty"`
	More    bool            `json:"more,omitempty"`
}

// An Entry is one held descriptor without the descriptor.
type Entry struct {
	Name string          `json:"name"`
	Blob json.RawMessage `json:"blob"`
}

// Conditions that callers branch on.
var (
	ErrNotFound = errors.New("holder has no such descriptor")
	ErrHolding  = errors.New("holder still holds descriptors")
	// ErrGone: the connection to the holder has ended. What it held may be lost.
	ErrGone = errors.New("holder is gone")
	// ErrPeer: the process at the other end of the socket belongs to another user.
	ErrPeer = errors.New("holder socket belongs to another user")
)

var codes = map[string]error{"not_found": ErrNotFound, "holding": ErrHolding}

func (a answer) err() error {
	if a.Code == "" {
		return nil
	}
	if err := codes[a.Code]; err != nil {
		return err
	}
	return fmt.Errorf("holder: %s", a.Error)
}

func failed(err error) answer {
	for code, e := range codes {
		if errors.Is(err, e) {
			return answer{Code: code, Error: err.Error()}
		}
	}
	return answer{Code: "error", Error: err.Error()}
}

// send writes one packet, with a descriptor unless fd is negative.
func send(c *net.UnixConn, v any, fd int) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	if len(b) > maxPacket {
		return fmt.Errorf("message of %d bytes, at most %d", len(b), maxPacket)
	}
	var oob []byte
	if fd >= 0 {
		oob = unix.UnixRights(fd)
	}
	_, _, err = c.WriteMsgUnix(b, oob, nil)
	return err
}

// receive reads one packet into v and returns its descriptor, or -1. A packet with more than one
// descriptor, or cut short, is an error; no descriptor leaks.
func receive(c *net.UnixConn, buf []byte, v any) (fd int, err error) {
	var oob [256]byte
	n, oobn, flags, _, err := c.ReadMsgUnix(buf, oob[:])
	if err != nil {
		return -1, err
	}
	if n == 0 && oobn == 0 {
		return -1, net.ErrClosed
	}
	fds, err := rights(oob[:oobn])
	fd = -1
	if len(fds) == 1 {
		fd = fds[0]
	}
	switch {
	case err != nil:
	case len(fds) > 1 || flags&unix.MSG_CTRUNC != 0:
		err = fmt.Errorf("message with %d descriptors: want at most one", len(fds))
	case flags&unix.MSG_TRUNC != 0:
		err = fmt.Errorf("message of more than %d bytes", len(buf))
	default:
		if err = json.Unmarshal(buf[:n], v); err == nil {
			return fd, nil
		}
	}
	for _, f := range fds {
		unix.Close(f)
	}
	return -1, &badMessage{err}
}

// A badMessage was received whole and made no sense; the connection can go on.
type badMessage struct{ error }

func rights(oob []byte) ([]int, error) {
	if len(oob) == 0 {
		return nil, nil
	}
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, err
	}
	var fds []int
	for _, m := range msgs {
		if f, err := unix.ParseUnixRights(&m); err == nil {
			fds = append(fds, f...)
		}
	}
	return fds, nil
}

// checkPeer returns ErrPeer unless the other end runs under our user id.
func checkPeer(c *net.UnixConn) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var cred *unix.Ucred
	var cerr error
	if err := raw.Control(func(fd uintptr) {
		cred, cerr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return err
	}
	if cerr != nil {
		return cerr
	}
	if int(cred.Uid) != unix.Geteuid() {
		return fmt.Errorf("%w: uid %d, want %d", ErrPeer, cred.Uid, unix.Geteuid())
	}
	return nil
}
