package nbdkernel

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/mdlayher/genetlink"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"mica/export"
)

// The kernel's NBD client is configured over generic netlink.
// Source of the numbers: include/uapi/linux/nbd-netlink.h.
const (
	familyName = "nbd"

	cmdConnect     = 1
	cmdDisconnect  = 2
	cmdReconfigure = 3

	attrIndex       = 1  // u32
	attrSizeBytes   = 2  // u64
	attrBlockSize   = 3  // u64, bytes
	attrTimeout     = 4  // u64, seconds
	attrServerFlags = 5  // u64, transmission flags
	attrClientFlags = 6  // u64
	attrSockets     = 7  // nested
	attrDeadConn    = 8  // u64, seconds
	attrBackend     = 10 // string

	sockItem = 1 // nested
	sockFD   = 1 // u32

	// destroyOnDisconnect takes the block device away with its last connection.
	destroyOnDisconnect = 1 << 0
)

// A control is a connection to the driver.
type control struct {
	c      *genetlink.Conn
	family genetlink.Family
}

func openControl() (*control, error) {
	c, err := genetlink.Dial(nil)
	if err != nil {
		return nil, fmt.Errorf("%w: generic netlink: %w", export.ErrUnavailable, err)
	}
	f, err := c.GetFamily(familyName)
	if err != nil {
		c.Close()
		if errors.Is(err, os.ErrNotExist) {
			return nil, fmt.Errorf("%w: the kernel has no NBD client: the module nbd is not loaded (modprobe nbd)", export.ErrUnavailable)
		}
		return nil, fmt.Errorf("%w: netlink family nbd: %w", export.ErrUnavailable, err)
	}
	return &control{c, f}, nil
}

func (k *control) close() { k.c.Close() }

// do sends a command and returns the attributes of the answer, nil if there was none.
func (k *control) do(command uint8, fill func(*netlink.AttributeEncoder)) (*netlink.AttributeDecoder, error) {
	e := netlink.NewAttributeEncoder()
	fill(e)
	data, err := e.Encode()
	if err != nil {
		return nil, err
	}
	answers, err := k.c.Execute(genetlink.Message{
		Header: genetlink.Header{Command: command, Version: 1}, Data: data,
	}, k.family.ID, netlink.Request|netlink.Acknowledge)
	if err != nil {
		return nil, err
	}
	for _, a := range answers {
		if len(a.Data) > 0 {
			return netlink.NewAttributeDecoder(a.Data)
		}
	}
	return nil, nil
}

// A config is what the driver is told of a device.
type config struct {
	size, block int64  // bytes
	flags       uint16 // transmission flags
	timeout     uint64 // of a request, seconds; 0: none
	deadConn    uint64 // how long requests wait for a new connection, seconds
	backend     string
}

func putSockets(e *netlink.AttributeEncoder, fds []int) {
	e.Nested(attrSockets, func(e *netlink.AttributeEncoder) error {
		for _, fd := range fds {
			e.Nested(sockItem, func(e *netlink.AttributeEncoder) error {
				e.Uint32(sockFD, uint32(fd))
				return nil
			})
		}
		return nil
	})
}

// connect connects device index, which it makes if there is none. EBUSY: it is in use.
func (k *control) connect(index int, c config, fds []int) error {
	_, err := k.do(cmdConnect, func(e *netlink.AttributeEncoder) {
		e.Uint32(attrIndex, uint32(index))
		e.Uint64(attrSizeBytes, uint64(c.size))
		e.Uint64(attrBlockSize, uint64(c.block))
		e.Uint64(attrServerFlags, uint64(c.flags))
		e.Uint64(attrTimeout, c.timeout)
		e.Uint64(attrDeadConn, c.deadConn)
		e.String(attrBackend, c.backend)
		putSockets(e, fds)
	})
	if err != nil {
		return fmt.Errorf("nbd%d: connect: %w", index, err)
	}
	return nil
}

// reconnect gives a device new sockets in the place of dead ones. ENOSPC: none is dead.
func (k *control) reconnect(index int, backend string, fds []int) error {
	return k.reconfigure(index, backend, func(e *netlink.AttributeEncoder) { putSockets(e, fds) })
}

func (k *control) resize(index int, backend string, size int64) error {
	return k.reconfigure(index, backend, func(e *netlink.AttributeEncoder) { e.Uint64(attrSizeBytes, uint64(size)) })
}

// destroyAfter makes the device go with its disconnect.
func (k *control) destroyAfter(index int, backend string) error {
	return k.reconfigure(index, backend, func(e *netlink.AttributeEncoder) { e.Uint64(attrClientFlags, destroyOnDisconnect) })
}

func (k *control) reconfigure(index int, backend string, fill func(*netlink.AttributeEncoder)) error {
	_, err := k.do(cmdReconfigure, func(e *netlink.AttributeEncoder) {
		e.Uint32(attrIndex, uint32(index))
		e.String(attrBackend, backend)
		fill(e)
	})
	if err != nil {
		return fmt.Errorf("nbd%d: reconfigure: %w", index, err)
	}
	return nil
}

// disconnect ends all connections of a device, whoever uses it. What waits fails.
func (k *control) disconnect(index int) error {
	_, err := k.do(cmdDisconnect, func(e *netlink.AttributeEncoder) { e.Uint32(attrIndex, uint32(index)) })
	if err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENODEV) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("nbd%d: disconnect: %w", index, err)
	}
	return nil // EINVAL, ENODEV: it is not connected
}

// with runs fn with a connection to the driver.
func with(fn func(*control) error) error {
	k, err := openControl()
	if err != nil {
		return err
	}
	defer k.close()
	return fn(k)
}

// Available says whether devices can be exported this way on this host. The error wraps
// export.ErrUnavailable and says what is missing.
func Available() error { return with(func(*control) error { return nil }) }

func kernelName(index int) string { return "nbd" + strconv.Itoa(index) }

func nodeOf(index int) string { return "/dev/nbd" + strconv.Itoa(index) }

func sysfs(index int) string { return "/sys/block/nbd" + strconv.Itoa(index) }

// NumberOf returns the index of a node such as "/dev/nbd7".
func NumberOf(node string) (int, error) {
	s, ok := strings.CutPrefix(node, "/dev/nbd")
	n, err := strconv.Atoi(s)
	if !ok || err != nil || n < 0 {
		return 0, fmt.Errorf("%q is not an NBD device", node)
	}
	return n, nil
}

// backendOf is what the driver keeps with a connected device; "" if it is not connected.
func backendOf(index int) string {
	b, err := os.ReadFile(sysfs(index) + "/backend")
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

// isConnected reports whether somebody uses a device.
func isConnected(index int) bool {
	_, err := os.Stat(sysfs(index) + "/pid")
	return err == nil
}

// devices lists the indices of all NBD devices, connected or not.
func devices() map[int]bool {
	list, _ := os.ReadDir("/sys/block")
	set := make(map[int]bool)
	for _, e := range list {
		if n, err := NumberOf("/dev/" + e.Name()); err == nil {
			set[n] = true
		}
	}
	return set
}
