// Package daemon is `mica serve`: it opens the pool, the layer store and the exports, and answers
// the HTTP API on RUN/mica.sock.
//
//	ROOT/pool/{data,metadata}   the pool, made at the first start
//	ROOT/catalog.db             which device is what
//	ROOT/spool/                 archives while they are imported, files without names
//	RUN/mica.sock               the API
//	RUN/nbd.sock                NBD clients
//	RUN/holder.sock             the process that keeps descriptors while the daemon is away
//	RUN/fuse/, RUN/mnt/         mount points
//
// # Start
//
// RUN and ROOT are locked, so that a second daemon is refused by name. The pool is opened under
// its own locks, the exporter finds what a dead predecessor's holder keeps, the store adopts it,
// and only then does the API listen. Attachments of before a reboot come back when somebody
// asks for them.
//
// # End
//
// SIGTERM: changes are refused, long work is cancelled and undone, streams end, the store
// closes, the devices that are attached are left to the holder (their requests wait for the next
// start), the pool commits and closes. POST /v1/shutdown detaches everything first, or refuses.
//
// # Who does what
//
// The daemon is an I/O path: it never opens, mounts or looks into a device that it serves; helper
// processes do (package layer/helper). Goroutines: one per request, one per long operation
// (operations), two that carry events of the pool and the store into the hub, the extender,
// and what the parts below have.
package daemon
