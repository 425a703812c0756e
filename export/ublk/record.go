package ublk

import (
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"os"
	"path/filepath"
	"strings"

	"mica/export/node"

	"golang.org/x/sys/unix"
)

// A record is what the next exporter must know about a device. It is a file in RunDir/ublk, and
// there from the moment the node works until its link is gone: a device of ours that has none was
// never given to anybody, or was being taken away.
type record struct {
	Version    int    `json:"version"`
	ID         int    `json:"id"` // of the ublk device
	Cookie     uint64 `json:"cookie"`
	Size       int64  `json:"size"` // bytes, as the kernel was told last
	SectorSize int    `json:"sector_size"`
	ReadOnly   bool   `json:"read_only"`
}

const recordVersion = 1

const recordSuffix = ".json"

// A cookie is kept by the driver with the device. It tells our devices from those of others, and
// from those of other run directories.
//
//	bits 48-63  magic
//	bits 24-47  hash of the run directory
//	bits 0-23   hash of the name
const cookieMagic = 0x6d69 << 48 // "mi"

func hash24(s string) uint64 {
	h := fnv.New32a()
	io.WriteString(h, s)
	v := h.Sum32()
	return uint64(v>>24^v) & 0xffffff
}

func cookieOf(runDir, name string) uint64 {
	return cookieMagic | hash24(runDir)<<24 | hash24(name)
}

const (
	cookieRun  = 0xffff_ffffff << 24
	cookieName = 0xffff_000000_ffffff
)

// records are the files of a directory.
type records string

func (r records) path(name string) string { return filepath.Join(string(r), name+recordSuffix) }

func (r records) put(name string, rec record) error {
	b, err := json.Marshal(rec)
	if err != nil {
		return err
	}
	// A process that is killed in the middle leaves the old record, or none.
	tmp := filepath.Join(string(r), "."+name)
	if err := os.WriteFile(tmp, b, 0o600); err != nil {
		return fmt.Errorf("record: %w", err)
	}
	return os.Rename(tmp, r.path(name))
}

func (r records) drop(name string) error {
	if err := os.Remove(r.path(name)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

// list returns all records by name; those that cannot be read are nil.
func (r records) list() (map[string]*record, error) {
	files, err := os.ReadDir(string(r))
	if err != nil {
		return nil, err
	}
	all := make(map[string]*record)
	for _, f := range files {
		name, ok := strings.CutSuffix(f.Name(), recordSuffix)
		if !ok || node.CheckID(name) != nil {
			continue
		}
		var rec record
		b, err := os.ReadFile(filepath.Join(string(r), f.Name()))
		if err == nil {
			err = json.Unmarshal(b, &rec)
		}
		if err != nil || rec.Version != recordVersion {
			all[name] = nil
			continue
		}
		all[name] = &rec
	}
	return all, nil
}

func (r records) get(name string) (*record, error) {
	all, err := r.list()
	if err != nil {
		return nil, err
	}
	return all[name], nil
}

// isThere says whether the device of a record is still there, and still that one.
func (rec *record) isThere() (devInfo, bool) {
	i, err := getInfo(rec.ID)
	return i, err == nil && i.cookie == rec.Cookie && i.state != stateDead
}

// flockDir locks a directory for one exporter.
func flockDir(f *os.File) error {
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err != unix.EINTR {
			return err
		}
	}
}
