package image

import (
	"bufio"
	"bytes"
	"fmt"
	"io"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
)

var (
	magicGzip = []byte{0x1f, 0x8b}
	magicZstd = []byte{0x28, 0xb5, 0x2f, 0xfd}
	magicXz   = []byte{0xfd, '7', 'z', 'X', 'Z', 0}
	magicBz2  = []byte("BZh")
)

// maxWindow bounds the memory of a zstd decoder. zstd --ultra --long=27 needs as much.
const maxWindow = 128 << 20

// compression tells how a stream that begins with head is compressed: "", "gzip" or "zstd".
func compression(head []byte) (string, error) {
	switch {
	case bytes.HasPrefix(head, magicGzip):
		return "gzip", nil
	case bytes.HasPrefix(head, magicZstd):
		return "zstd", nil
	case bytes.HasPrefix(head, magicXz):
		return "", fmt.Errorf("compressed with xz, which images are not: %w", ErrInvalid)
	case bytes.HasPrefix(head, magicBz2):
		return "", fmt.Errorf("compressed with bzip2, which images are not: %w", ErrInvalid)
	}
	return "", nil
}

// decompress looks at the first bytes of r and returns the plain stream. Its Close does not
// close r.
func decompress(r io.Reader) (io.ReadCloser, string, error) {
	br := bufio.NewReaderSize(r, 128<<10)
	head, err := br.Peek(6)
	if err != nil && err != io.EOF {
		return nil, "", err
	}
	kind, err := compression(head)
	if err != nil {
		return nil, "", err
	}
	switch kind {
	case "gzip":
		z, err := gzip.NewReader(br)
		if err != nil {
			return nil, kind, fmt.Errorf("gzip: %w", err)
		}
		return z, kind, nil
	case "zstd":
		z, err := zstd.NewReader(br, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(maxWindow))
		if err != nil {
			return nil, kind, fmt.Errorf("zstd: %w", err)
		}
		return z.IOReadCloser(), kind, nil
	}
	return io.NopCloser(br), "", nil
}
