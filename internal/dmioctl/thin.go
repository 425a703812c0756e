package dmioctl

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// ThinPool describes the table of a thin pool.
type ThinPool struct {
	Metadata, Data string   // paths or major:minor
	LengthSectors  uint64   // of the pool: how much of Data is used
	BlockSectors   uint64   // 128 .. 2097152, multiple of 128
	LowWaterMark   uint64   // data blocks
	Features       []string // skip_block_zeroing, ignore_discard, no_discard_passdown, read_only, error_if_no_space
}

// Target returns the table line.
func (p ThinPool) Target() Target {
	params := fmt.Sprintf("%s %s %d %d", p.Metadata, p.Data, p.BlockSectors, p.LowWaterMark)
	if len(p.Features) > 0 {
		params += fmt.Sprintf(" %d %s", len(p.Features), strings.Join(p.Features, " "))
	}
	return Target{Length: p.LengthSectors, Type: "thin-pool", Params: params}
}

// ThinTarget returns the table line of a thin device. origin, an external origin, may be empty.
func ThinTarget(pool string, id uint32, lengthSectors uint64, origin string) Target {
	return Target{Length: lengthSectors, Type: "thin", Params: strings.TrimSpace(fmt.Sprintf("%s %d %s", pool, id, origin))}
}

// LinearTarget returns the table line that maps sectors of device from sector from on.
func LinearTarget(device string, from, lengthSectors uint64) Target {
	return Target{Length: lengthSectors, Type: "linear", Params: fmt.Sprintf("%s %d", device, from)}
}

// PoolStatus is the status line of a thin pool. Blocks are 4 KiB metadata blocks and data blocks.
type PoolStatus struct {
	Failed             bool // the line was "Fail" or "Error": nothing else is known
	TransactionID      uint64
	MetaUsed, MetaSize uint64 // used includes the kernel's reserve
	DataUsed, DataSize uint64
	HeldRoot           uint64 // 0: none
	Mode               string // rw, ro, out_of_data_space
	Discard            string // ignore_discard, discard_passdown, no_discard_passdown
	NoSpace            string // error_if_no_space, queue_if_no_space
	NeedsCheck         bool
}

// ParsePoolStatus reads the status text of a thin-pool target. Fields beyond the mode may be
// missing: older kernels print fewer.
func ParsePoolStatus(text string) (PoolStatus, error) {
	f := strings.Fields(text)
	if len(f) == 1 && (f[0] == "Fail" || f[0] == "Error") {
		return PoolStatus{Failed: true}, nil
	}
	bad := func(what string) (PoolStatus, error) {
		return PoolStatus{}, fmt.Errorf("thin-pool status %q: %s", text, what)
	}
	if len(f) < 5 {
		return bad(fmt.Sprintf("%d fields, at least 5 are needed", len(f)))
	}
	var s PoolStatus
	var err error
	if s.TransactionID, err = strconv.ParseUint(f[0], 10, 64); err != nil {
		return bad("transaction id")
	}
	if s.MetaUsed, s.MetaSize, err = parseFraction(f[1]); err != nil {
		return bad("metadata blocks")
	}
	if s.DataUsed, s.DataSize, err = parseFraction(f[2]); err != nil {
		return bad("data blocks")
	}
	if f[3] != "-" {
		if s.HeldRoot, err = strconv.ParseUint(f[3], 10, 64); err != nil {
			return bad("held root")
		}
	}
	s.Mode = f[4]
	for _, field := range f[5:] {
		switch {
		case strings.HasSuffix(field, "discard_passdown") || field == "ignore_discard":
			s.Discard = field
		case strings.HasSuffix(field, "_if_no_space"):
			s.NoSpace = field
		case field == "needs_check":
			s.NeedsCheck = true
		}
	}
	return s, nil
}

func parseFraction(s string) (a, b uint64, err error) {
	used, total, ok := strings.Cut(s, "/")
	if !ok {
		return 0, 0, fmt.Errorf("%q is no fraction", s)
	}
	if a, err = strconv.ParseUint(used, 10, 64); err != nil {
		return 0, 0, err
	}
	b, err = strconv.ParseUint(total, 10, 64)
	return a, b, err
}

// PoolStatus asks a pool for its status; the pool commits first.
func (c *Control) PoolStatus(name string) (PoolStatus, error) {
	t, err := c.Status(name, false)
	if err != nil {
		return PoolStatus{}, err
	}
	if len(t) != 1 || t[0].Type != "thin-pool" {
		return PoolStatus{}, fmt.Errorf("dm status %q: not a thin pool: %v", name, t)
	}
	return ParsePoolStatus(t[0].Params)
}

// ThinStatus asks a thin device how many sectors it maps and which is the highest one (ok is
// false if it maps none).
func (c *Control) ThinStatus(name string) (mapped, highest uint64, ok bool, err error) {
	t, err := c.Status(name, false)
	if err != nil {
		return 0, 0, false, err
	}
	if len(t) != 1 || t[0].Type != "thin" {
		return 0, 0, false, fmt.Errorf("dm status %q: not a thin device: %v", name, t)
	}
	f := strings.Fields(t[0].Params)
	if len(f) != 2 {
		return 0, 0, false, fmt.Errorf("thin status %q: %d fields, want 2", t[0].Params, len(f))
	}
	if mapped, err = strconv.ParseUint(f[0], 10, 64); err != nil {
		return 0, 0, false, fmt.Errorf("thin status %q: %w", t[0].Params, err)
	}
	if f[1] == "-" {
		return mapped, 0, false, nil
	}
	highest, err = strconv.ParseUint(f[1], 10, 64)
	return mapped, highest, err == nil, err
}

// Pool messages, spelled as the kernel spells them. Errors are EEXIST, ENODATA, EBUSY, EINVAL or,
// where the pool accepts no changes, EOPNOTSUPP. The kernel commits after each.

func (c *Control) CreateThin(pool string, id uint32) error {
	_, err := c.Message(pool, fmt.Sprintf("create_thin %d", id))
	return err
}

// CreateSnap needs the origin to be suspended if it is active; the kernel does not check that.
func (c *Control) CreateSnap(pool string, id, origin uint32) error {
	_, err := c.Message(pool, fmt.Sprintf("create_snap %d %d", id, origin))
	return err
}

func (c *Control) DeleteThin(pool string, id uint32) error {
	_, err := c.Message(pool, fmt.Sprintf("delete %d", id))
	return err
}

func (c *Control) SetTransactionID(pool string, old, next uint64) error {
	_, err := c.Message(pool, fmt.Sprintf("set_transaction_id %d %d", old, next))
	return err
}

func (c *Control) ReserveMetadataSnap(pool string) error {
	_, err := c.Message(pool, "reserve_metadata_snap")
	return err
}

func (c *Control) ReleaseMetadataSnap(pool string) error {
	_, err := c.Message(pool, "release_metadata_snap")
	return err
}

// ParsePoolTable reads the table line of a thin-pool target; devices are MAJOR:MINOR.
func ParsePoolTable(t Target) (ThinPool, error) {
	f := strings.Fields(t.Params)
	if t.Type != "thin-pool" || len(f) < 4 {
		return ThinPool{}, fmt.Errorf("table line %q of type %q is none of a thin pool", t.Params, t.Type)
	}
	p := ThinPool{Metadata: f[0], Data: f[1], LengthSectors: t.Length}
	var err error
	if p.BlockSectors, err = strconv.ParseUint(f[2], 10, 64); err == nil {
		p.LowWaterMark, err = strconv.ParseUint(f[3], 10, 64)
	}
	if err != nil {
		return ThinPool{}, fmt.Errorf("table line %q: %w", t.Params, err)
	}
	if len(f) > 5 {
		p.Features = f[5:]
	}
	return p, nil
}

// Has reports whether the pool has a feature.
func (p ThinPool) Has(feature string) bool { return slices.Contains(p.Features, feature) }
