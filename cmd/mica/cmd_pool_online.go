package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"mica/daemon/api"
	"mica/daemon/client"
)

// growOnline grows the daemon's pool.
func growOnline(cmd *cobra.Command, want api.GrowPool) error {
	c := connect()
	defer c.Close()
	op, err := c.GrowPool(cmd.Context(), want, client.OpOptions{})
	if err != nil {
		return err
	}
	_, err = waitFor(cmd, c, op, false)
	return err
}

// trimOnline trims the daemon's pool.
func trimOnline(cmd *cobra.Command) error {
	c := connect()
	defer c.Close()
	op, err := c.TrimPool(cmd.Context(), client.OpOptions{})
	if err != nil {
		return err
	}
	if op, err = waitFor(cmd, c, op, false); err != nil {
		return err
	}
	r, err := client.Result[api.TrimResult](op)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(cmd.OutOrStdout(), "trimmed %s\n", size(r.TrimmedBytes))
	return err
}

// checkOnline checks the daemon's pool as of its last commit.
func checkOnline(cmd *cobra.Command, asJSON bool) error {
	c := connect()
	defer c.Close()
	op, err := c.CheckPool(cmd.Context(), client.OpOptions{})
	if err != nil {
		return err
	}
	if op, err = waitFor(cmd, c, op, asJSON); err != nil {
		return err
	}
	r, err := client.Result[api.CheckResult](op)
	if err != nil {
		return err
	}
	if asJSON {
		err = printJSON(cmd.OutOrStdout(), r)
	} else {
		err = r.Report.WriteText(cmd.OutOrStdout())
	}
	if err == nil && !r.Clean {
		err = &exitStatus{exitError}
	}
	return err
}
