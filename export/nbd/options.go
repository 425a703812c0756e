package nbd

import (
	"encoding/binary"
	"fmt"
	"strings"
	"unicode/utf8"
)

// Option data of the handshake. Nothing here does I/O; every length is checked against the
// data at hand before it is used.

// infoQuery is the data of INFO and GO.
//
//	offset  size  field
//	0       4     length of the name
//	4       L     name
//	4+L     2     number of information requests
//	6+L     2*N   requests
type infoQuery struct {
	name      string
	blockSize bool // NBD_INFO_BLOCK_SIZE was asked for
	wantName  bool
	wantDescr bool
}

func parseInfoQuery(b []byte) (infoQuery, error) {
	var q infoQuery
	name, b, err := takeString(b, "export name")
	if err != nil {
		return q, err
	}
	q.name = name
	if len(b) < 2 {
		return q, fmt.Errorf("number of information requests: %d bytes, want 2", len(b))
	}
	n := int(binary.BigEndian.Uint16(b))
	b = b[2:]
	if len(b) != 2*n {
		return q, fmt.Errorf("%d information requests in %d bytes", n, len(b))
	}
	for ; len(b) > 0; b = b[2:] {
		switch binary.BigEndian.Uint16(b) {
		case infoName:
			q.wantName = true
		case infoDescription:
			q.wantDescr = true
		case infoBlockSize:
			q.blockSize = true
		}
	}
	return q, nil
}

// metaQuery is the data of LIST_META_CONTEXT and SET_META_CONTEXT.
//
//	size  field
//	4     length of the name
//	L     name
//	4     number of queries
//	      per query: 4 bytes length, the query
type metaQuery struct {
	name    string
	queries []string
}

func parseMetaQuery(b []byte) (metaQuery, error) {
	var q metaQuery
	name, b, err := takeString(b, "export name")
	if err != nil {
		return q, err
	}
	q.name = name
	if len(b) < 4 {
		return q, fmt.Errorf("number of queries: %d bytes, want 4", len(b))
	}
	n := binary.BigEndian.Uint32(b)
	b = b[4:]
	if n > maxMetaQuery {
		return q, errTooManyQueries
	}
	for range n {
		var s string
		if s, b, err = takeString(b, "query"); err != nil {
			return q, err
		}
		q.queries = append(q.queries, s)
	}
	if len(b) != 0 {
		return q, fmt.Errorf("%d bytes after the last query", len(b))
	}
	return q, nil
}

var errTooManyQueries = fmt.Errorf("more than %d queries", maxMetaQuery)

// matchesAllocation tells whether a query names base:allocation. In a listing, "base:" is a
// wildcard; in a selection it is ignored.
func matchesAllocation(query string, listing bool) bool {
	return query == contextAllocation || listing && query == "base:"
}

// takeString takes a string with a length of 32 bits before it off the front of b.
func takeString(b []byte, what string) (string, []byte, error) {
	if len(b) < 4 {
		return "", nil, fmt.Errorf("length of %s: %d bytes, want 4", what, len(b))
	}
	n := binary.BigEndian.Uint32(b)
	b = b[4:]
	if uint64(n) > uint64(len(b)) {
		return "", nil, fmt.Errorf("%s of %d bytes in an option with %d left", what, n, len(b))
	}
	s := string(b[:n])
	if err := checkString(s, what); err != nil {
		return "", nil, err
	}
	return s, b[n:], nil
}

// checkString applies the protocol's rule for strings: UTF-8, no NUL, at most 4096 bytes.
func checkString(s, what string) error {
	switch {
	case len(s) > maxString:
		return fmt.Errorf("%s of %d bytes, longest is %d", what, len(s), maxString)
	case !utf8.ValidString(s):
		return fmt.Errorf("%s %q is not UTF-8", what, s)
	case strings.IndexByte(s, 0) >= 0:
		return fmt.Errorf("%s %q contains a zero byte", what, s)
	}
	return nil
}
