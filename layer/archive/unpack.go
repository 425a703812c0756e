package archive

import (
	"fmt"
	"io"
)

// Unpacking is what a decompressor gives, within MaxTar and MaxRatio. stored tells how many bytes
// it has taken so far. Its errors are ErrLimit or the reader's; what was read before one is not to
// be trusted.
func Unpacking(plain io.Reader, stored func() int64, l Limits) io.Reader {
	return &unpacking{r: plain, stored: stored, l: l.WithDefaults()}
}

type unpacking struct {
	r      io.Reader
	stored func() int64 // nil: not compressed
	l      Limits
	n      int64
}

func (u *unpacking) Read(p []byte) (int, error) {
	n, err := u.r.Read(p)
	u.n += int64(n)
	if lerr := u.check(); lerr != nil {
		return 0, lerr
	}
	return n, err
}

func (u *unpacking) check() error {
	if u.n > u.l.MaxTar {
		return fmt.Errorf("more than %d bytes uncompressed: %w", u.l.MaxTar, ErrLimit)
	}
	if u.stored == nil {
		return nil
	}
	return u.l.expands(u.n, u.stored())
}
