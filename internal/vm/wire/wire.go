// Package wire is what the test machine's agent and its host say to each other over one
// virtio-serial port.
//
// Either side sends frames: one byte of type, four bytes of command id, four bytes of payload
// length (both little-endian), then the payload. The agent sends Hello when it is ready. The
// host starts a command with Start (its payload is a Command in JSON), the agent answers with
// any number of Stdout and Stderr frames of the same id and exactly one Exit.
package wire

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"sync"
)

// Type says what a frame is.
type Type byte

const (
	Hello    Type = 1 // agent: ready; payload: the kernel's release
	Start    Type = 2 // host: run a command
	Stdout   Type = 3 // agent: bytes from the command
	Stderr   Type = 4
	Exit     Type = 5 // agent: the command ended; payload: Status in JSON
	PowerOff Type = 6 // host: sync and switch off; no answer
)

// PortName is the name of the virtio-serial port, in /sys/class/virtio-ports/*/name.
const PortName = "mica.agent"

// maxPayload bounds what a reader allocates for a frame that says it is large.
const maxPayload = 64 << 20

// A Command is a program to run as root in the guest.
type Command struct {
	Args  []string `json:"args"` // Args[0] is a path, or a name found in /bin
	Env   []string `json:"env,omitempty"`
	Dir   string   `json:"dir,omitempty"`
	Stdin []byte   `json:"stdin,omitempty"`
}

// A Status is how a command ended.
type Status struct {
	Code  int    `json:"code"`            // exit status, 128+n for signal n, -1 if it did not start
	Error string `json:"error,omitempty"` // why it did not start
}

// A Frame is one message.
type Frame struct {
	Type    Type
	ID      uint32
	Payload []byte
}

// Read reads one frame.
func Read(r io.Reader) (Frame, error) {
	var head [9]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return Frame{}, err
	}
	f := Frame{Type: Type(head[0]), ID: binary.LittleEndian.Uint32(head[1:])}
	n := binary.LittleEndian.Uint32(head[5:])
	if n > maxPayload {
		return Frame{}, fmt.Errorf("frame of type %d: payload of %d bytes, at most %d", f.Type, n, maxPayload)
	}
	f.Payload = make([]byte, n)
	_, err := io.ReadFull(r, f.Payload)
	return f, err
}

// A Writer sends frames. Safe for concurrent use.
type Writer struct {
	mu sync.Mutex
	w  io.Writer // guarded by mu
}

// NewWriter returns a Writer on w.
func NewWriter(w io.Writer) *Writer { return &Writer{w: w} }

// Send writes one frame in one piece.
func (w *Writer) Send(t Type, id uint32, payload []byte) error {
	buf := make([]byte, 0, 9+len(payload))
	buf = append(buf, byte(t))
	buf = binary.LittleEndian.AppendUint32(buf, id)
	buf = binary.LittleEndian.AppendUint32(buf, uint32(len(payload)))
	buf = append(buf, payload...)
	w.mu.Lock()
	defer w.mu.Unlock()
	_, err := w.w.Write(buf)
	return err
}

// SendJSON is Send with v as JSON.
func (w *Writer) SendJSON(t Type, id uint32, v any) error {
	payload, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return w.Send(t, id, payload)
}
