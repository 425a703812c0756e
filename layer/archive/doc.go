// Package archive moves file trees between mounted file systems and OCI layer tars: Apply
// changes a tree as a layer says, Diff writes the layer that leads from one tree to another.
//
// # Containment
//
// Apply never follows a path as a whole. It opens one directory after the other with a single
// component, O_DIRECTORY and O_NOFOLLOW, relative to the directory before it, starting from the
// root that it was given; it never passes ".." to the kernel, and it does not enter another
// file system. So nothing outside the root is read or written, whatever the archive holds and
// whatever the tree held before, on every kernel, and also if somebody else changes the tree at
// the same time. What an archive cannot mean honestly is refused with an *EntryError that
// names the entry:
//
//   - absolute names and names with a ".." component, also as hard link targets (an absolute
//     target is accepted when this very archive made it, which some builders write);
//   - entries below a symbolic link that the same archive made. A symbolic link of a lower layer
//     (lib -> usr/lib, var/run -> /run) is followed as chroot would, if what it leads to exists
//     inside, and refused if it climbs out of the root. Whiteouts below a directory that this
//     archive made a link have nothing left to hide, and do nothing;
//   - whiteouts of "", "." and "..", names below a reserved ".wh." name, device numbers and
//     owners that do not fit, and whatever is over the limits of ApplyOptions.
//
// # Why not containerd's pkg/archive
//
// It is good code for its job, but it resolves paths first and uses them later; moves entries
// with ".." and absolute names silently to another place; lets a whiteout remove what the same
// layer made before it; leaves the root directory's own entry and trusted.* attributes out;
// materialises sparse files; has no limits; and its diff rounds times to seconds and drops all
// extended attributes but security.capability. Each of these is a promise of this package.
//
// # Use
//
// No function keeps state between calls or changes the process (umask, working directory), so
// several may run at once on different trees. Neither Apply nor Diff syncs anything.
package archive
