package space

import (
	"os"
	"testing"

	"mica/internal/storetest"
)

// The test binary plays the small roles too: nothing that waits for a device that the test serves
// may be done by the test's own process.
func TestMain(m *testing.M) {
	storetest.PlayRole(nil)
	os.Exit(m.Run())
}
