package thin

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
)

// Dumps of the newer tools name leaves that several devices share: <def name="x"> holds their
// mappings once, <ref name="x"/> in a device stands for them. A defStore keeps the mappings of
// all defs in an unnamed temporary file, so that memory holds one entry a def.
type defStore struct {
	f    *os.File
	w    *bufio.Writer
	size int64
	defs map[string]defRange
}

type defRange struct {
	off  int64
	runs int
}

// defRecord is the length of a stored run: virtual block, data block, length, time.
const defRecord = 28

func (s *defStore) begin(name string) error {
	if s.f == nil {
		f, err := os.CreateTemp("", "mica-restore-*")
		if err != nil {
			return err
		}
		if err := os.Remove(f.Name()); err != nil {
			f.Close()
			return err
		}
		s.f, s.w, s.defs = f, bufio.NewWriterSize(f, 1<<16), map[string]defRange{}
	}
	if _, ok := s.defs[name]; ok {
		return fmt.Errorf("name %q twice", name)
	}
	s.defs[name] = defRange{off: s.size}
	return nil
}

func (s *defStore) add(name string, r mappingRun) error {
	var b [defRecord]byte
	binary.LittleEndian.PutUint64(b[:], uint64(r.VBlock))
	binary.LittleEndian.PutUint64(b[8:], uint64(r.Block))
	binary.LittleEndian.PutUint64(b[16:], r.n)
	binary.LittleEndian.PutUint32(b[24:], r.Time)
	d := s.defs[name]
	d.runs++
	s.defs[name] = d
	s.size += defRecord
	_, err := s.w.Write(b[:])
	return err
}

// each calls fn for the runs of a def.
func (s *defStore) each(name string, fn func(mappingRun) error) error {
	d, ok := s.defs[name]
	if !ok {
		return fmt.Errorf("no def is named %q", name)
	}
	if err := s.w.Flush(); err != nil {
		return err
	}
	r := bufio.NewReader(io.NewSectionReader(s.f, d.off, int64(d.runs)*defRecord))
	var b [defRecord]byte
	for range d.runs {
		if _, err := io.ReadFull(r, b[:]); err != nil {
			return err
		}
		if err := fn(mappingRun{Entry{VBlock(binary.LittleEndian.Uint64(b[:])),
			Mapping{DataBlock(binary.LittleEndian.Uint64(b[8:])), binary.LittleEndian.Uint32(b[24:])}},
			binary.LittleEndian.Uint64(b[16:])}); err != nil {
			return err
		}
	}
	return nil
}

func (s *defStore) close() {
	if s.f != nil {
		s.f.Close()
	}
}

// def reads a <def>.
func (b *restorer) def() error {
	x := b.x
	if err := x.only("name"); err != nil {
		return err
	}
	name, ok := x.text("name")
	line, closed := x.tag.line, x.tag.selfClosing
	if !ok {
		return x.errorf(line, "<def>: attribute name is missing")
	}
	if err := b.defs.begin(name); err != nil {
		return x.errorf(line, "<def>: %v", err)
	}
	for !closed {
		t, err := x.next()
		if errors.Is(err, io.EOF) {
			return x.errorf(x.line, "the input ends before </def>")
		}
		if err != nil {
			return err
		}
		if t.end {
			if t.name != "def" {
				return x.unexpected("def")
			}
			return nil
		}
		r, err := b.mapping("def")
		if err == nil {
			err = b.defs.add(name, r)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// ref maps what a <ref> stands for.
func (b *restorer) ref() error {
	x := b.x
	if err := x.only("name"); err != nil {
		return err
	}
	name, _ := x.text("name")
	line, selfClosing := x.tag.line, x.tag.selfClosing
	if b.defs.f == nil {
		return x.errorf(line, "<ref>: no def is named %q", name)
	}
	var inner error
	err := b.defs.each(name, func(r mappingRun) error {
		inner = b.add(r, line, "ref")
		return inner
	})
	if err != nil && inner == nil {
		return x.errorf(line, "<ref>: %v", err)
	}
	if err == nil && !selfClosing {
		if t, err := x.next(); err != nil || !t.end || t.name != "ref" {
			return x.errorf(line, "<ref> does not end")
		}
	}
	return err
}
