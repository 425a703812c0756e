//go:build race

package layer

// raceEnabled: helpers are this very binary, slower with the detector in it.
const raceEnabled = true
