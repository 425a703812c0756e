package thin

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
)

// An xmlReader reads the little XML that dumps consist of: elements with attributes, comments,
// declarations; no text. It keeps one element at a time, whose length is bounded.
type xmlReader struct {
	r    *bufio.Reader
	line int
	tag  xmlTag // what next has returned
	buf  []byte
}

// An xmlTag is a start or end tag.
type xmlTag struct {
	line        int // where it begins
	name        string
	end         bool // </name>
	selfClosing bool // <name/>
	attrs       []xmlAttr
}

type xmlAttr struct{ name, value string }

// maxTagBytes bounds the length of one tag.
const maxTagBytes = 4096

func newXMLReader(r io.Reader) *xmlReader {
	return &xmlReader{r: bufio.NewReaderSize(r, 1<<16), line: 1}
}

func (x *xmlReader) errorf(line int, format string, args ...any) error {
	return fmt.Errorf("line %d: %s", line, fmt.Sprintf(format, args...))
}

func (x *xmlReader) readByte() (byte, error) {
	c, err := x.r.ReadByte()
	if c == '\n' {
		x.line++
	}
	return c, err
}

// next returns the next tag, valid until the call after; io.EOF at the end.
func (x *xmlReader) next() (*xmlTag, error) {
	for {
		c, err := x.readByte()
		if err != nil {
			return nil, err
		}
		switch c {
		case ' ', '\t', '\r', '\n':
			continue
		case '<':
		case 0xEF: // a byte order mark before everything else
			if b, _ := x.r.Peek(2); x.line == 1 && string(b) == "\xBB\xBF" {
				x.r.Discard(2)
				continue
			}
			fallthrough
		default:
			return nil, x.errorf(x.line, "unexpected %q between elements", c)
		}
		line := x.line
		if err := x.body(line); err != nil {
			return nil, err
		}
		b := string(x.buf)
		switch {
		case strings.HasPrefix(b, "!--"), strings.HasPrefix(b, "?"), strings.HasPrefix(b, "!DOCTYPE"):
			continue
		}
		x.tag = xmlTag{line: line, attrs: x.tag.attrs[:0]}
		return &x.tag, x.parse(b)
	}
}

// body reads up to the > that ends a tag or a comment.
func (x *xmlReader) body(line int) error {
	x.buf = x.buf[:0]
	quote := byte(0)
	for {
		c, err := x.readByte()
		if errors.Is(err, io.EOF) {
			return x.errorf(line, "the input ends within a tag")
		}
		if err != nil {
			return err
		}
		if len(x.buf) >= 3 && string(x.buf[:3]) == "!--" { // a comment: keep its last two bytes
			if n := len(x.buf); c == '>' && n >= 5 && x.buf[n-1] == '-' && x.buf[n-2] == '-' {
				return nil
			} else if n > 64 {
				x.buf = append(x.buf[:3], x.buf[n-2:]...)
			}
			x.buf = append(x.buf, c)
			continue
		}
		switch {
		case quote != 0:
			if c == quote {
				quote = 0
			}
		case c == '"', c == '\'':
			quote = c
		case c == '>':
			return nil
		case c == '<':
			return x.errorf(line, "%q within a tag", c)
		}
		if len(x.buf) == maxTagBytes {
			return x.errorf(line, "a tag of more than %d bytes", maxTagBytes)
		}
		x.buf = append(x.buf, c)
	}
}

const xmlSpace = " \t\r\n"

// parse takes a tag apart.
func (x *xmlReader) parse(b string) error {
	t := &x.tag
	if strings.HasPrefix(b, "/") {
		t.end, b = true, b[1:]
	}
	if strings.HasSuffix(b, "/") {
		t.selfClosing, b = true, b[:len(b)-1]
	}
	n := strings.IndexAny(b, xmlSpace)
	if n < 0 {
		n = len(b)
	}
	t.name, b = b[:n], strings.Trim(b[n:], xmlSpace)
	if t.name == "" || t.end && (t.selfClosing || b != "") {
		return x.errorf(t.line, "malformed tag <%s>", x.buf)
	}
	for b != "" {
		name, rest, ok := strings.Cut(b, "=")
		name, rest = strings.Trim(name, xmlSpace), strings.TrimLeft(rest, xmlSpace)
		if !ok || name == "" || strings.ContainsAny(name, xmlSpace+`"'`) || rest == "" || rest[0] != '"' && rest[0] != '\'' {
			return x.errorf(t.line, "<%s>: malformed attributes at %q", t.name, b)
		}
		value, after, ok := strings.Cut(rest[1:], rest[:1])
		if !ok {
			return x.errorf(t.line, "<%s>: attribute %s does not end", t.name, name)
		}
		for _, a := range t.attrs {
			if a.name == name {
				return x.errorf(t.line, "<%s>: attribute %s twice", t.name, name)
			}
		}
		t.attrs = append(t.attrs, xmlAttr{name, value})
		b = strings.TrimLeft(after, xmlSpace)
	}
	return nil
}

// number reads an attribute as a decimal number of at most most.
func (x *xmlReader) number(name string, most uint64) (uint64, error) {
	for _, a := range x.tag.attrs {
		if a.name == name {
			n, err := strconv.ParseUint(a.value, 10, 64)
			if err != nil || n > most {
				return 0, x.errorf(x.tag.line, "<%s>: %s=%q, want a number of at most %d", x.tag.name, name, a.value, most)
			}
			return n, nil
		}
	}
	return 0, x.errorf(x.tag.line, "<%s>: attribute %s is missing", x.tag.name, name)
}

// text reads an attribute that need not be there.
func (x *xmlReader) text(name string) (string, bool) {
	for _, a := range x.tag.attrs {
		if a.name == name {
			return a.value, true
		}
	}
	return "", false
}

// only refuses attributes that are not named.
func (x *xmlReader) only(names ...string) error {
next:
	for _, a := range x.tag.attrs {
		for _, n := range names {
			if a.name == n {
				continue next
			}
		}
		return x.errorf(x.tag.line, "<%s>: unknown attribute %q", x.tag.name, a.name)
	}
	return nil
}
