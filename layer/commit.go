package layer

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"runtime"
	"time"

	"mica/layer/catalog"
	"mica/thin"
)

// Commit is described at API.
func (s *Store) Commit(ctx context.Context, name string, o CommitOptions) (CommitResult, error) {
	if err := s.writable(); err != nil {
		return CommitResult{}, err
	}
	if err := errors.Join(checkImageName(o.Image), checkLabels(o.Labels)); err != nil {
		return CommitResult{}, err
	}
	if _, err := load[imageBody](s, kindImage, o.Image); err == nil && !o.Replace {
		return CommitResult{}, fmt.Errorf("image %q %w", o.Image, ErrExists)
	}
	c, id, level, release, err := s.copyAndHold(ctx, name, o.QuiesceOptions)
	if err != nil {
		return CommitResult{}, fmt.Errorf("commit container %q: %w", name, err)
	}
	defer release()
	img, err := s.commitCopy(ctx, c, id, o)
	if err != nil {
		return CommitResult{}, fmt.Errorf("commit container %q: %w", name, err)
	}
	s.hub.emit(EventCommit, c.Ref(), o.Image)
	s.collectAll() // what the name named before
	out, err := s.describeImage(img)
	return CommitResult{Image: out, Level: level}, err
}

// copyAndHold takes a copy of a container under its lock, and keeps the layer below from being
// collected until release: the container may be removed meanwhile.
func (s *Store) copyAndHold(ctx context.Context, name string, q QuiesceOptions) (c record[containerBody], id thin.DevID, level Level, release func(), err error) {
	unlock, err := s.locks.lock(ctx, kindContainer+"/"+name)
	if err != nil {
		return c, 0, "", nil, err
	}
	defer unlock()
	if c, err = s.usableContainer(name); err != nil {
		return c, 0, "", nil, err
	}
	_, release, err = s.holdLayer(ctx, c.body.ChainID)
	if err != nil {
		return c, 0, "", nil, err
	}
	if id, level, _, err = s.takeCopy(ctx, c, q); err != nil {
		release()
	}
	return c, id, level, release, err
}

// commitCopy makes a layer of a copy, and an image of that. It consumes the copy.
func (s *Store) commitCopy(ctx context.Context, c record[containerBody], id thin.DevID, o CommitOptions) (img record[imageBody], err error) {
	defer func() {
		if err != nil {
			s.cat.Abandon(id) // does nothing once it has a record
		}
	}()
	b := c.body.deviceBody
	handsOff := b.GuestOwned && !o.TrustGuest
	diffID, chain := "", ""
	if handsOff {
		var r [32]byte
		rand.Read(r[:])
		chain = "block:" + hex.EncodeToString(r[:])
	} else {
		if !s.o.NoTrim {
			err = s.work(ctx, id, b.SizeBytes, false, func(w *work) error {
				_, err := s.files.Trim(ctx, w.node(), b.FSType)
				return err
			}, nil)
			if err != nil {
				return img, err
			}
		}
		sum := sha256.New()
		if err = s.diffDevices(ctx, c.body.ChainID, id, b.SizeBytes, sum); err != nil {
			return img, err
		}
		diffID = "sha256:" + hex.EncodeToString(sum.Sum(nil))
		cs := sha256.Sum256([]byte(c.body.ChainID + " " + diffID))
		chain = "sha256:" + hex.EncodeToString(cs[:])
	}
	unlock, err := s.locks.lock(ctx, kindImage+"/"+o.Image, layerRef(chain))
	if err != nil {
		return img, err
	}
	defer unlock()
	config, platform, err := s.commitConfig(c, diffID, o)
	if err != nil {
		return img, err
	}
	cfgSum := sha256.Sum256(config)
	spec := ImageSpec{Name: o.Image, ChainID: chain, Config: config, Digest: "sha256:" + hex.EncodeToString(cfgSum[:]),
		MediaType: "application/vnd.oci.image.config.v1+json", Platform: platform, Labels: o.Labels, Replace: o.Replace}
	if _, err := s.layerRecord(chain); err == nil {
		img, err = s.putImage(ctx, spec, nil, nil) // the same change was committed before
		s.cat.Abandon(id)
		return img, err
	}
	l := record[layerBody]{Record: catalog.Record{Kind: kindLayer, Key: chain, Device: id, Parent: layerRef(c.body.ChainID)}}
	l.body = layerBody{Parent: c.body.ChainID, DiffID: diffID, deviceBody: deviceBody{SizeBytes: b.SizeBytes, FSType: b.FSType,
		Owner: OwnerMica, Created: now(), GuestOwned: handsOff}}
	// What changed since the layer below is more than what the copy itself needed.
	n, err := s.countDelta(ctx, c.Parent, id)
	if err != nil {
		return img, err
	}
	l.body.setOwn(n)
	return s.putImage(ctx, spec, &l, []thin.DevID{id})
}

// diffDevices writes the layer tar that leads from a layer to a device that does not change.
func (s *Store) diffDevices(ctx context.Context, chain string, id thin.DevID, size int64, w io.Writer) error {
	l, err := s.layerRecord(chain)
	if err != nil {
		return err
	}
	return s.diffTrees(ctx, treeDev{l.Device, l.body.SizeBytes}, treeDev{id, size}, l.body.FSType, fmt.Sprintf("device %d", id), w)
}

// commitConfig is the configuration of a committed image: that of the container's image with one
// more layer.
func (s *Store) commitConfig(c record[containerBody], diffID string, o CommitOptions) (config []byte, platform string, err error) {
	base, err := s.configOf(c)
	if err != nil {
		return nil, "", err
	}
	// What we do not know stays as it is.
	doc := map[string]json.RawMessage{}
	if err := json.Unmarshal(base.Config, &doc); err != nil {
		return nil, "", fmt.Errorf("configuration of image %q: %w", c.body.Image, err)
	}
	var rootfs struct {
		Type    string   `json:"type"`
		DiffIDs []string `json:"diff_ids"`
	}
	if raw, ok := doc["rootfs"]; ok {
		if err := json.Unmarshal(raw, &rootfs); err != nil {
			return nil, "", fmt.Errorf("configuration of image %q: rootfs: %w", c.body.Image, err)
		}
	}
	var history []json.RawMessage
	if raw, ok := doc["history"]; ok {
		if err := json.Unmarshal(raw, &history); err != nil {
			return nil, "", fmt.Errorf("configuration of image %q: history: %w", c.body.Image, err)
		}
	}
	created := now().Format(time.RFC3339)
	entry := map[string]any{"created": created, "created_by": "mica commit"}
	if o.Author != "" {
		entry["author"] = o.Author
	}
	if o.Comment != "" {
		entry["comment"] = o.Comment
	}
	if diffID != "" {
		rootfs.DiffIDs = append(rootfs.DiffIDs, diffID)
	} else {
		entry["comment"] = "blocks of a guest's file system; " + o.Comment
	}
	rootfs.Type = "layers"
	set := func(key string, v any) {
		if err == nil {
			doc[key], err = json.Marshal(v)
		}
	}
	last, err := json.Marshal(entry)
	if err != nil {
		return nil, "", err
	}
	set("rootfs", rootfs)
	set("history", append(history, last))
	set("created", created)
	if o.Author != "" {
		set("author", o.Author)
	}
	if err != nil {
		return nil, "", err
	}
	config, err = json.Marshal(doc)
	return config, base.Platform, err
}

// configOf finds the configuration that belongs to a container: its image's, if that name still
// means the container's layer; any other image's of that layer; or a bare one.
func (s *Store) configOf(c record[containerBody]) (imageBody, error) {
	if img, err := load[imageBody](s, kindImage, c.body.Image); err == nil && img.body.ChainID == c.body.ChainID {
		return img.body, nil
	}
	var found imageBody
	err := list(s, kindImage, "", "", func(r record[imageBody]) (bool, error) {
		if r.body.ChainID == c.body.ChainID {
			found = r.body
		}
		return found.Config == nil, nil
	})
	if err != nil || found.Config != nil {
		return found, err
	}
	layers, err := s.chain(c.body.ChainID)
	if err != nil {
		return found, err
	}
	ids := []string{}
	for _, l := range layers {
		ids = append(ids, l.body.DiffID)
	}
	found.Platform = "linux/" + runtime.GOARCH
	found.Config, err = json.Marshal(map[string]any{"architecture": runtime.GOARCH, "os": "linux",
		"rootfs": map[string]any{"type": "layers", "diff_ids": ids}})
	return found, err
}

// Diff is described at API.
func (s *Store) Diff(ctx context.Context, name string, w io.Writer, o DiffOptions) (Level, error) {
	if o.Snapshot != "" {
		return s.diffSnapshot(ctx, name, w, o)
	}
	if err := s.writable(); err != nil {
		return "", err
	}
	c, id, level, release, err := s.copyAndHold(ctx, name, o.QuiesceOptions)
	if err != nil {
		return "", fmt.Errorf("diff container %q: %w", name, err)
	}
	defer release()
	defer s.cat.Abandon(id)
	if c.body.GuestOwned && !o.TrustGuest {
		return "", fmt.Errorf("diff container %q: %w", name, ErrGuestOwned)
	}
	if err := s.diffDevices(ctx, c.body.ChainID, id, c.body.SizeBytes, w); err != nil {
		return "", fmt.Errorf("diff container %q: %w", name, err)
	}
	return level, nil
}

// diffSnapshot diffs a snapshot as it is, through a copy: it may be removed meanwhile.
func (s *Store) diffSnapshot(ctx context.Context, name string, w io.Writer, o DiffOptions) (Level, error) {
	if err := s.writable(); err != nil {
		return "", err
	}
	r, id, release, err := s.copySnapshot(ctx, name, o)
	if err == nil {
		err = s.diffDevices(ctx, r.body.ChainID, id, r.body.SizeBytes, w)
		s.cat.Abandon(id)
		release()
	}
	if err != nil {
		return "", fmt.Errorf("diff snapshot %q of container %q: %w", o.Snapshot, name, err)
	}
	return r.body.Level, nil
}

func (s *Store) copySnapshot(ctx context.Context, name string, o DiffOptions) (r record[snapshotBody], id thin.DevID, release func(), err error) {
	unlock, err := s.locks.lock(ctx, kindContainer+"/"+name)
	if err != nil {
		return r, 0, nil, err
	}
	defer unlock()
	r, err = s.snapshotRecord(name, o.Snapshot)
	if err == nil {
		err = s.usable(r.Ref())
	}
	if err == nil && r.body.GuestOwned && !o.TrustGuest {
		err = ErrGuestOwned
	}
	if err != nil {
		return r, 0, nil, err
	}
	if _, release, err = s.holdLayer(ctx, r.body.ChainID); err != nil {
		return r, 0, nil, err
	}
	ids, err := s.cat.Alloc(ctx, 1)
	if err == nil {
		err = s.cat.CreateHeld(ctx, []catalog.Create{{ID: ids[0], Origin: r.Device}})
	}
	if err != nil {
		release()
		return r, 0, nil, s.wrap(err)
	}
	return r, ids[0], release, nil
}
