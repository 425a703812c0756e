package daemon

import (
	"context"
	"net/http"

	"mica/daemon/api"
	"mica/thin/backup"
)

// backupRoutes are about backups of the pool's metadata.
func backupRoutes() []route {
	return []route{
		{
			method: "POST", path: "/v1/pool/backups", summary: "Back up the pool's metadata now",
			doc:     operationDoc,
			query:   []param{paramOp, paramWait},
			replies: operationReplies,
			codes:   []api.Code{api.CodeTooMany, api.CodeUnsupported, api.CodeCancelled},
			handle:  (*server).backupPool,
		},
		{
			method: "GET", path: "/v1/pool/backups", summary: "The backups of the pool's metadata, the newest first",
			replies: map[int]any{200: api.Backups{}},
			codes:   []api.Code{api.CodeUnsupported},
			handle:  (*server).backupList,
		},
	}
}

func noBackups() error {
	return api.Errorf(api.CodeUnsupported, "the metadata of this pool cannot be backed up while it is open")
}

func (s *server) backupPool(q *request) (int, any, error) {
	if s.backups == nil {
		return 0, nil, noBackups()
	}
	return s.background(q, "backup", "pool", nil, func(ctx context.Context, _ *operation) (any, error) {
		return s.backups.make(ctx, true)
	})
}

func (s *server) backupList(q *request) (int, any, error) {
	if s.backups == nil {
		return 0, nil, noBackups()
	}
	list, err := backup.List(s.backups.dir)
	if list == nil {
		list = []backup.Info{}
	}
	return http.StatusOK, api.Backups{BackupStatus: s.backups.status(), Items: list}, err
}
