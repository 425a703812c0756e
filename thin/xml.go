package thin

import (
	"bufio"
	"io"
	"strconv"
)

// XML of thin-provisioning-tools: dumps and deltas, one element a line, indented by two spaces.
// Dumps are the portable kind that thin_restore of both its generations accepts: no
// declaration, every attribute but metadata_snap, version 2, flags 0, devices with an end tag.
// Source: format description, sections 9.1 to 9.4.

// An xmlWriter writes elements whose attributes are numbers. The first error is kept.
type xmlWriter struct {
	w   *bufio.Writer
	buf []byte
}

func newXMLWriter(w io.Writer) *xmlWriter { return &xmlWriter{w: bufio.NewWriterSize(w, 1<<16)} }

// open begins an element: indentation, name.
func (x *xmlWriter) open(depth int, name string) {
	x.buf = append(x.buf[:0], "            "[:2*depth]...)
	x.buf = append(x.buf, '<')
	x.buf = append(x.buf, name...)
}

func (x *xmlWriter) attr(name string, v uint64) {
	x.buf = append(x.buf, ' ')
	x.buf = append(x.buf, name...)
	x.buf = append(x.buf, '=', '"')
	x.buf = strconv.AppendUint(x.buf, v, 10)
	x.buf = append(x.buf, '"')
}

// end ends a start tag, or with "/" an element.
func (x *xmlWriter) end(slash string) error {
	x.buf = append(x.buf, slash...)
	x.buf = append(x.buf, '>', '\n')
	_, err := x.w.Write(x.buf)
	return err
}

func (x *xmlWriter) endTag(depth int, name string) error {
	x.open(depth, "/"+name)
	return x.end("")
}
