package catalog

import (
	"context"
	"errors"
	"fmt"

	"go.etcd.io/bbolt"

	"mica/thin"
)

// recover compares file and pool, decides whether the catalog may change anything, turns
// leftover reservations into removals and marks the file as open. It changes nothing in the
// pool, so that a crash in it is repeated harmlessly.
func (c *Catalog) recover(ctx context.Context) error {
	status, err := c.pool.Status(ctx)
	if err != nil {
		return fmt.Errorf("catalog %s: pool status: %w", c.o.Path, err)
	}
	devs, err := c.pool.Devices(ctx)
	if err != nil {
		return fmt.Errorf("catalog %s: pool devices: %w", c.o.Path, err)
	}
	exists := make(map[thin.DevID]bool, len(devs))
	for _, d := range devs {
		exists[d.ID] = true
	}

	fresh := false
	if err := c.db.View(func(tx *bbolt.Tx) error {
		fresh = tx.Bucket(bucketMeta) == nil
		return nil
	}); err != nil {
		return err
	}
	if fresh {
		if err := c.fault("open:before-init"); err != nil {
			return err
		}
		err := c.db.Update(func(tx *bbolt.Tx) error { return initialize(tx, status.TransactionID) })
		if err != nil {
			return fmt.Errorf("catalog %s: %w", c.o.Path, err)
		}
		if err := c.fault("open:after-init"); err != nil {
			return err
		}
	}

	var s fileState
	if err := c.db.View(s.read); err != nil {
		return fmt.Errorf("catalog %s: %w", c.o.Path, err)
	}
	c.storeID, c.txid, c.next = s.storeID, s.txid, s.next
	c.findBroken(s.records, exists)

	verdict := s.compare(status.TransactionID, fresh)
	if verdict != nil && !c.o.AcceptPool {
		c.readOnly = fmt.Errorf("catalog %s: %w: %w", c.o.Path, ErrReadOnly, verdict)
		c.log.Error("catalog opens read-only", "catalog", c.o.Path, "reason", verdict)
		return nil
	}
	drop := verdict != nil // AcceptPool: the intents are of another moment
	if drop {
		c.log.Warn("catalog takes over the pool's transaction id", "catalog", c.o.Path,
			"catalog_txid", s.txid, "pool_txid", status.TransactionID)
	}
	if err := c.fault("open:before-recover"); err != nil {
		return err
	}
	removals := map[thin.DevID]Removal{}
	err = c.db.Update(func(tx *bbolt.Tx) error {
		for id, m := range s.removals {
			if drop {
				if err := tx.Bucket(bucketRemovals).Delete(idKey(id)); err != nil {
					return err
				}
				continue
			}
			removals[id] = m
		}
		for _, id := range s.reserved {
			if err := tx.Bucket(bucketReserved).Delete(idKey(id)); err != nil {
				return err
			}
			if exists[id] && !drop {
				m := Removal{Device: id, Object: "unfinished operation", Since: now()}
				if err := (&Tx{tx: tx}).Remove(m); err != nil {
					return err
				}
				removals[id] = m
			}
		}
		m := tx.Bucket(bucketMeta)
		if err := m.Delete(keyClean); err != nil {
			return err
		}
		return putUint(m, keyTxID, status.TransactionID)
	})
	if err != nil {
		return fmt.Errorf("catalog %s: %w", c.o.Path, err)
	}
	c.txid = status.TransactionID
	for _, r := range s.records {
		if r.Device != 0 {
			c.taken[r.Device] = struct{}{}
		}
	}
	for id := range exists {
		c.taken[id] = struct{}{}
	}
	for id, m := range removals {
		c.taken[id] = struct{}{}
		c.dels[id] = &deletion{m: m, intent: true}
	}
	return c.fault("open:after-recover")
}

// fileState is what a file holds.
type fileState struct {
	storeID  string
	txid     uint64
	next     thin.DevID
	clean    bool
	records  []Record
	reserved []thin.DevID
	removals map[thin.DevID]Removal
}

func (s *fileState) read(tx *bbolt.Tx) error {
	m := tx.Bucket(bucketMeta)
	for _, b := range [][]byte{bucketObjects, bucketReserved, bucketRemovals, bucketMeta} {
		if tx.Bucket(b) == nil {
			return fmt.Errorf("bucket %q is missing", b)
		}
	}
	if v := string(m.Get(keySchema)); v != schemaVersion {
		return fmt.Errorf("schema version %q, this build knows %q", v, schemaVersion)
	}
	var err error
	if s.txid, err = getUint(m, keyTxID); err != nil {
		return err
	}
	n, err := getUint(m, keyNext)
	if err != nil {
		return err
	}
	s.next = thin.DevID(n)
	if n < uint64(FirstID) || n > uint64(thin.MaxDevID) {
		s.next = FirstID
	}
	s.storeID = string(m.Get(keyStoreID))
	s.clean = m.Get(keyClean) != nil
	if err := (&Tx{tx: tx}).all(func(r Record) error {
		s.records = append(s.records, r)
		return nil
	}); err != nil {
		return err
	}
	err = tx.Bucket(bucketReserved).ForEach(func(k, _ []byte) error {
		id, err := parseID(k)
		s.reserved = append(s.reserved, id)
		return err
	})
	if err != nil {
		return err
	}
	s.removals = map[thin.DevID]Removal{}
	return tx.Bucket(bucketRemovals).ForEach(func(k, v []byte) error {
		id, err := parseID(k)
		if err != nil {
			return err
		}
		m, err := decodeRemoval(id, v)
		s.removals[id] = m
		return err
	})
}

// compare returns nil if a pool at transaction id pool belongs to the file, also after a crash
// between the pool's step and the file's commit; otherwise which of the two is old.
func (s *fileState) compare(pool uint64, fresh bool) error {
	switch {
	case fresh || pool == s.txid:
		return nil
	case pool == s.txid+1 && !s.clean:
		return nil
	case pool > s.txid:
		return fmt.Errorf("the catalog is older than the pool (transaction id %d, the pool has %d): "+
			"it was restored from a copy; bring back the newer catalog, or accept the pool as it is (mica serve --accept-pool)", s.txid, pool)
	default:
		return fmt.Errorf("the pool is older than the catalog (transaction id %d, the catalog has %d): "+
			"it was restored from a copy; bring back the newer pool, or accept the pool as it is (mica serve --accept-pool)", pool, s.txid)
	}
}

// findBroken fills c.broken: records whose device is missing, and what was made from them.
func (c *Catalog) findBroken(records []Record, exists map[thin.DevID]bool) {
	byRef := make(map[string]Record, len(records))
	for _, r := range records {
		byRef[r.Ref()] = r
	}
	state := map[string]int{} // 1: being looked at, 2: done
	var look func(ref string) string
	look = func(ref string) string {
		r, ok := byRef[ref]
		if !ok {
			return fmt.Sprintf("%s is missing from the catalog", ref)
		}
		switch state[ref] {
		case 2:
			return c.broken[ref]
		case 1:
			return fmt.Sprintf("%s is its own parent", ref)
		}
		state[ref] = 1
		why := ""
		if r.Device != 0 && !exists[r.Device] {
			why = fmt.Sprintf("device %d is missing from the pool", r.Device)
		} else if r.Parent != "" {
			if w := look(r.Parent); w != "" {
				why = fmt.Sprintf("made from %s: %s", r.Parent, w)
			}
		}
		state[ref] = 2
		if why != "" {
			c.broken[ref] = why
		}
		return why
	}
	for _, r := range records {
		look(r.Ref())
	}
	for ref, why := range c.broken {
		c.log.Warn("catalog: broken record", "object", ref, "reason", why)
	}
}

func errText(err error) string {
	if err == nil {
		return ""
	}
	if errors.Is(err, context.Canceled) {
		return "stopped"
	}
	return err.Error()
}
