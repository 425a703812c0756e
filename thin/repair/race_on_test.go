//go:build race

package repair

// slow divides the work of long tests under the race detector.
const slow = 6
