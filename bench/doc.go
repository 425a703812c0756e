// Package bench measures mica beside what a user would pick instead, in one run: the same work,
// one after the other, on the same medium.
//
// A run is a list of parts (Parts). Each part starts its peers, lets all of them do the same jobs
// in turn, several rounds of them, and returns tables of samples. What counts are ratios of
// samples of the same round (Row.Ratio): machines are shared, and their speed drifts from one
// minute to the next. Beside times there are counts, which do not drift: processor time and
// context switches of the server per operation, flushes, bytes on the medium.
//
//	bench         parts, samples, tables, the machine's description, the report
//	bench/fio     fio as a load generator
//	bench/peer    servers and their media: nbdkit, qemu, loop devices, mica's own
//	bench/plot    drawings of tables
//
// Nothing here is part of the daemon. A part that cannot run here says why in its notes.
package bench
