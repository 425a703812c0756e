package layer

import (
	"fmt"
	"strings"
	"unicode/utf8"
)

// Bounds of what callers name.
const (
	maxName     = 128 // bytes of a container's or snapshot's name
	maxImage    = 512 // bytes of an image's name
	maxLabels   = 128
	maxLabelKey = 256
	maxLabelLen = 4096
	// A device is at most 64 TiB: what ext4 with 4 KiB blocks and 32-bit tools can be trusted with.
	maxSize = 64 << 40
	minSize = 4 << 20
	minXFS  = 300 << 20 // mkfs.xfs makes no smaller one
)

// checkName accepts names of containers and snapshots: letters, digits and "_.-", beginning with
// a letter or digit.
func checkName(what, name string) error {
	if name == "" || len(name) > maxName {
		return fmt.Errorf("%w %s name %q: want 1 to %d characters", ErrInvalid, what, shorten(name), maxName)
	}
	for i, c := range []byte(name) {
		alnum := c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9'
		if !alnum && (i == 0 || strings.IndexByte("_.-", c) < 0) {
			return fmt.Errorf("%w %s name %q: character %q at %d (letters, digits, and after the first \"_.-\")", ErrInvalid, what, name, c, i)
		}
	}
	return nil
}

// checkImageName accepts what image references look like, and more: printable ASCII without
// spaces, path elements that are neither empty nor begin with a dot.
func checkImageName(name string) error {
	if name == "" || len(name) > maxImage {
		return fmt.Errorf("%w image name %q: want 1 to %d characters", ErrInvalid, shorten(name), maxImage)
	}
	for i, c := range []byte(name) {
		alnum := c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9'
		if !alnum && (i == 0 || strings.IndexByte("_.-/:@+", c) < 0) {
			return fmt.Errorf("%w image name %q: character %q at %d", ErrInvalid, name, c, i)
		}
	}
	for part := range strings.SplitSeq(name, "/") {
		if part == "" || part[0] == '.' {
			return fmt.Errorf("%w image name %q: path element %q", ErrInvalid, name, part)
		}
	}
	return nil
}

// checkDigest accepts sha256 digests, and chain ids that Commit makes for layers without a diff id.
func checkDigest(what, d string) error {
	hex, ok := strings.CutPrefix(d, "sha256:")
	if !ok {
		hex, ok = strings.CutPrefix(d, "block:")
	}
	if !ok || len(hex) != 64 || strings.Trim(hex, "0123456789abcdef") != "" {
		return fmt.Errorf("%w %s %q: want sha256: and 64 hex digits", ErrInvalid, what, shorten(d))
	}
	return nil
}

func checkLabels(labels map[string]string) error {
	if len(labels) > maxLabels {
		return fmt.Errorf("%w labels: %d, at most %d", ErrInvalid, len(labels), maxLabels)
	}
	for k, v := range labels {
		if err := checkLabel(k, v); err != nil {
			return err
		}
	}
	return nil
}

func checkLabel(k, v string) error {
	if k == "" || len(k) > maxLabelKey || strings.ContainsAny(k, "=\x00\n") || !utf8.ValidString(k) {
		return fmt.Errorf("%w label %q: want 1 to %d bytes without \"=\"", ErrInvalid, shorten(k), maxLabelKey)
	}
	if len(v) > maxLabelLen || !utf8.ValidString(v) {
		return fmt.Errorf("%w label %s: value of %d bytes, at most %d of UTF-8", ErrInvalid, k, len(v), maxLabelLen)
	}
	return nil
}

// checkSize accepts sizes of devices in bytes.
func checkSize(n int64) error {
	if n < minSize || n > maxSize || n%4096 != 0 {
		return fmt.Errorf("%w size of %d bytes: want a multiple of 4096 from %d to %d", ErrInvalid, n, minSize, int64(maxSize))
	}
	return nil
}

func shorten(s string) string {
	if len(s) > 80 {
		return s[:77] + "..."
	}
	return s
}
