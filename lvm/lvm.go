// Package lvm sets up the storage of a pool with the LVM tools: from one or more empty block
// devices to a thin pool that LVM activates at boot, extends and reports, and in which mica keeps
// its thin devices. It is what Docker's dm.directlvm_device was, with the same defaults.
//
// LVM holds no thin volumes in such a pool: all thin devices in it are mica's, which LVM leaves
// alone. lvmthin(7) describes the parts: a data volume, a metadata volume, a spare of the latter,
// and a profile with the thresholds of automatic extension.
//
// All functions run lvm's commands with a time limit and without a shell. They are not safe for
// concurrent use on the same volume group.
package lvm

import (
	"errors"
	"fmt"
	"path/filepath"
	"regexp"
	"slices"
)

// Conditions that callers branch on.
var (
	// ErrNoTools: the LVM tools are not installed.
	ErrNoTools = errors.New("the LVM tools are missing: install the package lvm2")
	// ErrExists: a volume group of that name is there, and was not made from this configuration.
	ErrExists = errors.New("volume group exists")
	// ErrChanged: the configuration differs from that with which the pool was made.
	ErrChanged = errors.New("the storage was set up with other values, which cannot be changed later")
	// ErrBusy: a device is mounted, swapped to, or part of something else.
	ErrBusy = errors.New("device is in use")
	// ErrNoRoom: the volume group is used up.
	ErrNoRoom = errors.New("volume group has no room left")
	// ErrNotFound: there is no such thin pool.
	ErrNotFound = errors.New("no such thin pool")
)

// Config says what the pool is made from. It is stored beside the pool, because later starts must
// say the same.
type Config struct {
	// Devices are block devices, as absolute paths; all of each is used.
	Devices []string `json:"devices"`
	// VolumeGroup and Pool are the names that LVM shows; device-mapper calls the pool
	// VolumeGroup-Pool.
	VolumeGroup string `json:"volume_group"`
	Pool        string `json:"pool"`
	// DataPercent and MetadataPercent are parts of the volume group. Together with the spare of
	// the metadata they may not be more than 100.
	DataPercent     int `json:"data_percent"`
	MetadataPercent int `json:"metadata_percent"`
	// ExtendThreshold is the used part of the pool, in percent, at which it is extended (100:
	// never), ExtendPercent by how much of its size.
	ExtendThreshold int `json:"extend_threshold"`
	ExtendPercent   int `json:"extend_percent"`
	// BlockSize of the pool in bytes, a multiple of 64 KiB up to 1 GiB.
	BlockSize int64 `json:"block_size"`
	// Force takes devices that carry a signature. What they hold is lost.
	Force bool `json:"-"`
}

// Defaults are those of the old driver, with mica's block size.
func Defaults() Config {
	return Config{
		VolumeGroup: "mica", Pool: "thinpool",
		DataPercent: 95, MetadataPercent: 1, ExtendThreshold: 80, ExtendPercent: 20,
		BlockSize: 64 << 10,
	}
}

// name is what lvm(8) allows in names, without what it reserves and without a leading hyphen.
var name = regexp.MustCompile(`^[a-zA-Z0-9_.+][a-zA-Z0-9_.+-]{0,63}$`)

// Validate names the first value that cannot be used.
func (c Config) Validate() error {
	if len(c.Devices) == 0 {
		return errors.New("no device: want at least one empty block device")
	}
	for i, d := range c.Devices {
		if !filepath.IsAbs(d) || filepath.Clean(d) != d {
			return fmt.Errorf("device %q is not an absolute path", d)
		}
		if slices.Contains(c.Devices[:i], d) {
			return fmt.Errorf("device %s is named twice", d)
		}
	}
	for _, n := range []struct{ what, name string }{{"volume group", c.VolumeGroup}, {"thin pool", c.Pool}} {
		if !name.MatchString(n.name) || n.name == "." || n.name == ".." {
			return fmt.Errorf("%s %q: want 1 to 64 letters, digits and _ . + -, not beginning with -", n.what, n.name)
		}
	}
	for _, p := range []struct {
		what     string
		n        int
		min, max int
	}{
		{"data", c.DataPercent, 1, 100}, {"metadata", c.MetadataPercent, 1, 50},
		{"threshold of the extension", c.ExtendThreshold, 1, 100}, {"step of the extension", c.ExtendPercent, 0, 100},
	} {
		if p.n < p.min || p.n > p.max {
			return fmt.Errorf("%s: %d %% is not from %d to %d", p.what, p.n, p.min, p.max)
		}
	}
	if sum := c.DataPercent + 2*c.MetadataPercent; sum > 100 {
		return fmt.Errorf("%d %% data and twice %d %% metadata (one is LVM's spare) are %d %%, more than there is",
			c.DataPercent, c.MetadataPercent, sum)
	}
	if c.ExtendThreshold < 100 && c.ExtendPercent == 0 {
		return errors.New("extension by 0 %: want 1 to 100, or a threshold of 100 for none")
	}
	const minBlock, maxBlock = 64 << 10, 1 << 30
	if c.BlockSize < minBlock || c.BlockSize > maxBlock || c.BlockSize%minBlock != 0 {
		return fmt.Errorf("block size %d is not a multiple of 64K from 64K to 1G", c.BlockSize)
	}
	return nil
}

// FullName is the pool as LVM's commands take it, VG/LV.
func (c Config) FullName() string { return c.VolumeGroup + "/" + c.Pool }

// DMName is the pool's name in device-mapper: hyphens within names are doubled.
func (c Config) DMName() string { return escape(c.VolumeGroup) + "-" + escape(c.Pool) }

func escape(s string) string {
	out := make([]byte, 0, len(s))
	for i := range len(s) {
		if s[i] == '-' {
			out = append(out, '-')
		}
		out = append(out, s[i])
	}
	return string(out)
}

// differs says in words where two configurations differ in what cannot be changed; empty if they
// do not. Devices that were added later are no difference.
func (c Config) differs(now Config) string {
	for _, v := range []struct {
		what     string
		old, new any
	}{
		{"volume group", c.VolumeGroup, now.VolumeGroup},
		{"thin pool", c.Pool, now.Pool},
		{"data percentage", c.DataPercent, now.DataPercent},
		{"metadata percentage", c.MetadataPercent, now.MetadataPercent},
		{"threshold of the extension", c.ExtendThreshold, now.ExtendThreshold},
		{"step of the extension", c.ExtendPercent, now.ExtendPercent},
		{"block size", c.BlockSize, now.BlockSize},
	} {
		if v.old != v.new {
			return fmt.Sprintf("%s was %v, is now %v", v.what, v.old, v.new)
		}
	}
	for _, d := range now.Devices {
		if !slices.Contains(c.Devices, d) {
			return fmt.Sprintf("device %s is new (add it with: mica pool grow --device %s)", d, d)
		}
	}
	return ""
}
