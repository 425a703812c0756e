package fuse

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"

	"mica/export/holder"

	"golang.org/x/sys/unix"
)

// heldPrefix begins the names of our descriptors in the holder, which may keep others too.
const heldPrefix = "fuse/"

// A keeper is the exporter's side of the holder. It remembers what it put, and if the holder
// dies it starts another and puts everything there again (watch).
type keeper struct {
	socket string
	argv   []string
	log    *slog.Logger
	ctx    context.Context // ends with close
	cancel context.CancelFunc
	wg     sync.WaitGroup // watch

	mu   sync.Mutex
	c    *holder.Client  // guarded by mu
	held map[string]held // guarded by mu; what this process put
}

type held struct {
	fd  int // the attachment's; valid until drop
	rec record
}

func newKeeper(o *Options) (*keeper, error) {
	k := &keeper{socket: o.HolderSocket, argv: o.HolderCommand, log: o.Logger, held: make(map[string]held)}
	k.ctx, k.cancel = context.WithCancel(context.Background())
	var err error
	if k.c, err = holder.Connect(k.ctx, k.socket, k.argv...); err != nil {
		k.cancel()
		return nil, err
	}
	k.wg.Add(1)
	go k.watch()
	return k, nil
}

// watch replaces a holder that ended.
func (k *keeper) watch() {
	defer k.wg.Done()
	for pause := 50 * time.Millisecond; ; {
		k.mu.Lock()
		gone := k.c.Gone()
		k.mu.Unlock()
		select {
		case <-k.ctx.Done():
			return
		case <-gone:
		}
		err := k.replace()
		if err == nil {
			k.log.Warn("holder ended; another one took its place")
			pause = 50 * time.Millisecond
			continue
		}
		if k.ctx.Err() != nil {
			return
		}
		k.log.Error("holder ended and cannot be replaced; a death of this process would now be an I/O error", "error", err)
		t := time.NewTimer(pause)
		select {
		case <-k.ctx.Done():
			t.Stop()
			return
		case <-t.C:
			pause = min(2*pause, 10*time.Second)
		}
	}
}

func (k *keeper) replace() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.replaceLocked()
}

// replaceLocked connects to a holder, a new one if there is none, and puts everything there. If
// the connection in use is alive, it does nothing.
func (k *keeper) replaceLocked() error {
	select {
	case <-k.c.Gone():
	default:
		return nil
	}
	if k.ctx.Err() != nil {
		return k.ctx.Err()
	}
	c, err := holder.Connect(k.ctx, k.socket, k.argv...)
	if err != nil {
		return err
	}
	for name, h := range k.held {
		if err := c.Put(heldPrefix+name, h.rec.json(), h.fd); err != nil {
			c.Close()
			return err
		}
	}
	k.c.Close()
	k.c = c
	return nil
}

// put gives a connection to the holder, or changes its record.
func (k *keeper) put(name string, r record, fd int) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.held[name] = held{fd: fd, rec: r}
	err := k.c.Put(heldPrefix+name, r.json(), fd)
	if errors.Is(err, holder.ErrGone) {
		return nil // watch puts it
	}
	if err != nil {
		delete(k.held, name)
	}
	return err
}

// set changes the record of a connection.
func (k *keeper) set(name string, r record) error {
	return k.change(name, r, (*holder.Client).SetBlob)
}

// settle is set when an attach is done, without a wait for the holder.
func (k *keeper) settle(name string, r record) error {
	return k.change(name, r, func(c *holder.Client, name string, blob json.RawMessage) error {
		return c.SetBlobSoon(name, blob, func(err error) {
			if !errors.Is(err, holder.ErrGone) && !errors.Is(err, holder.ErrNotFound) { // else watch puts it, or it was dropped
				k.log.Error("the holder keeps an old record; a death of this process would end the device", "name", name, "error", err)
			}
		})
	})
}

func (k *keeper) change(name string, r record, send func(*holder.Client, string, json.RawMessage) error) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	h, ok := k.held[name]
	if !ok {
		return fmt.Errorf("%q: %w", name, holder.ErrNotFound)
	}
	h.rec = r
	k.held[name] = h
	err := send(k.c, heldPrefix+name, r.json())
	if errors.Is(err, holder.ErrGone) {
		return nil // watch puts it
	}
	return err
}

// leave makes sure that the holder has a connection, whose descriptor this process is about to
// close.
func (k *keeper) leave(name string, r record, fd int) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	err := k.c.Put(heldPrefix+name, r.json(), fd)
	for tries := 0; errors.Is(err, holder.ErrGone) && tries < 3; tries++ {
		<-k.c.Gone()
		if err = k.replaceLocked(); err == nil {
			err = k.c.Put(heldPrefix+name, r.json(), fd)
		}
	}
	delete(k.held, name)
	return err
}

// drop makes the holder close its copy. It is fine if it has none.
func (k *keeper) drop(name string) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	delete(k.held, name)
	err := k.c.Drop(heldPrefix + name)
	if errors.Is(err, holder.ErrNotFound) || errors.Is(err, holder.ErrGone) {
		return nil
	}
	return err
}

// record returns what the holder has under a name.
func (k *keeper) record(name string) (record, error) {
	fd, r, err := k.get(name)
	if err == nil {
		unix.Close(fd)
	}
	return r, err
}

func (k *keeper) get(name string) (int, record, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	fd, blob, err := k.c.Get(heldPrefix + name)
	if err != nil {
		return -1, record{}, err
	}
	var r record
	if err := json.Unmarshal(blob, &r); err != nil || r.Version != recordVersion {
		unix.Close(fd)
		return -1, record{}, fmt.Errorf("holder's record of %q: version %d, want %d: %w", name, r.Version, recordVersion, errors.Join(err, errRecord))
	}
	return fd, r, nil
}

var errRecord = errors.New("unknown record")

// list returns all records by name. Records that cannot be read are listed too, as zero.
func (k *keeper) list() (map[string]record, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	entries, err := k.c.List()
	if err != nil {
		return nil, err
	}
	all := make(map[string]record)
	for _, en := range entries {
		name, ok := strings.CutPrefix(en.Name, heldPrefix)
		if !ok {
			continue
		}
		var r record
		if json.Unmarshal(en.Blob, &r) != nil || r.Version != recordVersion {
			r = record{}
		}
		all[name] = r
	}
	return all, nil
}

func (k *keeper) close() {
	k.cancel()
	k.mu.Lock()
	k.c.Close()
	k.mu.Unlock()
	k.wg.Wait()
}
