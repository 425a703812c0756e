package api

import "mica/thin/backup"

// BackupStatus says how the pool's metadata are backed up.
type BackupStatus struct {
	Dir      string   `json:"dir"`
	Interval Duration `json:"interval,omitempty"` // empty: only at the daemon's end
	Keep     int      `json:"keep"`               // 0: none are made
	// Last is the newest backup.
	Last *backup.Info `json:"last,omitempty"`
	// Error is why the last attempt failed.
	Error string `json:"error,omitempty"`
}

// Backups are the backups of the pool's metadata, the newest first.
type Backups struct {
	BackupStatus
	Items []backup.Info `json:"items"`
}

// EventBackup: the metadata were backed up, or could not be.
const EventBackup = "backup"
