package layer

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"mica/engine"
	"mica/layer/catalog"
	"mica/layer/helper"
	"mica/layer/ondisk"
	"mica/thin"
)

// freeBlocksForFreeze is how many data blocks must be free before a file system is frozen: its
// last writes may need some, and nobody can be asked to make room while it is.
const freeBlocksForFreeze = 16

// freezeTries is how often a freeze that took too long is tried again.
const freezeTries = 3

// A frozenRecord is written under RUN before a file system is frozen, and removed when it is
// surely thawed.
type frozenRecord struct {
	ID     string    `json:"id"` // attachment
	Node   string    `json:"node"`
	FSType string    `json:"fs_type"`
	Pid    int       `json:"pid"`
	Since  time.Time `json:"since"`
}

// takeCopy makes one copy of a container's contents as of now under a new id, consistent as the
// level says. The copy has no record yet: the id goes into a step's Consume, or to Abandon. own
// are the blocks that the copy itself needed. The caller holds the container's lock.
func (s *Store) takeCopy(ctx context.Context, c record[containerBody], q QuiesceOptions) (id thin.DevID, level Level, own int64, err error) {
	frozen := false
	for try := 1; ; try++ {
		ids, err := s.cat.Alloc(ctx, 1)
		if err != nil {
			return 0, "", 0, s.wrap(err)
		}
		id = ids[0]
		level, frozen, err = s.snapshotNow(ctx, c, id, q)
		if err == nil {
			break
		}
		if !errors.Is(err, helper.ErrTimeout) || try == freezeTries || ctx.Err() != nil {
			return 0, "", 0, err
		}
	}
	defer func() {
		if err != nil {
			s.cat.Abandon(id)
		}
	}()
	if c.body.GuestOwned && !q.TrustGuest {
		return id, level, 0, nil // the host keeps its hands off
	}
	clean, err := s.isClean(ctx, id, c.body.SizeBytes, c.body.FSType)
	if err != nil || clean {
		return id, level, 0, err
	}
	if level == LevelFileSystem && !frozen {
		level = LevelCrash // nobody had it mounted, and nobody had unmounted it in order
	}
	err = s.work(ctx, id, c.body.SizeBytes, false, func(w *work) error {
		return s.files.Replay(ctx, w.node(), c.body.FSType)
	}, &own)
	if err != nil {
		err = fmt.Errorf("replay the journal of the copy: %w", err)
	}
	return id, level, own, err
}

// snapshotNow makes device id a snapshot of the container, quiesced as far as it can be; frozen
// says whether a mounted file system was. After an error the id has been seen to.
func (s *Store) snapshotNow(ctx context.Context, c record[containerBody], id thin.DevID, q QuiesceOptions) (level Level, frozen bool, err error) {
	create := []catalog.Create{{ID: id, Origin: c.Device}}
	l := s.liveOf(c.body.ID)
	switch {
	case q.Quiesced:
		level = LevelCaller
	case l == nil && c.body.GuestOwned:
		level = LevelCrash
	case l == nil || l.ro:
		level = LevelFileSystem
	case l.n != nil || c.body.GuestOwned && !q.TrustGuest:
		level = LevelCrash
	default:
		return s.snapshotFrozen(ctx, c, l, create, q.CrashOK)
	}
	return level, false, s.cat.CreateHeld(ctx, create)
}

// snapshotFrozen freezes what somebody may have mounted from l's node, takes the snapshot and
// thaws.
func (s *Store) snapshotFrozen(ctx context.Context, c record[containerBody], l *live, create []catalog.Create, crashOK bool) (Level, bool, error) {
	release := func(err error) (Level, bool, error) {
		s.cat.Release(create[0].ID)
		return "", false, err
	}
	st, err := s.pool.Status(ctx)
	if err != nil {
		return release(err)
	}
	free := int64(st.DataBlocks) - int64(st.DataUsed) - int64(st.DataFreeing)
	if st.Mode != engine.ModeWrite.String() || free < freeBlocksForFreeze {
		return release(fmt.Errorf("freeze container %q: %w: pool is %s, %d data blocks free, want %d",
			c.Key, ErrNoSpace, st.Mode, free, freeBlocksForFreeze))
	}
	node := l.a.Node()
	path, err := s.noteFreeze(frozenRecord{ID: l.id, Node: node, FSType: c.body.FSType, Pid: os.Getpid(), Since: now()})
	if err != nil {
		return release(err)
	}
	f, err := s.files.FreezeNode(ctx, node, c.body.FSType, path)
	if err != nil {
		// A helper that answered has taken back what it did, and somebody else's freeze is
		// not ours to take back.
		var answered *helper.Error
		if errors.As(err, &answered) {
			os.Remove(path)
		} else {
			s.thawLater(path, l)
		}
		return release(fmt.Errorf("freeze container %q: %w", c.Key, err))
	}
	level := LevelFileSystem
	if f.State == helper.StateForeign {
		if !crashOK {
			os.Remove(path)
			return release(fmt.Errorf("container %q: %w: its node is held by something that is not a mounted file system, "+
				"which cannot be frozen; accept a crash-consistent copy to go on", c.Key, ErrBusy))
		}
		level = LevelCrash
	}
	err = s.cat.CreateHeld(ctx, create)
	if terr := f.Thaw(context.WithoutCancel(ctx)); errors.Is(terr, helper.ErrTimeout) {
		os.Remove(path)
		if err == nil && !crashOK {
			s.cat.Abandon(create[0].ID)
			err = fmt.Errorf("container %q: %w", c.Key, terr)
		}
		level = LevelCrash
	} else if terr != nil {
		s.thawLater(path, l)
		if err == nil {
			s.log.Error("thaw", "container", c.Key, "err", terr)
		}
	} else {
		os.Remove(path)
	}
	return level, f.State == helper.StateFrozen, err
}

// noteFreeze writes a record so that it is there even if this process is killed right after.
func (s *Store) noteFreeze(r frozenRecord) (path string, err error) {
	b, err := json.Marshal(r)
	if err != nil {
		return "", err
	}
	path = filepath.Join(s.freezes, r.ID+".json")
	if err := os.WriteFile(path, b, 0o600); err != nil {
		return "", fmt.Errorf("record of the freeze: %w", err)
	}
	return path, nil
}

// thawLater takes a freeze back in the background, as often as it takes.
func (s *Store) thawLater(path string, l *live) {
	s.task(func(ctx context.Context) {
		for wait := 50 * time.Millisecond; ctx.Err() == nil; wait = min(2*wait, 5*time.Second) {
			if err := s.thawRecord(ctx, path); err == nil {
				return
			} else if s.liveOf(l.id) != l {
				os.Remove(path)
				return
			} else {
				s.log.Error("thaw", "record", path, "err", err)
			}
			sleep(ctx, wait)
		}
	})
}

// thawAll takes back what a predecessor may have left frozen.
func (s *Store) thawAll(ctx context.Context) error {
	list, err := os.ReadDir(s.freezes)
	if err != nil {
		return fmt.Errorf("records of freezes: %w", err)
	}
	for _, e := range list {
		if !strings.HasSuffix(e.Name(), ".json") {
			continue
		}
		path := filepath.Join(s.freezes, e.Name())
		if err := s.thawRecord(ctx, path); err != nil {
			s.log.Error("thaw", "record", path, "err", err)
			var r frozenRecord
			if b, rerr := os.ReadFile(path); rerr == nil && json.Unmarshal(b, &r) == nil {
				if l := s.liveOf(r.ID); l != nil {
					s.thawLater(path, l)
				}
			}
		}
	}
	return nil
}

// thawRecord thaws what a record names, if its node is still ours, and removes the record. It fails
// while the helper that was to freeze has not ended: it could do so yet.
func (s *Store) thawRecord(ctx context.Context, path string) error {
	f, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return fmt.Errorf("the helper that was to freeze it has not ended: %w", err)
	}
	b, err := io.ReadAll(f)
	if err != nil {
		return err
	}
	var r frozenRecord
	if err := json.Unmarshal(b, &r); err != nil {
		s.log.Warn("record of a freeze cannot be read", "record", path, "err", err)
		return os.Remove(path)
	}
	if l := s.liveOf(r.ID); l != nil && l.a != nil {
		state, err := s.files.Thaw(ctx, l.a.Node(), r.FSType)
		if err != nil {
			return err
		}
		if state == helper.StateThawed {
			s.log.Warn("thawed a file system that had been left frozen", "attachment", r.ID, "since", r.Since)
		}
	}
	return os.Remove(path)
}

// isClean tells whether a device's file system can be mounted without its journal. It reads the
// device itself, not a node.
func (s *Store) isClean(ctx context.Context, id thin.DevID, size int64, fstype string) (bool, error) {
	t, err := s.pool.Open(ctx, id, engine.OpenOptions{SizeBytes: size, ReadOnly: true})
	if err != nil {
		return false, err
	}
	defer t.Close()
	clean, err := ondisk.Clean(t, fstype)
	if err != nil {
		err = fmt.Errorf("device %d: %w", id, err)
	}
	return clean, err
}
