package main

import (
	"github.com/spf13/cobra"

	"mica/daemon/client"
	"mica/thin/backup"
)

// backupOnline has the daemon back up its pool's metadata.
func backupOnline(cmd *cobra.Command, asJSON bool) error {
	c := connect()
	defer c.Close()
	op, err := c.BackupPool(cmd.Context(), client.OpOptions{})
	if err != nil {
		return err
	}
	if op, err = waitFor(cmd, c, op, asJSON); err != nil {
		return err
	}
	i, err := client.Result[backup.Info](op)
	if err != nil {
		return err
	}
	return printBackup(cmd, i, asJSON)
}

// backupsOnline lists those of the daemon.
func backupsOnline(cmd *cobra.Command, asJSON bool) error {
	c := connect()
	defer c.Close()
	b, err := c.Backups(cmd.Context())
	if err != nil {
		return err
	}
	return printBackups(cmd, b.Items, asJSON)
}
