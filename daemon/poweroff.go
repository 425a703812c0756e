package daemon

import (
	"bytes"
	"context"
	"os"
	"strings"
	"time"

	"mica/layer"
)

// How often the end of the host is looked for, and then what is still mounted.
const (
	watchHost  = 250 * time.Millisecond
	watchMount = 100 * time.Millisecond
)

// hostEnds tells whether the host is in the last part of a shutdown: process 1 has become the program
// that kills what is left and unmounts everything.
func hostEnds() bool {
	b, err := os.ReadFile("/proc/1/comm")
	return err == nil && bytes.HasPrefix(b, []byte("systemd-shutdow")) // cut to 15 characters
}

// watchHostEnd waits for the end of the host. The file systems of containers are unmounted after all
// other processes were killed, and cannot be without this one: it goes on serving (started with an
// "@" before its name, it is not killed) until the last node is free, and then ends in order, so that
// the pool commits and its own file system can be unmounted.
func (d *daemon) watchHostEnd(ends func() bool) {
	tick := time.NewTicker(watchHost)
	defer tick.Stop()
	for !ends() {
		select {
		case <-tick.C:
		case <-d.ctx.Done():
			return
		}
	}
	d.log.Warn("the host is shutting down: serving until the last node is free")
	d.server.closing.Store(true)
	for d.detachIdle() > 0 {
		t := time.NewTimer(watchMount)
		select {
		case <-t.C:
		case <-d.ctx.Done():
			t.Stop()
			return
		}
	}
	d.log.Info("the last node is free")
	d.once.Do(func() { close(d.quit) })
}

// detachIdle detaches what nobody uses any more and returns how many nodes are left.
func (d *daemon) detachIdle() int {
	ctx, cancel := context.WithTimeout(d.ctx, 5*time.Second)
	defer cancel()
	list, err := d.store.Containers(ctx, layer.Filter{Owner: "*"})
	if err == nil {
		for _, c := range list {
			if c.Attachment != nil && c.Attachment.Node != "" && !strings.Contains(c.Name, "/") {
				d.store.Detach(ctx, c.Name, layer.DetachOptions{})
			}
		}
		_, err = d.store.DetachSnaps(ctx)
	}
	if err != nil {
		d.log.Warn("detach at the end of the host", "error", err)
	}
	st, err := d.store.Status(ctx)
	if err != nil {
		return 1
	}
	return st.Attached
}

// logHolders says who uses the nodes that stay behind when the daemon ends: their I/O waits for the
// next start.
func (d *daemon) logHolders() {
	if d.store == nil {
		return
	}
	say := func(object, node string) {
		if users := nodeUsers(node); len(users) > 0 {
			d.log.Warn("stays, and waits for the next start of the daemon", "object", object, "node", node, "users", strings.Join(users, "; "))
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	list, err := d.store.Containers(ctx, layer.Filter{})
	if err != nil {
		return
	}
	for _, c := range list {
		if c.Attachment != nil && c.Attachment.Node != "" {
			say("container/"+c.Name, c.Attachment.Node)
		}
	}
	for _, n := range d.store.SnapNodes() {
		say(n.Object, n.Node)
	}
}
