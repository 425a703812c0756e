// Package helper does the file system work of the layer store in a process of its own: mkfs,
// mounting, applying and diffing trees, freezing, growing, trimming.
//
// The daemon serves the very devices that this work waits for. A thread of the daemon that waits
// for such a device can be killed by nobody, not even with the daemon. A helper can: it is
// another process, shares no descriptor with the daemon but its own pipes, and works in a mount
// namespace of its own, so that its mounts end with it. Mounts and unmounts of the host come in
// (the propagation is "slave"), so that a long apply does not keep alive what the host has
// unmounted; nothing goes out.
//
// One helper does one operation. It reads one Request (a line of JSON) from its standard input
// and answers with Responses on its standard output, one for most operations. File contents
// travel on descriptor 3. The end of standard input means that the daemon no longer wants the
// answer. A helper dies with its daemon (PDEATHSIG); a freezing one thaws first.
//
// Run is the helper's side, Client the daemon's.
package helper
