package archive

import (
	"archive/tar"
	"errors"
	"fmt"
	"sort"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	paxXattr   = "SCHILY.xattr."
	aclAccess  = "system.posix_acl_access"
	aclDefault = "system.posix_acl_default"
	selinux    = "security.selinux"
)

// applicable says whether Linux has the attribute's namespace.
func applicable(name string) bool {
	for _, ns := range []string{"user.", "security.", "trusted."} {
		if strings.HasPrefix(name, ns) && len(name) > len(ns) {
			return true
		}
	}
	return name == aclAccess || name == aclDefault
}

// setXattrs sets the extended attributes of an entry, in the order of their names. plain says
// that it is a file or a directory, which may have user.* attributes.
func (a *applier) setXattrs(h xattrHandle, hdr *tar.Header, plain bool) error {
	if len(hdr.PAXRecords) == 0 {
		return nil
	}
	var names []string
	for k := range hdr.PAXRecords {
		if name, ok := strings.CutPrefix(k, paxXattr); ok {
			names = append(names, name)
		}
	}
	sort.Strings(names)
	for _, name := range names {
		if !applicable(name) {
			a.o.Warn(hdr.Name, fmt.Sprintf("extended attribute %q left out: not a namespace of Linux", name))
			continue
		}
		if !plain && strings.HasPrefix(name, "user.") {
			a.o.Warn(hdr.Name, fmt.Sprintf("extended attribute %q left out: only files and directories have user attributes", name))
			continue
		}
		if err := h.set(name, []byte(hdr.PAXRecords[paxXattr+name])); err != nil {
			return fmt.Errorf("set extended attribute %q of %d bytes: %w", name, len(hdr.PAXRecords[paxXattr+name]), err)
		}
	}
	return nil
}

// clearXattrs removes the attributes that hdr (nil: none) does not name. The security label
// that the running kernel gave is not the archive's to remove.
func clearXattrs(h xattrHandle, hdr *tar.Header) error {
	names, err := h.list()
	if err != nil {
		return err
	}
	for _, name := range names {
		if name == selinux || !applicable(name) {
			continue
		}
		if hdr != nil {
			if _, ok := hdr.PAXRecords[paxXattr+name]; ok {
				continue
			}
		}
		if err := h.remove(name); err != nil && !errors.Is(err, unix.ENODATA) {
			return fmt.Errorf("remove extended attribute %q: %w", name, err)
		}
	}
	return nil
}
