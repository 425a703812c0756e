package image

import (
	_ "crypto/sha256" // for go-digest
	_ "crypto/sha512"
	"errors"
	"fmt"
	"io/fs"
	"path"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// blobName is where a layout keeps the blob with a digest. It checks the digest's form, so that
// the name cannot lead elsewhere.
func blobName(d digest.Digest) (string, error) {
	if err := d.Validate(); err != nil {
		return "", fmt.Errorf("digest %s: %w: %w", quote(string(d)), err, ErrInvalid)
	}
	return path.Join(ocispec.ImageBlobsDir, d.Algorithm().String(), d.Encoded()), nil
}

// checkBlob looks whether a blob is there with the size that its descriptor says.
func (a *Archive) checkBlob(what string, desc ocispec.Descriptor) (string, error) {
	name, err := blobName(desc.Digest)
	if err != nil {
		return "", fmt.Errorf("%s: %w", what, err)
	}
	r, size, err := a.src.open(name)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return "", fmt.Errorf("%s: blob %s is missing in the archive: %w", what, desc.Digest, ErrInvalid)
		}
		return "", fmt.Errorf("%s: %w", what, err)
	}
	r.Close()
	if size != desc.Size {
		return "", fmt.Errorf("%s: blob %s has %d bytes, its descriptor says %d: %w", what, desc.Digest, size, desc.Size, ErrInvalid)
	}
	return name, nil
}

// readBlob reads a small blob and checks its digest.
func (a *Archive) readBlob(what string, desc ocispec.Descriptor) ([]byte, error) {
	name, err := a.checkBlob(what, desc)
	if err != nil {
		return nil, err
	}
	b, err := a.readAll(name)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", what, err)
	}
	if got := desc.Digest.Algorithm().FromBytes(b); got != desc.Digest {
		return nil, &DigestError{What: what, Got: got, Want: desc.Digest}
	}
	return b, nil
}
