package vm

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"

	"mica/internal/vm/wire"
)

// A monitor talks QEMU's machine protocol (QMP): JSON objects, one command at a time, events in
// between. Safe for concurrent use.
type monitor struct {
	mu   sync.Mutex
	sock *os.File // guarded by mu
	dec  *json.Decoder
	up   bool // capabilities negotiated; guarded by mu
}

func newMonitor(sock *os.File) *monitor { return &monitor{sock: sock, dec: json.NewDecoder(sock)} }

// do runs one command and waits for its answer.
func (q *monitor) do(command string, args any) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	if !q.up {
		if err := q.doLocked("qmp_capabilities", nil); err != nil {
			return err
		}
		q.up = true
	}
	return q.doLocked(command, args)
}

func (q *monitor) doLocked(command string, args any) error {
	msg := map[string]any{"execute": command}
	if args != nil {
		msg["arguments"] = args
	}
	if err := json.NewEncoder(q.sock).Encode(msg); err != nil {
		return fmt.Errorf("monitor: %s: %w", command, err)
	}
	for {
		var answer struct {
			Return json.RawMessage
			Error  *struct{ Class, Desc string }
		}
		if err := q.dec.Decode(&answer); err != nil {
			if errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			return fmt.Errorf("monitor: %s: %w", command, err)
		}
		switch {
		case answer.Error != nil:
			return fmt.Errorf("monitor: %s: %s", command, answer.Error.Desc)
		case answer.Return != nil:
			return nil
		} // else a greeting or an event
	}
}

// Resize gives a disk a new size in bytes, a multiple of 512: the file is cut or extended (it may
// have that size already), and when Resize returns the guest has seen it.
func (m *Machine) Resize(ctx context.Context, disk int, sizeBytes int64) error {
	if sizeBytes%512 != 0 || disk < 0 || disk >= m.disks {
		return fmt.Errorf("resize disk %d of %d to %d bytes: not possible", disk, m.disks, sizeBytes)
	}
	err := m.qmp.do("block_resize", map[string]any{"device": fmt.Sprintf("d%d", disk), "size": sizeBytes})
	if err != nil {
		return err
	}
	script := `for i in $(seq 500); do [ "$(cat /sys/block/$1/size)" = "$2" ] && exit 0; usleep 10000; done; exit 1`
	res, err := m.Run(ctx, wire.Command{Args: []string{"sh", "-c", script, "sh", DiskName(disk), fmt.Sprint(sizeBytes / 512)}})
	if err == nil && res.Code != 0 {
		err = fmt.Errorf("disk %s did not take its new size of %d bytes within 5 s", DiskName(disk), sizeBytes)
	}
	return err
}

// DiskName is the guest's name for disk i: vda, vdb, ...
func DiskName(i int) string { return "vd" + string(rune('a'+i)) }
