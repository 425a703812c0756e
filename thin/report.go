package thin

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"strings"

	"mica/pdata/block"
)

// A Severity says what a finding means.
type Severity string

const (
	// Fatal: contents are lost or would be; the pool must not be written before it is repaired.
	Fatal Severity = "fatal"
	// Leak: blocks count as used that nothing refers to. Space is lost, nothing else.
	Leak Severity = "leak"
	// Warning: a field is not what this code or a kernel writes, but nobody depends on it.
	Warning Severity = "warning"
)

// A Span is a range of keys of a tree, or of blocks of a space map: Begin to End, exclusive.
type Span struct {
	Begin uint64 `json:"begin"`
	End   uint64 `json:"end"`
}

func (s Span) String() string {
	if s.End == s.Begin+1 {
		return fmt.Sprint(s.Begin)
	}
	return fmt.Sprintf("[%d, %d)", s.Begin, s.End)
}

// A Finding is one thing that is wrong, with its place.
type Finding struct {
	Severity Severity `json:"severity"`
	// Where names the structure: "superblock", "mapping tree", "data space map" and so on.
	Where string `json:"where"`
	// Device is the thin device whose mapping tree or details it is, the first one of several
	// that share the place.
	Device *DevID `json:"device,omitempty"`
	// Block is the metadata block that holds the wrong bytes; Path leads to it from the root
	// of its tree, itself included.
	Block *block.Loc  `json:"block,omitempty"`
	Path  []block.Loc `json:"path,omitempty"`
	// Keys is what is concerned: virtual blocks in mapping trees, device ids in the trees of
	// devices, counted blocks in space maps.
	Keys *Span  `json:"keys,omitempty"`
	What string `json:"what"`
}

// String is one line, without the severity.
func (f *Finding) String() string {
	var b strings.Builder
	if f.Block != nil {
		fmt.Fprintf(&b, "metadata block %d: ", *f.Block)
	}
	b.WriteString(f.Where)
	if f.Device != nil {
		fmt.Fprintf(&b, " of thin %d", *f.Device)
	}
	if len(f.Path) > 1 {
		b.WriteString(" (")
		for i, p := range f.Path {
			if i > 0 {
				b.WriteByte('/')
			}
			fmt.Fprint(&b, uint64(p))
		}
		b.WriteByte(')')
	}
	if f.Keys != nil {
		fmt.Fprintf(&b, ": %s %v", keyNames[f.Where], *f.Keys)
	}
	b.WriteString(": ")
	b.WriteString(f.What)
	return b.String()
}

// Names of structures, as in Finding.Where, and what their keys are.
const (
	whereSuper    = "superblock"
	whereHeld     = "metadata snapshot"
	whereTop      = "device tree"
	whereDetails  = "details tree"
	whereMapping  = "mapping tree"
	whereDataMap  = "data space map"
	whereDataIdx  = "data space map index"
	whereDataOver = "data overflow tree"
	whereMetaMap  = "metadata space map"
	whereMetaIdx  = "metadata space map index"
	whereMetaOver = "metadata overflow tree"
)

var keyNames = map[string]string{
	whereTop: "device", whereDetails: "device", whereMapping: "virtual block",
	whereDataMap: "data block", whereDataIdx: "bitmap", whereDataOver: "data block",
	whereMetaMap: "metadata block", whereMetaIdx: "bitmap", whereMetaOver: "metadata block",
}

// A Report is what Check found. Its text and its JSON are the same for the same pool.
type Report struct {
	Findings []Finding `json:"findings"`
	// Omitted counts the findings that did not fit into Findings.
	Omitted  int `json:"omitted"`
	Fatals   int `json:"fatals"`
	Leaks    int `json:"leaks"`
	Warnings int `json:"warnings"`
	// LeakedData and LeakedMeta count blocks: counted higher than they are referred to.
	LeakedData uint64 `json:"leaked_data_blocks"`
	LeakedMeta uint64 `json:"leaked_metadata_blocks"`
	// Partial: not everything was walked (asked for, or unreadable), so that counts were only
	// looked at for being too low.
	Partial bool `json:"partial"`

	TransactionID uint64 `json:"transaction_id"`
	Time          uint32 `json:"time"`
	NeedsCheck    bool   `json:"needs_check"`
	HeldRoot      uint64 `json:"held_root"`
	DataBlockSize int64  `json:"data_block_size"` // bytes
	DataBlocks    uint64 `json:"data_blocks"`
	DataUsed      uint64 `json:"data_used"` // referred to by some mapping
	MetaBlocks    uint64 `json:"metadata_blocks"`
	MetaUsed      uint64 `json:"metadata_used"` // reached
	Devices       int    `json:"devices"`
	Mappings      uint64 `json:"mappings"` // of all devices

	// NeedsCheckCleared and Repaired say what Check changed.
	NeedsCheckCleared bool   `json:"needs_check_cleared"`
	Repaired          uint64 `json:"repaired_blocks"`
}

// Clean reports whether there is nothing but warnings.
func (r *Report) Clean() bool { return r.Fatals == 0 && r.Leaks == 0 }

// Err is nil for a clean pool; ErrCorrupt, with the first finding, for one with fatal ones.
func (r *Report) Err() error {
	if r.Clean() {
		return nil
	}
	worst := Fatal
	if r.Fatals == 0 {
		worst = Leak
	}
	for i := range r.Findings {
		if f := &r.Findings[i]; f.Severity == worst {
			return fmt.Errorf("%d fatal findings, %d leaks, first: %v: %w", r.Fatals, r.Leaks, f, ErrCorrupt)
		}
	}
	return fmt.Errorf("%d fatal findings, %d leaks: %w", r.Fatals, r.Leaks, ErrCorrupt)
}

// WriteText writes one line a finding and a summary.
func (r *Report) WriteText(w io.Writer) error {
	b := bufio.NewWriter(w)
	for i := range r.Findings {
		fmt.Fprintf(b, "%s: %v\n", r.Findings[i].Severity, &r.Findings[i])
	}
	if r.Omitted > 0 {
		fmt.Fprintf(b, "%d more findings\n", r.Omitted)
	}
	if r.Repaired > 0 {
		fmt.Fprintf(b, "repaired the counts of %d blocks\n", r.Repaired)
	}
	if r.NeedsCheckCleared {
		fmt.Fprintln(b, "cleared needs_check")
	}
	fmt.Fprintf(b, "transaction id %d, time %d, needs_check %v, held root %d\n", r.TransactionID, r.Time, r.NeedsCheck, r.HeldRoot)
	fmt.Fprintf(b, "metadata: %d of %d blocks used\n", r.MetaUsed, r.MetaBlocks)
	fmt.Fprintf(b, "data: %d of %d blocks of %d bytes used by %d mappings of %d devices\n",
		r.DataUsed, r.DataBlocks, r.DataBlockSize, r.Mappings, r.Devices)
	if r.Partial {
		fmt.Fprintln(b, "not everything was walked: leaks were not looked for")
	}
	if r.Clean() && r.Warnings == 0 {
		fmt.Fprintln(b, "clean")
	} else {
		fmt.Fprintf(b, "%d fatal, %d leaks (%d data and %d metadata blocks), %d warnings\n",
			r.Fatals, r.Leaks, r.LeakedData, r.LeakedMeta, r.Warnings)
	}
	return b.Flush()
}

// WriteJSON writes the report as indented JSON.
func (r *Report) WriteJSON(w io.Writer) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	return e.Encode(r)
}
