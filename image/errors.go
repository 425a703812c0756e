package image

import (
	"errors"
	"fmt"
	"strconv"

	"github.com/opencontainers/go-digest"

	"mica/layer"
	"mica/layer/archive"
)

// Conditions that callers branch on. Errors name the file of the archive and its digests.
var (
	// ErrInvalid: the archive is damaged, cut short, or not an image archive.
	ErrInvalid = errors.New("invalid image archive")
	// ErrPlatform: the image is not there for the platform asked for.
	ErrPlatform = errors.New("no image for the platform")
	// ErrLimit: something in the archive is larger than Options allow.
	ErrLimit = archive.ErrLimit
	// ErrDigest: contents do not have the digest that names them. Errors are *DigestError.
	ErrDigest = layer.ErrDigest
)

// A DigestError says that something is not what its digest says. It is ErrDigest.
type DigestError struct {
	What      string // "manifest", "config", "layer 2 of 3", "layer 2 of 3, uncompressed"
	Got, Want digest.Digest
}

func (e *DigestError) Error() string {
	return fmt.Sprintf("%s: digest %s, want %s", e.What, e.Got, e.Want)
}

// Is makes errors.Is(err, ErrDigest) true.
func (e *DigestError) Is(target error) bool { return target == ErrDigest }

// quote quotes a name of unknown origin and cuts it to a readable length.
func quote(name string) string {
	const most = 200
	if len(name) <= most {
		return strconv.Quote(name)
	}
	return fmt.Sprintf("%s… (%d bytes)", strconv.Quote(name[:most]), len(name))
}
