package ublk

import (
	"hash/fnv"
	"io"
)

// A record is what the next exporter must know about a device. It is a file in RunDir/ublk, and
// there from the moment the node works until its link is gone: a device of ours that has none was
// never given to anybody, or was being taken away.
type record struct {
	ID         int    `json:"id"` // of the ublk device
	Cookie     uint64 `json:"cookie"`
	Size       int64  `json:"size"` // bytes, as the kernel was told last
	SectorSize int    `json:"sector_size"`
	ReadOnly   bool   `json:"read_only"`
}

const recordVersion = 1

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

// isThere says whether the device of a record is still there, and still that one.
func (rec *record) isThere() (devInfo, bool) {
	i, err := getInfo(rec.ID)
	return i, err == nil && i.cookie == rec.Cookie && i.state != stateDead
}
