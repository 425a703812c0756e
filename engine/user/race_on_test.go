//go:build race

package user

// slow divides the work of long tests under the race detector.
const slow = 5
