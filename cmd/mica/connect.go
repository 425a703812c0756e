package main

import (
	"os"

	"github.com/spf13/cobra"

	"mica/daemon/api"
	"mica/daemon/client"
)

// runFlag is --run of the commands that talk to a daemon, "" if it was not given.
var runFlag string

// runDir is the daemon's RUN directory: --run, else $MICA_RUN, else /run/mica.
func runDir() string {
	switch env := os.Getenv("MICA_RUN"); {
	case runFlag != "":
		return runFlag
	case env != "":
		return env
	}
	return client.DefaultRun
}

// connect makes a client of the daemon. It is not asked yet: the first call says if it is there.
func connect() *client.Client { return client.New(runDir()) }

// waitFor waits for the end of an operation and shows its progress. An interrupt cancels it.
func waitFor(cmd *cobra.Command, c *client.Client, op api.Operation, quiet bool) (api.Operation, error) {
	o := newOpProgress(cmd, quiet)
	defer o.end()
	return c.Wait(cmd.Context(), op, o.show)
}
