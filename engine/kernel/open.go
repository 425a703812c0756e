package kernel

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"mica/dev"
	"mica/engine"
	"mica/internal/dmioctl"
	"mica/journal"
	"mica/thin"
)

// Available says whether this host can run the engine: device-mapper and the target thin-pool. A
// missing module is loaded, once, if modprobe can.
func Available() error {
	dm, err := openControl()
	if err != nil {
		return err
	}
	return dm.Close()
}

// targets are what the engine needs of device-mapper.
var targets = []string{"thin-pool", "thin"}

// openControl opens device-mapper and sees to it that the targets are there.
func openControl() (*dmioctl.Control, error) {
	dm, err := dmioctl.Open()
	if isAny(err, unix.ENOENT, unix.ENODEV, unix.ENXIO) {
		modprobe("dm-mod")
		dm, err = dmioctl.Open()
	}
	if err != nil {
		return nil, fmt.Errorf("%w: no device-mapper (%w): load the module dm_mod, or use the user engine", ErrUnavailable, err)
	}
	for _, target := range targets {
		_, _, _, err := dm.TargetVersion(target)
		if errors.Is(err, unix.EINVAL) {
			modprobe("dm-thin-pool")
			_, _, _, err = dm.TargetVersion(target)
		}
		if err != nil {
			dm.Close()
			return nil, fmt.Errorf("%w: no target %s (%w): load the module dm_thin_pool, or use the user engine", ErrUnavailable, target, err)
		}
	}
	return dm, nil
}

func modprobe(module string) { _ = exec.Command("modprobe", "-q", module).Run() }

func isAny(err error, list ...error) bool {
	for _, e := range list {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// Open activates a pool under its locks, or takes over what a predecessor left active. It waits
// for a predecessor that is about to die; who is refused in the end gets dev.ErrLocked, and the
// error names the holder. On an error the pool is as it was.
func Open(ctx context.Context, src Source, o Options) (*Pool, error) {
	p, err := open(ctx, src, o)
	if err != nil {
		return nil, fmt.Errorf("open pool %s: %w", src, err)
	}
	return p, nil
}

func open(ctx context.Context, src Source, o Options) (_ *Pool, err error) {
	if err := src.check(); err != nil {
		return nil, err
	}
	if o.LockWait == 0 {
		o.LockWait = 10 * time.Second
	}
	if o.Logger == nil {
		o.Logger = slog.Default()
	}
	p := &Pool{src: src, opts: o, log: o.Logger, stop: make(chan struct{}),
		open: map[thin.DevID]*handles{}, left: map[string]*leftover{}}
	if p.dm, err = openControl(); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			p.metaDev.closeIf()
			p.data.close()
			p.meta.close()
			p.dm.Close()
		}
	}()
	if src.Pool != "" {
		err = p.attachNamed(ctx)
	} else {
		err = p.attachOwn(ctx)
	}
	if err != nil {
		return nil, err
	}
	if err := p.begin(ctx); err != nil {
		if p.ours && len(p.left) == 0 {
			err = errors.Join(err, p.deactivate(ctx))
		}
		return nil, err
	}
	return p, nil
}

func (d *direct) closeIf() {
	if d != nil {
		d.Close()
	}
}

// attachOwn locks the pool's devices and activates the pool, or takes over an active one of ours.
func (p *Pool) attachOwn(ctx context.Context) (err error) {
	p.ours = true
	// Metadata first: two openers meet at the same lock.
	if p.meta, err = openMedium(ctx, p.src.metadataPath(), p.opts.ReadOnly, p.opts.LockWait, p.src); err != nil {
		return err
	}
	if p.data, err = openMedium(ctx, p.src.dataPath(), p.opts.ReadOnly, p.opts.LockWait, p.src); err != nil {
		return err
	}
	if p.id, err = identityOf(p.meta.path); err != nil {
		return err
	}
	p.name = poolName(p.id)
	info, err := p.dm.Info(p.name)
	switch {
	case errors.Is(err, unix.ENXIO):
		return p.activate(ctx)
	case err != nil:
		return err
	case !info.Live():
		// A predecessor died between making the device and giving it a table.
		if err := removePatiently(ctx, p.dm, p.name); err != nil {
			return fmt.Errorf("clear away a device without a table: %w", err)
		}
		return p.activate(ctx)
	}
	return p.takeOver(info)
}

// superblock reads the closed pool's superblock and checks whether the kernel will take it.
func (p *Pool) superblock() (thin.Superblock, error) {
	d, err := dev.Open(p.meta.path, dev.OpenOptions{ReadOnly: true})
	if err != nil {
		return thin.Superblock{}, err
	}
	defer d.Close()
	v, err := thin.OpenView(d)
	if err != nil {
		return thin.Superblock{}, err
	}
	sb := v.Superblock()
	if err := p.checkBlockSize(v.DataBlockSize()); err != nil {
		return sb, err
	}
	have, err := p.data.size()
	if err == nil && uint64(have/v.DataBlockSize()) < sb.DataMap.NrBlocks {
		err = fmt.Errorf("data device %s of %d bytes is too short: the pool has %d blocks of %d bytes",
			p.data.path, have, sb.DataMap.NrBlocks, v.DataBlockSize())
	}
	return sb, err
}

func (p *Pool) checkBlockSize(have int64) error {
	if want := p.opts.BlockSize; want != 0 && want != have {
		return fmt.Errorf("the pool has data blocks of %d bytes, not of %d: a pool keeps the block size that it was made with", have, want)
	}
	return nil
}

// activate makes the pool's device.
func (p *Pool) activate(ctx context.Context) (err error) {
	if err := p.noJournal(); err != nil {
		return err
	}
	for _, m := range []*medium{p.meta, p.data} {
		if m.isFile() {
			continue
		}
		if err := free(m); err != nil {
			return err
		}
	}
	sb, err := p.superblock()
	if err != nil {
		return err
	}
	p.bs = int64(sb.DataBlockSize) * sectorSize
	defer func() {
		if err != nil {
			err = errors.Join(err, p.data.detach(ctx), p.meta.detach(ctx))
		}
	}()
	for _, m := range []*medium{p.meta, p.data} {
		if err := m.attach(ctx, p.opts.ReadOnly); err != nil {
			return err
		}
	}
	info, err := p.dm.Activate(p.name, p.name, false, p.table(sb.DataMap.NrBlocks))
	if err != nil {
		return p.refused(err)
	}
	if err := p.found(info); err != nil {
		return errors.Join(err, removePatiently(ctx, p.dm, p.name))
	}
	return nil
}

// noJournal refuses a pool for which a journal of the user engine waits: what was acknowledged
// before its process was killed would be lost. Nor one of which it has left devices to a successor.
func (p *Pool) noJournal() error {
	if p.opts.ReadOnly {
		return nil
	}
	id, err := journal.Identify(p.meta.path)
	if err == nil {
		err = journal.RefuseExported(id, journal.Options{}, "")
	}
	if err != nil {
		return err
	}
	w, err := journal.WaitingFor(p.meta.path, journal.Options{})
	switch {
	case err != nil:
		return fmt.Errorf("look for a journal of the user engine: %w", err)
	case w == nil:
		return nil
	case w.Entries > 0:
		return fmt.Errorf("%w: %s has %d changes that the pool lacks: open it once with the user engine, which takes them over", ErrJournal, w.Path, w.Entries)
	}
	p.log.Error("a journal of the user engine cannot be taken over any more", "journal", w.Path, "reason", w.Why)
	return nil
}

// free says who holds a block device that the kernel would refuse to share.
func free(m *medium) error {
	d, err := dev.OpenBlock(m.path, dev.OpenOptions{ReadOnly: true, Lock: false})
	if err != nil {
		return err
	}
	d.Close()
	fd, err := unix.Open(m.path, unix.O_RDONLY|unix.O_EXCL|unix.O_CLOEXEC, 0)
	if err == nil {
		return unix.Close(fd)
	}
	if !errors.Is(err, unix.EBUSY) {
		return &os.PathError{Op: "open", Path: m.path, Err: err}
	}
	if users := usersOf(m.rdev, m.path); users != "" {
		return fmt.Errorf("%w: %s: unmount it or take it out of what uses it", &dev.LockedError{Path: m.path, By: users}, m.path)
	}
	return &dev.LockedError{Path: m.path}
}

// table is the pool's table line with so many data blocks.
func (p *Pool) table(dataBlocks uint64) dmioctl.Target {
	t := dmioctl.ThinPool{
		Metadata: number(p.meta.rdev), Data: number(p.data.rdev),
		LengthSectors: dataBlocks * uint64(p.bs/sectorSize),
		BlockSectors:  uint64(p.bs / sectorSize),
		LowWaterMark:  p.opts.LowWaterMark,
	}
	for _, f := range []struct {
		on   bool
		name string
	}{
		{p.opts.SkipBlockZeroing, "skip_block_zeroing"}, {p.opts.NoDiscardPassdown, "no_discard_passdown"},
		{p.opts.ReadOnly, "read_only"}, {p.opts.ErrorIfNoSpace, "error_if_no_space"},
	} {
		if f.on {
			t.Features = append(t.Features, f.name)
		}
	}
	return t.Target()
}

// refused explains a table that the kernel did not take. It says why in its log only.
func (p *Pool) refused(err error) error {
	switch {
	case errors.Is(err, unix.EBUSY):
		return fmt.Errorf("%w: %s or %s is used by another device, or mounted: %w", engine.ErrInUse, p.data.path, p.meta.path, err)
	case isAny(err, unix.EILSEQ, unix.ENOTBLK):
		return fmt.Errorf("the kernel finds the metadata damaged (check it with 'mica pool check', then 'mica pool repair'): %w", err)
	}
	return fmt.Errorf("the kernel refuses the table of the pool (its log, dmesg, says why): %w", err)
}

// found notes the pool's device.
func (p *Pool) found(info dmioctl.Info) error {
	p.node, p.num = info.Node(), number(info.Dev)
	return ensureNode(p.node, info.Dev)
}

// ensureNode makes a device file where devtmpfs does not (in a container's /dev).
func ensureNode(path string, rdev uint64) error {
	var st unix.Stat_t
	err := unix.Stat(path, &st)
	if err == nil && st.Mode&unix.S_IFMT == unix.S_IFBLK && st.Rdev == rdev {
		return nil
	}
	if err == nil {
		return fmt.Errorf("%s is not block device %s", path, number(rdev))
	}
	if err := unix.Mknod(path, unix.S_IFBLK|0o600, int(rdev)); err != nil && err != unix.EEXIST {
		return fmt.Errorf("%s is missing and cannot be made: %w", path, err)
	}
	return nil
}

// begin looks at the pool that is active now, and starts what runs beside it.
func (p *Pool) begin(ctx context.Context) error {
	st, err := p.poolStatus(true)
	if err != nil {
		return err
	}
	if st.Failed {
		return fmt.Errorf("%w: the kernel has put the pool into mode Fail: "+
			"unmount what uses it, deactivate it and check its metadata with 'mica pool check'", engine.ErrFailed)
	}
	if p.metaDev == nil {
		if p.metaDev, err = openDirect(p.meta.node, true); err != nil {
			return err
		}
	}
	if p.ours && st.HeldRoot != 0 && st.Mode != "ro" {
		// Only this engine holds one in its own pools, and only while somebody reads.
		p.log.Warn("release the metadata snapshot that a predecessor left", "pool", p.src.String(), "block", st.HeldRoot)
		if err := p.dm.ReleaseMetadataSnap(p.name); err != nil {
			return fmt.Errorf("release a metadata snapshot that was left: %w", err)
		}
	}
	devs, err := p.Devices(ctx)
	if err != nil {
		return err
	}
	p.devices.Store(int64(len(devs)))
	if p.src.Pool != "" && len(devs) > 0 && !p.opts.Adopt {
		return fmt.Errorf("%w: it has %d thin devices already; to use it all the same and leave those alone, adopt it (--adopt)", ErrForeign, len(devs))
	}
	return p.start()
}

// usersOf says who uses a block device, empty if nobody can be seen.
func usersOf(rdev uint64, node string) string {
	var list []string
	for _, u := range users(rdev, node) {
		list = append(list, u.String())
	}
	return strings.Join(list, "; ")
}
