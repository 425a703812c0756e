package archive

import (
	"fmt"
	"strings"
)

// Whiteouts, as the OCI image spec's layer page defines them.
const (
	whPrefix = ".wh."         // .wh.NAME hides NAME of the layers below
	whMeta   = ".wh..wh."     // AUFS bookkeeping; only the next one means something
	whOpaque = ".wh..wh..opq" // hides all that the layers below have in this directory
)

// cleanName checks a name of an archive and returns its components; none means the root
// itself. Doubled slashes and "." components are dropped.
func (o *ApplyOptions) cleanName(name string) ([]string, error) {
	if len(name) > o.MaxName {
		return nil, fmt.Errorf("name of %d bytes, at most %d: %w", len(name), o.MaxName, ErrLimit)
	}
	if name == "" {
		return nil, fmt.Errorf("empty name: %w", ErrInvalid)
	}
	if name[0] == '/' {
		return nil, fmt.Errorf("absolute name: %w", ErrEscape)
	}
	return components(name)
}

func components(name string) ([]string, error) {
	comps := make([]string, 0, strings.Count(name, "/")+1)
	for c := range strings.SplitSeq(name, "/") {
		switch {
		case c == "" || c == ".":
			continue
		case c == "..":
			return nil, fmt.Errorf(`".." in the name: %w`, ErrEscape)
		case len(strings.TrimPrefix(c, whPrefix)) > maxComponent: // a whiteout may be 4 bytes longer
			return nil, fmt.Errorf("path component of %d bytes, at most %d: %w", len(c), maxComponent, ErrLimit)
		case strings.IndexByte(c, 0) >= 0:
			return nil, fmt.Errorf("NUL byte in the name: %w", ErrInvalid)
		}
		comps = append(comps, c)
	}
	return comps, nil
}

// reserved says whether one of the components begins with the whiteout prefix.
func reserved(comps []string) bool {
	for _, c := range comps {
		if strings.HasPrefix(c, whPrefix) {
			return true
		}
	}
	return false
}

// join adds a component to a path relative to the root, where "" is the root.
func join(dir, base string) string {
	if dir == "" {
		return base
	}
	return dir + "/" + base
}

// split cuts a path relative to the root into its directory and its last component.
func split(p string) (dir, base string) {
	if i := strings.LastIndexByte(p, '/'); i >= 0 {
		return p[:i], p[i+1:]
	}
	return "", p
}
