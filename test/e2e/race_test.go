//go:build race

package e2e

// With the race detector the program is built with it too.
func init() { buildFlags = append(buildFlags, "-race") }
