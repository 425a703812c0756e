// Package dmioctl drives device-mapper through /dev/mapper/control: devices, tables, messages,
// status and events, with the tables of thin pools and thin devices (thin.go).
//
// Each ioctl takes one buffer: a header of 312 bytes and, where there is a payload, data at
// data_start. Integers are in host order, which is little-endian on every machine mica runs on.
//
//	offset  size  field
//	0       12    version       major, minor, patch: 4, 0, 0 is answered by every kernel
//	12      4     data_size     of the whole buffer; the kernel answers with what it used
//	16      4     data_start    where the payload begins
//	20      4     target_count
//	24      4     open_count    signed
//	28      4     flags
//	32      4     event_nr
//	36      4     padding
//	40      8     dev           device number, as dev_t of stat(2)
//	48      128   name          NUL-terminated
//	176     129   uuid          NUL-terminated
//	305     7     padding
//
// A target is 40 bytes (first sector u64, sectors u64, status s32, next u32, type 16 bytes)
// followed by its parameters as a NUL-terminated string. In a table to load, next counts from
// the start of the same target; in an answer it counts from data_start.
// Source: Linux include/uapi/linux/dm-ioctl.h.
package dmioctl

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	headerSize = 312
	targetSize = 40
	nameMax    = 127
	uuidMax    = 128
	startSize  = 16 << 10 // buffer for answers; grown while the kernel says it is too small
	maxSize    = 16 << 20
)

// A Control is an open /dev/mapper/control. Safe for concurrent use.
type Control struct{ f *os.File }

// Open opens the control device.
func Open() (*Control, error) {
	f, err := os.OpenFile("/dev/mapper/control", os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	return &Control{f}, nil
}

// Close closes the control device. Devices stay.
func (c *Control) Close() error { return c.f.Close() }

// A Target is one line of a table: sectors [Start, Start+Length) are served by Type.
type Target struct {
	Start, Length uint64 // 512-byte sectors
	Type          string
	Params        string // of the table; in a status answer, the status text
}

// Info is what every ioctl answers about a device.
type Info struct {
	Name, UUID string
	Dev        uint64 // device number
	Open       int    // how often it is open
	Event      uint32
	Flags      uint32
	Targets    int
}

// Suspended reports whether the device holds back its I/O.
func (i Info) Suspended() bool { return i.Flags&unix.DM_SUSPEND_FLAG != 0 }

// ReadOnly reports whether the device refuses writes.
func (i Info) ReadOnly() bool { return i.Flags&unix.DM_READONLY_FLAG != 0 }

// Live reports whether the device has a live table.
func (i Info) Live() bool { return i.Flags&unix.DM_ACTIVE_PRESENT_FLAG != 0 }

// Node is the path of the device node that devtmpfs makes.
func (i Info) Node() string { return fmt.Sprintf("/dev/dm-%d", unix.Minor(i.Dev)) }

// A request is one ioctl in the making.
type request struct {
	op          string // for errors
	code        uintptr
	name, uuid  string
	flags       uint32
	event       uint32
	targetCount int
	payload     []byte
	answer      bool // the kernel answers with a payload
}

// do runs r and returns the device's info and the payload of the answer.
func (c *Control) do(r request) (Info, []byte, error) {
	if len(r.name) > nameMax || len(r.uuid) > uuidMax || strings.ContainsAny(r.name+r.uuid, "\x00/") {
		return Info{}, nil, fmt.Errorf("dm %s: name %q or uuid %q is not possible", r.op, r.name, r.uuid)
	}
	size := headerSize + len(r.payload)
	if r.answer {
		size += startSize
	}
	for {
		buf := make([]byte, size)
		le := binary.LittleEndian
		le.PutUint32(buf[0:], 4)
		le.PutUint32(buf[12:], uint32(size))
		le.PutUint32(buf[16:], headerSize)
		le.PutUint32(buf[20:], uint32(r.targetCount))
		le.PutUint32(buf[28:], r.flags)
		le.PutUint32(buf[32:], r.event)
		copy(buf[48:48+nameMax], r.name)
		copy(buf[176:176+uuidMax], r.uuid)
		copy(buf[headerSize:], r.payload)
		err := ioctl(c.f, r.code, buf)
		switch {
		case errors.Is(err, unix.EINTR):
			continue // a signal of the Go runtime during a wait
		case err != nil:
			return Info{}, nil, fmt.Errorf("dm %s %q: %w", r.op, r.name, err)
		}
		flags := le.Uint32(buf[28:])
		if flags&unix.DM_BUFFER_FULL_FLAG != 0 {
			if size *= 4; size > maxSize {
				return Info{}, nil, fmt.Errorf("dm %s %q: the answer needs more than %d bytes", r.op, r.name, maxSize)
			}
			continue
		}
		// An answer without payload may name a data_size below data_start.
		end, start := uint64(le.Uint32(buf[12:])), uint64(le.Uint32(buf[16:]))
		var data []byte
		if start >= headerSize && end > start && end <= uint64(len(buf)) {
			data = buf[start:end]
		}
		return Info{
			Name: cString(buf[48:176]), UUID: cString(buf[176:305]), Dev: le.Uint64(buf[40:]),
			Open: int(int32(le.Uint32(buf[24:]))), Event: le.Uint32(buf[32:]), Flags: flags,
			Targets: int(le.Uint32(buf[20:])),
		}, data, nil
	}
}

func cString(b []byte) string {
	if i := bytes.IndexByte(b, 0); i >= 0 {
		b = b[:i]
	}
	return string(b)
}

// Create makes a device without a table. uuid may be empty. EBUSY if the name is taken.
func (c *Control) Create(name, uuid string) (Info, error) {
	info, _, err := c.do(request{op: "create", code: unix.DM_DEV_CREATE, name: name, uuid: uuid})
	return info, err
}

// Remove removes a device; EBUSY if it is open. With deferred it goes when it is closed.
func (c *Control) Remove(name string, deferred bool) error {
	r := request{op: "remove", code: unix.DM_DEV_REMOVE, name: name}
	if deferred {
		r.flags = unix.DM_DEFERRED_REMOVE
	}
	_, _, err := c.do(r)
	return err
}

// Load puts a table into the device's inactive slot; Resume makes it live.
func (c *Control) Load(name string, readOnly bool, table ...Target) error {
	r := request{op: "load", code: unix.DM_TABLE_LOAD, name: name, targetCount: len(table), payload: encodeTable(table)}
	if readOnly {
		r.flags = unix.DM_READONLY_FLAG
	}
	_, _, err := c.do(r)
	return err
}

func encodeTable(table []Target) []byte {
	var out []byte
	for _, t := range table {
		next := (targetSize + len(t.Params) + 1 + 7) &^ 7
		rec := make([]byte, next)
		binary.LittleEndian.PutUint64(rec[0:], t.Start)
		binary.LittleEndian.PutUint64(rec[8:], t.Length)
		binary.LittleEndian.PutUint32(rec[20:], uint32(next))
		copy(rec[24:39], t.Type)
		copy(rec[targetSize:], t.Params)
		out = append(out, rec...)
	}
	return out
}

func decodeTable(data []byte, count int) ([]Target, error) {
	var out []Target
	for at := uint64(0); len(out) < count; {
		if at+targetSize > uint64(len(data)) {
			return nil, fmt.Errorf("target %d of %d at byte %d: the answer has %d bytes", len(out), count, at, len(data))
		}
		rec := data[at:]
		out = append(out, Target{
			Start: binary.LittleEndian.Uint64(rec[0:]), Length: binary.LittleEndian.Uint64(rec[8:]),
			Type: cString(rec[24:40]), Params: cString(rec[targetSize:]),
		})
		next := uint64(binary.LittleEndian.Uint32(rec[20:]))
		if next <= at && len(out) < count {
			return nil, fmt.Errorf("target %d of %d: next is at byte %d, not beyond %d", len(out), count, next, at)
		}
		at = next
	}
	return out, nil
}

// Resume makes a loaded table live and lets I/O run.
func (c *Control) Resume(name string) error {
	_, _, err := c.do(request{op: "resume", code: unix.DM_DEV_SUSPEND, name: name})
	return err
}

// Suspend waits for the I/O in flight and holds back the rest. A file system on the device is
// frozen first unless skipFreeze; with noFlush, I/O that a target has queued is kept queued
// instead of waited for.
func (c *Control) Suspend(name string, skipFreeze, noFlush bool) error {
	r := request{op: "suspend", code: unix.DM_DEV_SUSPEND, name: name, flags: unix.DM_SUSPEND_FLAG}
	if skipFreeze {
		r.flags |= unix.DM_SKIP_LOCKFS_FLAG
	}
	if noFlush {
		r.flags |= unix.DM_NOFLUSH_FLAG
	}
	_, _, err := c.do(r)
	return err
}

// Message sends a message to the target at sector 0 and returns its answer, mostly empty.
func (c *Control) Message(name, message string) (string, error) {
	payload := make([]byte, 8, 8+len(message)+1)
	payload = append(append(payload, message...), 0)
	info, data, err := c.do(request{op: "message", code: unix.DM_TARGET_MSG, name: name, payload: payload, answer: true})
	if err != nil {
		return "", fmt.Errorf("message %q: %w", message, err)
	}
	if info.Flags&unix.DM_DATA_OUT_FLAG == 0 {
		return "", nil
	}
	return cString(data), nil
}

// Info looks at a device; ENXIO if there is none of that name.
func (c *Control) Info(name string) (Info, error) {
	info, _, err := c.do(request{op: "info", code: unix.DM_DEV_STATUS, name: name})
	return info, err
}

// Status returns the status of every target of a device. A thin pool commits first unless
// noFlush.
func (c *Control) Status(name string, noFlush bool) ([]Target, error) {
	r := request{op: "status", code: unix.DM_TABLE_STATUS, name: name, answer: true}
	if noFlush {
		r.flags = unix.DM_NOFLUSH_FLAG
	}
	return c.table(r)
}

// Table returns the live table of a device.
func (c *Control) Table(name string) ([]Target, error) {
	return c.table(request{op: "table", code: unix.DM_TABLE_STATUS, name: name, flags: unix.DM_STATUS_TABLE_FLAG, answer: true})
}

func (c *Control) table(r request) ([]Target, error) {
	info, data, err := c.do(r)
	if err != nil {
		return nil, err
	}
	targets, err := decodeTable(data, info.Targets)
	if err != nil {
		return nil, fmt.Errorf("dm %s %q: %w", r.op, r.name, err)
	}
	return targets, nil
}

// Wait blocks until the device's event number is past event and returns its info. Nothing but an
// event ends it: call it from a goroutine that may stay behind.
func (c *Control) Wait(name string, event uint32) (Info, error) {
	info, _, err := c.do(request{op: "wait", code: unix.DM_DEV_WAIT, name: name, event: event, answer: true})
	return info, err
}

// List returns the names of all devices with their device numbers.
func (c *Control) List() (map[string]uint64, error) {
	_, data, err := c.do(request{op: "list", code: unix.DM_LIST_DEVICES, answer: true})
	if err != nil {
		return nil, err
	}
	// Each: device number u64, offset of the next one u32 (0: last), name.
	out := map[string]uint64{}
	for len(data) > 12 {
		if dev, name := binary.LittleEndian.Uint64(data), cString(data[12:]); name != "" {
			out[name] = dev
		}
		next := binary.LittleEndian.Uint32(data[8:])
		if next == 0 || uint64(next) > uint64(len(data)) {
			break
		}
		data = data[next:]
	}
	return out, nil
}

// Activate creates a device with a table and resumes it. If the table is refused nothing is left.
// uuid may be empty.
func (c *Control) Activate(name, uuid string, readOnly bool, table ...Target) (Info, error) {
	info, err := c.Create(name, uuid)
	if err != nil {
		return Info{}, err
	}
	err = c.Load(name, readOnly, table...)
	if err == nil {
		err = c.Resume(name)
	}
	if err != nil {
		if rmErr := c.Remove(name, false); rmErr != nil {
			err = errors.Join(err, rmErr)
		}
		return Info{}, err
	}
	return info, nil
}

// Reload replaces the live table of a device: load, suspend, resume. I/O is held back meanwhile,
// with noFlush also what a target has queued; a file system on the device is not frozen with
// skipFreeze. If the suspend or the resume fails, the device goes on with its old table where the
// kernel lets it.
func (c *Control) Reload(name string, readOnly, skipFreeze, noFlush bool, table ...Target) error {
	if err := c.Load(name, readOnly, table...); err != nil {
		return err
	}
	if err := c.Suspend(name, skipFreeze, noFlush); err != nil {
		return errors.Join(err, c.Clear(name))
	}
	err := c.Resume(name)
	if err != nil {
		// A target that refuses to be resumed leaves the device suspended, with the new table in
		// the live slot or still in the inactive one.
		if clearErr := c.Clear(name); clearErr == nil {
			if again := c.Resume(name); again != nil {
				err = errors.Join(err, again)
			}
		}
	}
	return err
}

// Clear drops the table of the inactive slot. It is fine if there is none.
func (c *Control) Clear(name string) error {
	_, _, err := c.do(request{op: "clear", code: unix.DM_TABLE_CLEAR, name: name})
	return err
}

// CancelRemove takes back a deferred removal. It is fine if there is none.
func (c *Control) CancelRemove(name string) error {
	_, err := c.Message(name, "@cancel_deferred_remove")
	return err
}

// TargetVersion returns the version of a target type; the kernel loads its module if it can. EINVAL
// if there is no such target.
func (c *Control) TargetVersion(target string) (major, minor, patch uint32, err error) {
	_, data, err := c.do(request{op: "version of target", code: unix.DM_GET_TARGET_VERSION, name: target, answer: true})
	if err != nil {
		return 0, 0, 0, err
	}
	if len(data) < 16 { // next, then the three numbers
		return 0, 0, 0, fmt.Errorf("dm version of target %q: an answer of %d bytes", target, len(data))
	}
	le := binary.LittleEndian
	return le.Uint32(data[4:]), le.Uint32(data[8:]), le.Uint32(data[12:]), nil
}
