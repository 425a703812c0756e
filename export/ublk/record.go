package ublk

import (
	"hash/fnv"
	"io"

	"mica/export/keep"
)

// A record is what the next exporter must know about a device, a file in RunDir/ublk.
type record struct {
	ID     int    `json:"id"` // of the ublk device
	Cookie uint64 `json:"cookie"`
	keep.Shape
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

// info asks the driver for the device of a record, and says whether it is there, and still that one.
func (rec record) info() (devInfo, bool) {
	i, err := getInfo(rec.ID)
	return i, err == nil && i.cookie == rec.Cookie && i.state != stateDead
}

func (rec record) Path() string { return nodeOf(rec.ID) }

func (rec record) IsThere() bool {
	_, there := rec.info()
	return there
}
