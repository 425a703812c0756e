// Package trial runs random operations on a pool of the user engine and knows what may be seen
// afterwards: in the running pool, after a power cut at any moment, and after failed requests.
//
// Every sector (512 bytes) that is written holds one 64-bit stamp, repeated: the device, the sector
// and the number of the write. A history keeps the versions of each sector with the times at which
// each write began and was acknowledged, so that a sector after a cut is judged alone: it must be
// whole, and hold the last version that a completed flush covers, or a later one that had begun.
// A stamp of another device, of another sector, or an older version is an error.
//
// Operations are made before they run, as a list that can be printed, read and shortened.
package trial
