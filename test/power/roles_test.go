package power

import (
	"os"
	"testing"

	"mica/internal/storetest"
)

// The test binary plays the small roles too: nothing that waits for a device that the test serves
// may be done by the test's own process.
func TestMain(m *testing.M) {
	storetest.PlayRole(map[string]func(string) error{
		"files": func(arg string) error { return filesRole(arg, os.Args[3], os.Args[4]) },
	})
	os.Exit(m.Run())
}
