package lvm

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// Ensure returns the pool that config describes, ready to be used: it makes it if it is not there
// yet, and activates it if it is. file remembers the set-up, so that a later start with other
// values is refused with ErrChanged, and an interrupted set-up is undone and made again.
//
// Nothing is written before all devices are checked; what a failed set-up made is undone.
func Ensure(ctx context.Context, file string, c Config) (*Pool, error) {
	if err := c.Validate(); err != nil {
		return nil, err
	}
	if err := Available(); err != nil {
		return nil, err
	}
	s, ok, err := load(file)
	switch {
	case err != nil:
		return nil, err
	case ok && s.Done:
		if d := s.differs(c); d != "" {
			return nil, fmt.Errorf("%w: %s", ErrChanged, d)
		}
		return Open(ctx, s.Config)
	case ok:
		if err := undo(ctx, s); err != nil {
			return nil, fmt.Errorf("undo an interrupted set-up of %s: %w", s.FullName(), err)
		}
	}
	return create(ctx, file, c)
}

func create(ctx context.Context, file string, c Config) (*Pool, error) {
	if there, err := exists(ctx, c.VolumeGroup); err != nil {
		return nil, err
	} else if there {
		return nil, fmt.Errorf("%w: %s (choose another name, or use its thin pool as it is by its name %s)", ErrExists, c.VolumeGroup, c.DMName())
	}
	if err := checkDevices(ctx, c.Devices, c.Force); err != nil {
		return nil, err
	}
	s := state{Config: c, Tag: "mica." + strings.ToLower(rand.Text()[:12])}
	if err := s.save(file); err != nil {
		return nil, err
	}
	if err := s.build(ctx); err != nil {
		// The context may be what ended the set-up.
		clean, cancel := context.WithTimeout(context.WithoutCancel(ctx), commandTimeout)
		defer cancel()
		uerr := undo(clean, s)
		if uerr == nil {
			uerr = os.Remove(file)
		}
		return nil, joined(fmt.Errorf("set up the thin pool %s: %w", c.FullName(), err), uerr)
	}
	s.Done = true
	if err := s.save(file); err != nil {
		return nil, err
	}
	return Open(ctx, c)
}

// build makes the pool: two plain volumes first, whose sizes are parts of the same whole, which
// lvconvert then joins.
func (s state) build(ctx context.Context) error {
	wipe := []string{"--yes"}
	if s.Force {
		wipe = append(wipe, "--force", "--force")
	}
	if _, err := run(ctx, "pvcreate", append(wipe, s.Devices...)...); err != nil {
		return err
	}
	if _, err := run(ctx, "vgcreate", append([]string{"--yes", "--addtag", s.Tag, s.VolumeGroup}, s.Devices...)...); err != nil {
		return err
	}
	g, err := groupOf(ctx, s.VolumeGroup)
	if err != nil {
		return err
	}
	metadata, data := g.share(s.Config)
	if data < s.BlockSize {
		return fmt.Errorf("%d bytes are too few for a pool: %d of them are metadata and its spare", g.size, 2*metadata)
	}
	metaName := s.Pool + "meta"
	for _, v := range []struct {
		name  string
		bytes int64
	}{{s.Pool, data}, {metaName, metadata}} {
		if _, err := run(ctx, "lvcreate", "--yes", "--wipesignatures", "y", "--name", v.name,
			"--size", strconv.FormatInt(v.bytes, 10)+"b", s.VolumeGroup); err != nil {
			return err
		}
	}
	// Blocks are zeroed before they are handed out: a container must not see what another left.
	if _, err := run(ctx, "lvconvert", "--yes", "--zero", "y", "--chunksize", strconv.FormatInt(s.BlockSize, 10)+"b",
		"--thinpool", s.FullName(), "--poolmetadata", s.VolumeGroup+"/"+metaName); err != nil {
		return err
	}
	profile := s.profileName()
	if err := s.writeProfile(ctx, profile); err != nil {
		return err
	}
	_, err = run(ctx, "lvchange", "--metadataprofile", profile, s.FullName())
	return err
}

// profileName is the name of the pool's LVM profile.
func (c Config) profileName() string { return "mica-" + c.VolumeGroup + "-" + c.Pool }

// writeProfile writes the thresholds where LVM looks for profiles: lvextend --use-policies, which
// dmeventd runs when the pool fills up, reads them there.
func (s state) writeProfile(ctx context.Context, name string) error {
	dir, err := profileDir(ctx)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	text := fmt.Sprintf("# Written by mica for the thin pool %s.\nactivation {\n\tthin_pool_autoextend_threshold=%d\n\tthin_pool_autoextend_percent=%d\n}\n",
		s.FullName(), s.ExtendThreshold, s.ExtendPercent)
	return os.WriteFile(filepath.Join(dir, name+".profile"), []byte(text), 0o644)
}

func profileDir(ctx context.Context) (string, error) {
	out, err := run(ctx, "lvmconfig", "--typeconfig", "full", "config/profile_dir")
	if err != nil {
		return "", err
	}
	_, value, ok := strings.Cut(strings.TrimSpace(string(out)), "=")
	dir, uerr := strconv.Unquote(value)
	if !ok || uerr != nil || !filepath.IsAbs(dir) {
		return "", fmt.Errorf("lvmconfig says %q, want profile_dir=\"/...\"", out)
	}
	return dir, nil
}

// undo takes back what an unfinished set-up made, and nothing else: the volume group only if it
// carries the set-up's tag, labels only on the devices of a group that is gone.
func undo(ctx context.Context, s state) error {
	rows, err := report(ctx, "vgs", "vg_name", "@"+s.Tag)
	if err != nil {
		return err
	}
	for _, r := range rows {
		if r["vg_name"] != s.VolumeGroup {
			return fmt.Errorf("volume group %s carries the tag of %s: not touched", r["vg_name"], s.VolumeGroup)
		}
		if _, err := run(ctx, "vgremove", "--yes", "--force", "--force", s.VolumeGroup); err != nil {
			return err
		}
	}
	var errs []error
	for _, d := range s.Devices {
		free, err := unusedLabel(ctx, d)
		if err == nil && free {
			_, err = run(ctx, "pvremove", "--yes", d)
		}
		errs = append(errs, err)
	}
	if dir, err := profileDir(ctx); err == nil {
		if err := os.Remove(filepath.Join(dir, s.profileName()+".profile")); err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// unusedLabel reports whether a device carries an LVM label and belongs to no volume group.
func unusedLabel(ctx context.Context, device string) (bool, error) {
	real, err := filepath.EvalSymlinks(device)
	if err != nil {
		return false, err
	}
	rows, err := report(ctx, "pvs", "pv_name,vg_name")
	if err != nil {
		return false, err
	}
	for _, r := range rows {
		if r["pv_name"] == real || r["pv_name"] == device {
			return r["vg_name"] == "", nil
		}
	}
	return false, nil
}

// Remove destroys the pool, its volume group and the labels of its devices, if file says that
// Ensure made them. Nobody may use the pool.
func Remove(ctx context.Context, file string) error {
	s, ok, err := load(file)
	if err != nil {
		return err
	}
	if !ok {
		return fmt.Errorf("%s: %w: nothing was set up", file, ErrNotFound)
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	if err := undo(ctx, s); err != nil {
		return err
	}
	return os.Remove(file)
}
