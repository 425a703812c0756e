package backup

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/klauspost/compress/zstd"

	"mica/dev"
	"mica/pdata/block"
	"mica/thin"
)

// maxWindow bounds the memory that a file can ask for to be decompressed.
const maxWindow = 64 << 20

// zstdMagic begins what is compressed.
var zstdMagic = []byte{0x28, 0xB5, 0x2F, 0xFD}

// Unpack makes a metadata device of a backup: a new file at to, which is locked, and which the caller
// closes and removes. from is a file of Write, or a dump in XML or a metadata device, compressed or
// not. The devices of a dump do not share nodes, so that nobody knows how much room they need: they get
// at most limit bytes (thin.ErrNoMetaSpace).
func Unpack(from, to string, limit int64) (d dev.Device, err error) {
	f, err := os.Open(from)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	d, err = unpack(f, to, limit, func() (io.Reader, error) {
		_, err := f.Seek(0, io.SeekStart)
		return f, err
	})
	if err != nil {
		return nil, fmt.Errorf("%s: %w", from, err)
	}
	return d, nil
}

// unpack reads a backup; again begins it anew.
func unpack(r io.Reader, to string, limit int64, again func() (io.Reader, error)) (dev.Device, error) {
	limit = min(max(limit, 1<<20), thin.MaxMetadataBytes)
	for size := int64(1 << 20); ; size = min(4*size, limit) {
		in, end, err := decompress(r)
		if err != nil {
			return nil, err
		}
		head, _ := in.Peek(1) // an error comes again with the first read
		if len(head) == 1 && (head[0] == '<' || head[0] == ' ' || head[0] == '\n' || head[0] == 0xEF) {
			d, err := unpackXML(in, to, size)
			end()
			if errors.Is(err, thin.ErrNoMetaSpace) && size < limit {
				if r, err = again(); err != nil {
					return nil, err
				}
				continue
			}
			return d, err
		}
		d, err := unpackImage(in, to)
		end()
		return d, err
	}
}

// decompress reads what may be compressed.
func decompress(r io.Reader) (in *bufio.Reader, end func(), err error) {
	b := bufio.NewReaderSize(r, 1<<16)
	if magic, _ := b.Peek(len(zstdMagic)); !bytes.Equal(magic, zstdMagic) {
		return b, func() {}, nil
	}
	z, err := zstd.NewReader(b, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(maxWindow))
	if err != nil {
		return nil, nil, err
	}
	return bufio.NewReaderSize(z, 1<<16), z.Close, nil
}

// unpackXML restores a dump into a file of size bytes.
func unpackXML(r io.Reader, to string, size int64) (dev.Device, error) {
	d, err := dev.CreateFile(to, size, dev.OpenOptions{Lock: true})
	if err != nil {
		return nil, err
	}
	if err := thin.Restore(r, d, thin.RestoreOptions{}); err != nil {
		d.Close()
		os.Remove(to)
		return nil, err
	}
	return d, nil
}

// unpackImage writes a metadata device, with holes where it is zero.
func unpackImage(r io.Reader, to string) (_ dev.Device, err error) {
	f, err := os.OpenFile(to, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	defer func() {
		f.Close()
		if err != nil {
			os.Remove(to)
		}
	}()
	buf, zeros := make([]byte, 64*block.Size), make([]byte, block.Size)
	size := int64(0)
	for end := false; !end; {
		n, err := io.ReadFull(r, buf)
		switch {
		case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
			end = true
		case err != nil:
			return nil, err
		}
		if n%block.Size != 0 {
			return nil, fmt.Errorf("no backup: neither a dump in XML nor a metadata device of whole blocks of %d bytes", block.Size)
		}
		if size+int64(n) > thin.MaxMetadataBytes {
			return nil, fmt.Errorf("no backup: more than the %d bytes that metadata can have", int64(thin.MaxMetadataBytes))
		}
		for i := 0; i < n; i += block.Size {
			b := buf[i : i+block.Size]
			if bytes.Equal(b, zeros) {
				continue
			}
			if _, err := f.WriteAt(b, size+int64(i)); err != nil {
				return nil, err
			}
		}
		size += int64(n)
	}
	if size == 0 {
		return nil, errors.New("no backup: it is empty")
	}
	if err := f.Truncate(size); err != nil {
		return nil, err
	}
	return dev.Open(to, dev.OpenOptions{Lock: true})
}
