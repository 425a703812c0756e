// Package nbdkernel exports devices as /dev/nbdN: through the kernel's NBD client, served by this
// process over socket pairs whose other ends the kernel has.
//
//	file system -> /dev/nbd3 -> kernel's client == socket pair == export/nbd's connection -> dev.Device
//
// # Life across the death of the server
//
// With the server its end of each socket pair is gone. The kernel keeps the device: requests wait,
// Options.DeadTimeout at most, until the next server gives it new sockets (RECONFIGURE), which it
// may do because it knows the device's backend name, "mica:RUN:NAME". Requests that the dead server
// had taken and not answered are sent again when their timer has run out (Options.RetryAfter).
//
// # One connection or several
//
// With one connection, which is the default, no request is ever given up: a slow one, such as a
// write that waits for space, is waited for. With several, the kernel gives up requests that are not
// answered within Options.RequestTimeout: it shuts their connection and sends them on another one.
// A gate then keeps a request from running twice at the same time; and the timeout must be longer
// than anything that the device waits for.
package nbdkernel
