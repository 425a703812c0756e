// Package nbd serves block devices over the Network Block Device protocol: fixed newstyle
// handshake, several named exports per server, structured replies, block status, trim, write
// zeroes, forced unit access, several connections per export. It listens on Unix sockets, and on
// TCP where it is told to: on a loopback address, or anywhere with TLS and certificates of both
// sides.
//
// # Which goroutine does what
//
// Each connection has one reader goroutine. It takes requests from a large receive buffer and
// serves small reads and writes itself ("inline"), straight from and into pooled buffers,
// collecting the replies; they go out with one system call when the buffer holds no further
// complete request. A device that is a dev.Trier is asked to try; what would block, what is
// large, and everything that may wait by nature (flush, forced writes, trim, zeroes, status)
// becomes a task for the connection's workers. These are goroutines that exist while there is
// work, Options.Workers of them at most; writes may use all but a few, so that reads and trims
// go on while writes wait for space.
//
// Memory: a connection that waits for its client holds no buffers; a busy one holds two of
// 128 KiB, and its tasks hold theirs: at most 8 MiB a connection and Options.MaxBuffer all
// together, beyond which every connection may still have one task with a buffer (of 2 MiB at
// most). A reader whose tasks use that up stops reading. Connections share nothing else but the
// device: one that stalls, in either direction, holds up no other.
//
// # TCP and TLS
//
// With TLS (x509 only, 1.2 or later) a client must send STARTTLS before anything else and show a
// certificate; the server never falls back to plain text and never offers a choice. Without TLS
// only loopback addresses are listened on and answered. An export is seen over TCP only if it
// says so. Handshakes over TCP are bounded: in time, in number, and to 8 KiB an option before
// TLS; strangers write at most one line a second into the log. TLS takes 192 KiB more while a
// reply is sent; in flight it costs one copy and the encryption.
//
// Requests of one connection that are in flight together are served and answered in any order,
// as the protocol allows; overlapping ones are not ordered. A buffer is never reused before the
// reply that it belongs to has been handed to the kernel.
//
// # Flush
//
// FLUSH calls Device.Flush when it is taken from the socket; it does not wait for requests
// that are in flight. So it covers every write, trim and zeroing, of any connection to the
// export, that returned from the device before, which includes all that were answered before
// the client sent the flush. A write that was not answered when the flush was sent may or may
// not be covered. That is what the protocol asks for, what the Linux block layer expects, and
// why NBD_FLAG_CAN_MULTI_CONN is always set: dev.Device promises it for all users of a device.
//
// A command with the FUA flag is done and then Device.Flush is called before its reply; it
// makes other finished writes durable as well. A failed flush is reported to every request
// that waited for it; nothing is retried.
//
// # Sizes
//
// Offsets and lengths must be multiples of 512. The preferred block size is the device's, the
// largest request is 32 MiB; trims, zeroes and status may be as long as the device. Requests
// outside of that, or of the device, get an error and change nothing; the connection is closed
// where the protocol leaves no other way: a wrong magic number, a write whose payload is longer
// than 32 MiB, an option longer than 64 KiB, unknown client flags. A device whose length is not
// a multiple of 512 cannot be exported. The size is read when a client negotiates; clients see
// growth when they connect again.
//
// # Holes
//
// BLOCK_STATUS reports what a dev.Extenter says, in units of 512 bytes. Reads are answered with
// OFFSET_HOLE chunks only if the device is a dev.Trier too, that is, keeps its mapping at hand:
// asking a file system for its holes can cost more than the read.
//
// # Shutdown
//
// Server.Close and RemoveExport let requests in flight finish, answer those already received
// with ESHUTDOWN and close the connections. Both are bounded: when time is up, sockets are shut
// down, and requests that still hang in the device are counted in the error.
package nbd
