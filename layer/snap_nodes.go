package layer

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
)

// A SnapNode is a node of a snapshot, or of the views of one.
type SnapNode struct {
	Object string // "snap/mica/default/3/web", "view/65540"
	ID     string // of the attachment
	Node   string
}

// SnapNodes lists the nodes of snapshots that are there now.
func (s *Store) SnapNodes() []SnapNode {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []SnapNode
	for _, l := range s.live {
		if l.snap != "" && l.a != nil {
			out = append(out, SnapNode{l.snap, l.id, l.a.Node()})
		}
	}
	slices.SortFunc(out, func(a, b SnapNode) int { return strings.Compare(a.Object+a.ID, b.Object+b.ID) })
	return out
}

// DetachSnaps takes the nodes of all snapshots away, for a shutdown. They come back at the next
// start, or when their mounts are asked for. busy says which are in use, and by whom.
func (s *Store) DetachSnaps(ctx context.Context) (busy []string, err error) {
	for _, n := range s.SnapNodes() {
		err := s.detachSnap(ctx, n)
		if errors.Is(err, ErrBusy) {
			busy = append(busy, fmt.Sprintf("%s: %v", n.Object, err))
		} else if err != nil {
			return busy, fmt.Errorf("detach %s: %w", n.Object, err)
		}
	}
	return busy, nil
}

func (s *Store) detachSnap(ctx context.Context, n SnapNode) error {
	unlock, err := s.locks.lock(ctx, n.Object)
	if err != nil {
		return err
	}
	defer unlock()
	l := s.liveOf(n.ID)
	if l == nil {
		return nil
	}
	if err := s.endLive(ctx, l); err != nil && s.liveOf(n.ID) != nil {
		return err
	}
	if l.ro || l.own < 0 {
		return nil
	}
	// What was counted is kept: nobody writes to it any more.
	_, err = s.editSnap(ctx, strings.TrimPrefix(n.Object, kindSnap+"/"), func(b *snapBody) error {
		if b.ID == n.ID {
			b.setOwn(l.own)
		}
		return nil
	})
	if errors.Is(err, ErrNotFound) {
		return nil // it was removed, and only its node was left
	}
	return err
}
