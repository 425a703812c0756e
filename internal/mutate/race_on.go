//go:build race

package mutate

// slower is how much less is done because everything takes longer under the race detector.
const slower = 8
