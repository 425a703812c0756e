package kernel

import (
	"context"
	"os"
	"path/filepath"

	"mica/engine"
	"mica/thin"
)

// Status looks at a pool as the kernel counts it now, its open transaction included. Nothing is
// committed for it.
func (p *Pool) Status(ctx context.Context) (engine.Status, error) {
	st, err := p.poolStatus(true)
	if err != nil {
		return engine.Status{}, err
	}
	s := engine.Status{
		Engine: "kernel", Mode: st.Mode, NeedsCheck: st.NeedsCheck, BlockSize: p.bs,
		DataBlocks: st.DataSize, DataUsed: st.DataUsed, MetaBlocks: st.MetaSize,
		TransactionID: st.TransactionID, HeldRoot: st.HeldRoot, Devices: int(p.devices.Load()),
		LowWaterMark: p.opts.LowWaterMark, ErrorIfNoSpace: p.opts.ErrorIfNoSpace, HostBytes: p.data.hostBytes(),
	}
	// The kernel counts its reserve as used.
	if reserve := min(4096, st.MetaSize/10); st.MetaUsed > reserve {
		s.MetaUsed = st.MetaUsed - reserve
	}
	switch {
	case st.Failed:
		s.Mode, s.FailReason = engine.ModeFail.String(), p.writable().Error()
		last := p.events.lastGood()
		s.DataBlocks, s.DataUsed, s.MetaBlocks, s.TransactionID = last.DataSize, last.DataUsed, last.MetaSize, last.TransactionID
	case st.NeedsCheck:
		s.FailReason = p.writable().Error()
	}
	if sb, err := p.readSuperblock(); err == nil {
		s.Time = sb.Time
	}
	return s, nil
}

// readSuperblock reads the committed superblock beside the kernel.
func (p *Pool) readSuperblock() (thin.Superblock, error) {
	var err error
	for range quietTries {
		var buf []byte
		if buf, err = p.superblockBytes(); err != nil {
			return thin.Superblock{}, err
		}
		sb := thin.DecodeSuperblock(buf)
		if err = sb.Validate(true); err == nil {
			return sb, nil
		}
	}
	return thin.Superblock{}, err
}

func (p *Pool) superblockBytes() ([]byte, error) {
	buf := aligned(metaBlock)
	_, err := p.metaDev.ReadAt(buf, 0)
	return buf, err
}

// readUevent is what sysfs says about a block device.
func readUevent(rdev uint64) (string, error) {
	b, err := os.ReadFile(filepath.Join("/sys/dev/block", number(rdev), "uevent"))
	return string(b), err
}
