package client

import (
	"context"

	"mica/daemon/api"
)

// BackupPool starts a backup of the pool's metadata; its result is a backup.Info.
func (c *Client) BackupPool(ctx context.Context, o OpOptions) (op api.Operation, err error) {
	_, err = c.call(ctx, "POST", "/pool/backups", o.query(), nil, &op)
	return op, err
}

// Backups lists the backups of the pool's metadata.
func (c *Client) Backups(ctx context.Context) (b api.Backups, err error) {
	_, err = c.call(ctx, "GET", "/pool/backups", nil, nil, &b)
	return b, err
}
