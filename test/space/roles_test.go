package space

import (
	"context"
	"fmt"
	"os"
	"strings"
	"testing"

	"mica/export/fuse"
	"mica/layer/helper"
)

// The test binary plays the small roles too: nothing that waits for a device that the test serves
// may be done by the test's own process.
func TestMain(m *testing.M) {
	if len(os.Args) < 2 || !strings.HasPrefix(os.Args[1], "role-") {
		os.Exit(m.Run())
	}
	var err error
	switch os.Args[1] {
	case "role-helper":
		err = helper.Run(context.Background(), os.Stdin, os.Stdout, nil)
	case "role-fuse-helper":
		err = fuse.RunHelper(context.Background(), os.Stdin, os.Stdout)
	default:
		err = fmt.Errorf("unknown role")
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, os.Args[1]+":", err)
		os.Exit(1)
	}
	os.Exit(0)
}
