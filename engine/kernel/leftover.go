package kernel

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"golang.org/x/sys/unix"

	"mica/dev"
	"mica/engine"
	"mica/export/loop"
	"mica/internal/dmioctl"
	"mica/thin"
)

// A leftover is the node of a thin device that a predecessor made and nobody has taken over yet.
type leftover struct {
	name     string
	id       thin.DevID
	readOnly bool
	node     string
	rdev     uint64
}

func users(rdev uint64, node string) loop.UserList { return loop.UsersOf(rdev, node) }

// takeOver goes on with a pool that a predecessor left active: it lets run what was held back, and
// notes the thin devices.
func (p *Pool) takeOver(info dmioctl.Info) error {
	if info.UUID != p.name {
		return fmt.Errorf("device %s is not ours: its UUID is %q", p.name, info.UUID)
	}
	if err := p.dm.Clear(p.name); err != nil {
		return err
	}
	metaDev, dataDev, bs, err := p.liveTable()
	if err != nil {
		return err
	}
	p.bs = bs
	if err := p.checkBlockSize(bs); err != nil {
		return err
	}
	if err := p.meta.adopt(metaDev); err != nil {
		return err
	}
	if err := p.data.adopt(dataDev); err != nil {
		return err
	}
	if err := p.found(info); err != nil {
		return err
	}
	p.events.before = info.Event > 0
	if info.Suspended() {
		p.log.Warn("the pool was left suspended", "pool", p.src.String())
		if err := p.dm.Resume(p.name); err != nil {
			return err
		}
	}
	if err := p.findLeftovers(); err != nil {
		return err
	}
	p.log.Info("took over a pool that is active already", "pool", p.src.String(), "device", p.name, "thin devices", len(p.left))
	return nil
}

// liveTable reads which devices the pool's live table names.
func (p *Pool) liveTable() (metaDev, dataDev uint64, blockSize int64, err error) {
	t, err := p.dm.Table(p.name)
	if err != nil {
		return 0, 0, 0, err
	}
	if len(t) != 1 || t[0].Type != "thin-pool" {
		return 0, 0, 0, fmt.Errorf("device %s is no thin pool: %v", p.name, t)
	}
	pt, err := dmioctl.ParsePoolTable(t[0])
	if err != nil {
		return 0, 0, 0, err
	}
	p.opts.ErrorIfNoSpace = pt.Has("error_if_no_space")
	p.opts.NoDiscardPassdown = pt.Has("no_discard_passdown") || pt.Has("ignore_discard")
	p.opts.SkipBlockZeroing = pt.Has("skip_block_zeroing")
	p.opts.ReadOnly = p.opts.ReadOnly || pt.Has("read_only")
	p.opts.LowWaterMark = pt.LowWaterMark
	if metaDev, err = parseNumber(pt.Metadata); err == nil {
		dataDev, err = parseNumber(pt.Data)
	}
	return metaDev, dataDev, int64(pt.BlockSectors) * sectorSize, err
}

func parseNumber(s string) (uint64, error) {
	var major, minor uint32
	if _, err := fmt.Sscanf(s, "%d:%d", &major, &minor); err != nil {
		return 0, fmt.Errorf("device %q: want MAJOR:MINOR", s)
	}
	return unix.Mkdev(major, minor), nil
}

// findLeftovers notes the nodes of thin devices that are there, and lets those run that were left
// suspended.
func (p *Pool) findLeftovers() error {
	list, err := p.dm.List()
	if err != nil {
		return err
	}
	for name := range list {
		id, ro, ok := parseThinName(p.id, name)
		if !ok {
			continue
		}
		info, err := p.dm.Info(name)
		if errors.Is(err, unix.ENXIO) {
			continue
		}
		if err != nil {
			return err
		}
		if info.UUID != name {
			p.log.Warn("a device with a name of ours that is not ours is left alone", "device", name, "uuid", info.UUID)
			continue
		}
		if !info.Live() { // never had a table
			if err := p.dm.Remove(name, false); err != nil && !errors.Is(err, unix.ENXIO) {
				return err
			}
			continue
		}
		if err := p.dm.Clear(name); err != nil {
			return err
		}
		if info.Suspended() {
			if err := p.dm.Resume(name); err != nil {
				return fmt.Errorf("resume thin device %d, which was left suspended: %w", id, err)
			}
		}
		p.left[name] = &leftover{name, id, ro, info.Node(), info.Dev}
	}
	return nil
}

// takeLeftover hands a leftover over to who asks for it by name.
func (p *Pool) takeLeftover(name string) *leftover {
	p.mu.Lock()
	defer p.mu.Unlock()
	l := p.left[name]
	delete(p.left, name)
	return l
}

// dropLeftovers removes the leftover nodes of a thin device. ErrInUse names who has one open.
func (p *Pool) dropLeftovers(ctx context.Context, id thin.DevID) error {
	p.mu.Lock()
	var mine []*leftover
	for _, l := range p.left {
		if l.id == id {
			mine = append(mine, l)
		}
	}
	p.mu.Unlock()
	for _, l := range mine {
		if err := p.removeNode(ctx, l.name, l.rdev, l.node); err != nil {
			return err
		}
		p.takeLeftover(l.name)
	}
	return nil
}

// removeNode removes a thin device's node. ErrInUse names who has it open.
func (p *Pool) removeNode(ctx context.Context, name string, rdev uint64, node string) error {
	err := p.dm.Remove(name, false)
	if errors.Is(err, unix.EBUSY) && !settled(users(rdev, node)) {
		err = removePatiently(ctx, p.dm, name)
	}
	switch {
	case errors.Is(err, unix.EBUSY):
		who := usersOf(rdev, node)
		if who == "" {
			who = "by a process that cannot be seen from here"
		}
		return fmt.Errorf("%s is open: %s: %w", node, who, engine.ErrInUse)
	case errors.Is(err, unix.ENXIO):
		return nil
	}
	return err
}

// settled: a mount or a stacked device does not go away by itself.
func settled(list loop.UserList) bool {
	for _, u := range list {
		if u.Mount != "" && u.PID == 0 || u.Holder != "" || u.Swap {
			return true
		}
	}
	return false
}

// Sweep removes the nodes that a predecessor left and nobody took over, where nobody has them
// open, and returns the paths of those that are in use. Call it when everything that is wanted has
// been opened.
func (p *Pool) Sweep() []string { return p.sweep() }

func (p *Pool) sweep() (busy []string) {
	p.mu.Lock()
	list := make([]*leftover, 0, len(p.left))
	for _, l := range p.left {
		list = append(list, l)
	}
	p.mu.Unlock()
	for _, l := range list {
		unlock := p.names.lock(l.id)
		p.mu.Lock()
		still := p.left[l.name] == l
		p.mu.Unlock()
		if still {
			if err := p.dm.Remove(l.name, false); err == nil || errors.Is(err, unix.ENXIO) {
				p.takeLeftover(l.name)
			} else {
				busy = append(busy, l.node)
			}
		}
		unlock()
	}
	return busy
}

// attachNamed uses an active thin pool that somebody else has made.
func (p *Pool) attachNamed(ctx context.Context) error {
	info, id, err := identityOfActive(p.dm, p.src.Pool)
	if err != nil {
		return err
	}
	p.name, p.id = info.Name, id
	if err := p.refuseLVM(info); err != nil {
		return err
	}
	if strings.HasPrefix(info.UUID, prefix) {
		return fmt.Errorf("device %q is a pool that mica itself has activated: name its directory or its devices", p.name)
	}
	metaDev, _, bs, err := p.liveTable()
	if err != nil {
		return err
	}
	p.bs = bs
	if err := p.checkBlockSize(bs); err != nil {
		return err
	}
	if err := p.found(info); err != nil {
		return err
	}
	lock, err := openMedium(ctx, p.node, true, p.opts.LockWait, p.src)
	if err != nil {
		return err
	}
	p.data = lock // only for its lock
	if info.Suspended() {
		return fmt.Errorf("device %q is suspended: resume it first", p.name)
	}
	node, err := nodeOf(metaDev)
	if err != nil {
		return err
	}
	if p.metaDev, err = openDirect(node, true); err != nil {
		return err
	}
	return p.findLeftovers()
}

// identityOfActive looks at an active pool and makes the POOL part of names from what it is.
func identityOfActive(dm *dmioctl.Control, pool string) (info dmioctl.Info, id string, err error) {
	name, err := deviceName(dm, pool)
	if err != nil {
		return info, "", err
	}
	info, err = dm.Info(name)
	switch {
	case errors.Is(err, unix.ENXIO):
		return info, "", fmt.Errorf("there is no device-mapper device %q: activate it first", name)
	case err != nil:
		return info, "", err
	case info.UUID != "":
		return info, identity("dm " + info.UUID), nil
	}
	return info, identity("dm", info.Dev), nil
}

// deviceName turns a name or a path below /dev into a device-mapper name.
func deviceName(dm *dmioctl.Control, s string) (string, error) {
	if !strings.HasPrefix(s, "/") {
		return s, nil
	}
	var st unix.Stat_t
	if err := unix.Stat(s, &st); err != nil {
		return "", fmt.Errorf("%s: %w", s, err)
	}
	list, err := dm.List()
	if err != nil {
		return "", err
	}
	for name, d := range list {
		if st.Mode&unix.S_IFMT == unix.S_IFBLK && d == st.Rdev {
			return name, nil
		}
	}
	return "", fmt.Errorf("%s is no device-mapper device", s)
}

// refuseLVM refuses a pool in which LVM holds thin volumes: it would find its own record of them
// wrong. LVM puts such a pool below a device of its own and adds -tpool to its name. Where its
// volumes are not active only LVM itself knows of them: callers who have its tools ask it.
func (p *Pool) refuseLVM(info dmioctl.Info) error {
	refuse := func(why string) error {
		return fmt.Errorf("%w: %q is managed by LVM, which has thin volumes in it (%s): make a thin pool of its own for mica", ErrForeign, info.Name, why)
	}
	if strings.HasPrefix(info.UUID, "LVM-") && strings.HasSuffix(info.Name, "-tpool") {
		return refuse("its name ends in -tpool")
	}
	list, err := p.dm.List()
	if err != nil {
		return err
	}
	for name := range list {
		other, err := p.dm.Info(name)
		if err != nil || !strings.HasPrefix(other.UUID, "LVM-") || other.Dev == info.Dev {
			continue
		}
		table, err := p.dm.Table(name)
		if err != nil || len(table) != 1 || table[0].Type != "thin" {
			continue
		}
		if on, _, _ := strings.Cut(table[0].Params, " "); on == number(info.Dev) {
			return refuse(name)
		}
	}
	table, err := p.dm.Table(info.Name)
	if err != nil {
		return err
	}
	if strings.HasPrefix(info.UUID, "LVM-") && len(table) == 1 && table[0].Type == "linear" {
		return refuse("it is a layer above the pool")
	}
	return nil
}

// nodeOf finds the node of a block device by its number.
func nodeOf(rdev uint64) (string, error) {
	b, err := readUevent(rdev)
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(b) {
		if name, ok := strings.CutPrefix(strings.TrimSpace(line), "DEVNAME="); ok {
			node := "/dev/" + name
			return node, ensureNode(node, rdev)
		}
	}
	return "", fmt.Errorf("block device %s: %w", number(rdev), dev.ErrClosed)
}
