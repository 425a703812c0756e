// Package holder keeps file descriptors alive across the death of the process that uses them.
//
// A holder is a tiny process that receives descriptors over a Unix socket, each with a name and a
// small JSON blob, and hands copies back to whoever of the same user asks. It reads and writes
// none of them: a /dev/fuse connection stays open while its server is restarted, a lock
// stays locked.
//
//	daemon ----- put "disk7" {size,…} + fd ----> holder
//	   X  SIGKILL                                  | keeps the open file description
//	daemon' ---- list, get "disk7" -------------->|
//	        <--- blob + fd ------------------------
//
// The socket is of type SOCK_SEQPACKET: one JSON message is one packet, a descriptor travels
// beside it. Both sides check that the other has their user id (SO_PEERCRED).
//
// A holder exits by itself when it has held nothing, and nobody was connected, for some time. It
// pins nothing else: its directory is /, its standard descriptors are /dev/null, inherited
// descriptors are closed. SIGTERM ends it, and with it what it holds, so that a host that shuts
// down sees I/O errors instead of requests that wait for ever.
package holder
