package repair

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"strings"

	"mica/pdata/block"
	"mica/thin"
)

// A LostRange is a range of virtual blocks of a device whose mappings could not be saved.
type LostRange struct {
	Range
	Why string `json:"why"`
}

func (r LostRange) String() string {
	switch {
	case r.Range == Range{}:
		return "all virtual blocks"
	case r.End == 0:
		return fmt.Sprintf("virtual blocks from %d on", r.Begin)
	case r.End == r.Begin+1:
		return fmt.Sprintf("virtual block %d", r.Begin)
	}
	return fmt.Sprintf("virtual blocks %d to %d", r.Begin, r.End-1)
}

// A Device is what became of one thin device.
type Device struct {
	ID thin.DevID `json:"id"`
	// Mapped is how many blocks it had mapped, as far as is known; Kept how many it has now.
	Mapped *uint64 `json:"mapped_blocks,omitempty"`
	Kept   uint64  `json:"kept_blocks"`
	// Gone: the device is not in the new pool, because nothing is known but that it existed.
	Gone  bool        `json:"gone"`
	Lost  []LostRange `json:"lost,omitempty"`
	Notes []string    `json:"notes,omitempty"`
}

// whole reports whether nothing of a device is lost.
func (d *Device) whole() bool {
	return !d.Gone && len(d.Lost) == 0 && (d.Mapped == nil || *d.Mapped == d.Kept)
}

// A Candidate is one state that a search has found.
type Candidate struct {
	MappingRoot block.Loc `json:"mapping_root"`
	DetailsRoot block.Loc `json:"details_root"`
	Devices     int       `json:"devices"`
	Chosen      bool      `json:"chosen"`
}

// A Report says what a repair has found and what it could not save.
type Report struct {
	// Superblock is what is wrong with the superblock; empty: nothing.
	Superblock string `json:"superblock,omitempty"`
	// From says how the trees were found: FromSuperblock and so on.
	From        string    `json:"from"`
	MappingRoot block.Loc `json:"mapping_root"`
	DetailsRoot block.Loc `json:"details_root"`
	// Candidates are the states that the search could not tell apart by their fields.
	Candidates []Candidate `json:"candidates,omitempty"`
	// Trees is what is wrong with the two trees of devices.
	Trees []string `json:"trees,omitempty"`
	// UnknownDevices: entries of both trees of devices are lost, so that nobody knows which
	// devices there were.
	UnknownDevices bool `json:"unknown_devices"`
	// Devices are all that are known, by id.
	Devices []Device `json:"devices"`
	// Conflicts counts data blocks that several owners claimed in contradiction.
	Conflicts int `json:"conflicting_data_blocks"`
	// SnapshotDropped: the pool had a metadata snapshot, which the new one has not.
	SnapshotDropped bool `json:"metadata_snapshot_dropped"`

	TransactionID uint64 `json:"transaction_id"`
	// TransactionGuessed: the transaction id is that of a damaged superblock, or the least that it
	// can be.
	TransactionGuessed bool   `json:"transaction_id_guessed"`
	Time               uint32 `json:"time"`
	DataBlockSize      int64  `json:"data_block_size"` // bytes
	DataBlocks         uint64 `json:"data_blocks"`
	Complete           bool   `json:"complete"` // nothing is lost
}

// totals counts devices that are damaged or gone, and blocks that are lost as far as is known.
func (r *Report) totals() (damaged, gone int, blocks uint64) {
	for i := range r.Devices {
		d := &r.Devices[i]
		if d.Mapped != nil && *d.Mapped > d.Kept {
			blocks += *d.Mapped - d.Kept
		}
		switch {
		case d.Gone:
			gone++
		case !d.whole():
			damaged++
		}
	}
	return damaged, gone, blocks
}

// WriteText writes the report for people.
func (r *Report) WriteText(w io.Writer) error {
	b := bufio.NewWriter(w)
	if r.Superblock != "" {
		fmt.Fprintf(b, "superblock: %s\n", r.Superblock)
	}
	fmt.Fprintf(b, "devices found by: %s (device tree in metadata block %d, details in %d)\n", r.From, r.MappingRoot, r.DetailsRoot)
	if n := len(r.Candidates); n > 1 {
		fmt.Fprintf(b, "%d states are equally new as far as can be told; others can be chosen with --mapping-root and --details-root:\n", n)
		for i, c := range r.Candidates {
			if i == 20 {
				fmt.Fprintf(b, "  and %d more\n", n-i)
				break
			}
			mark := ""
			if c.Chosen {
				mark = ", chosen"
			}
			fmt.Fprintf(b, "  device tree %d, details %d, %d devices%s\n", c.MappingRoot, c.DetailsRoot, c.Devices, mark)
		}
	}
	for _, t := range r.Trees {
		fmt.Fprintln(b, t)
	}
	r.writeDevices(b)
	if r.Conflicts > 0 {
		fmt.Fprintf(b, "%d data blocks were claimed by several owners in contradiction: they stay with the newest claim, or are treated as shared\n", r.Conflicts)
	}
	if r.SnapshotDropped {
		fmt.Fprintln(b, "the metadata snapshot is dropped")
	}
	if r.UnknownDevices {
		fmt.Fprintln(b, "there may have been other devices, of which nothing is known")
	}
	guessed := ""
	switch {
	case r.TransactionGuessed && r.From == FromDamaged:
		guessed = " (as the damaged superblock says)"
	case r.TransactionGuessed:
		guessed = " (the least that it can be)"
	}
	fmt.Fprintf(b, "transaction id %d%s, time %d, %d data blocks of %d bytes\n", r.TransactionID, guessed, r.Time, r.DataBlocks, r.DataBlockSize)
	damaged, gone, blocks := r.totals()
	if r.Complete {
		fmt.Fprintf(b, "%d devices, nothing is lost\n", len(r.Devices))
	} else {
		fmt.Fprintf(b, "%d devices: %d whole, %d damaged, %d gone; %d mapped blocks are lost\n",
			len(r.Devices), len(r.Devices)-damaged-gone, damaged, gone, blocks)
	}
	return b.Flush()
}

// WriteDevices writes what of each device is lost, and nothing of those that are whole.
func (r *Report) WriteDevices(w io.Writer) error {
	b := bufio.NewWriter(w)
	r.writeDevices(b)
	return b.Flush()
}

func (r *Report) writeDevices(b *bufio.Writer) {
	for i := range r.Devices {
		r.Devices[i].writeText(b)
	}
}

// rangesShown bounds the ranges of one device in the text.
const rangesShown = 50

func (d *Device) writeText(b *bufio.Writer) {
	if d.whole() && len(d.Notes) == 0 {
		return
	}
	mapped := "an unknown number of"
	if d.Mapped != nil {
		mapped = fmt.Sprint(*d.Mapped)
	}
	switch {
	case d.Gone:
		fmt.Fprintf(b, "thin %d: gone, with %s mapped blocks\n", d.ID, mapped)
	default:
		fmt.Fprintf(b, "thin %d: %d of %s mapped blocks kept\n", d.ID, d.Kept, mapped)
	}
	for i, l := range d.Lost {
		if i == rangesShown {
			fmt.Fprintf(b, "  and %d more ranges\n", len(d.Lost)-i)
			break
		}
		fmt.Fprintf(b, "  lost: %v: %s\n", l, strings.TrimPrefix(l.Why, "b-tree "))
	}
	for _, n := range d.Notes {
		fmt.Fprintf(b, "  %s\n", n)
	}
}

// WriteJSON writes the report as indented JSON.
func (r *Report) WriteJSON(w io.Writer) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	return e.Encode(r)
}
