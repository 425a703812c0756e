package catalog

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"time"

	"go.etcd.io/bbolt"

	"mica/thin"
)

// The file: a bbolt database with four buckets.
//
//	meta      schema -> "1"; store_id -> 16 hex digits; txid, next -> uint64 big-endian;
//	          clean -> "1" while the catalog is closed, absent while it is open
//	objects   kind/key -> Record (JSON)
//	reserved  device id (uint32 big-endian) -> "": may exist in the pool, deleted at open
//	removals  device id (uint32 big-endian) -> Removal (JSON): being deleted
const schemaVersion = "1"

var (
	bucketMeta     = []byte("meta")
	bucketObjects  = []byte("objects")
	bucketReserved = []byte("reserved")
	bucketRemovals = []byte("removals")

	keySchema  = []byte("schema")
	keyStoreID = []byte("store_id")
	keyTxID    = []byte("txid")
	keyNext    = []byte("next")
	keySeq     = []byte("seq")
	keyClean   = []byte("clean")
)

// A Record is one object. Kind and Key name it; Key may hold slashes, Kind may not.
type Record struct {
	Kind   string          `json:"-"`
	Key    string          `json:"-"`
	Device thin.DevID      `json:"device,omitempty"` // 0: the object has no device of its own
	Parent string          `json:"parent,omitempty"` // Ref of the record that it was made from
	Body   json.RawMessage `json:"body,omitempty"`   // the owner's
}

// Ref names the record: kind/key.
func (r Record) Ref() string { return r.Kind + "/" + r.Key }

// A Removal is the intent to delete a device.
type Removal struct {
	Device thin.DevID      `json:"-"`
	Object string          `json:"object"` // what it was, for people
	Since  time.Time       `json:"since"`
	Body   json.RawMessage `json:"body,omitempty"` // the owner's
}

func idKey(id thin.DevID) []byte { return binary.BigEndian.AppendUint32(nil, uint32(id)) }

func parseID(k []byte) (thin.DevID, error) {
	if len(k) != 4 {
		return 0, fmt.Errorf("device id key of %d bytes, want 4", len(k))
	}
	id := thin.DevID(binary.BigEndian.Uint32(k))
	if id > thin.MaxDevID {
		return 0, fmt.Errorf("device id %d is over 24 bits", id)
	}
	return id, nil
}

func putUint(b *bbolt.Bucket, key []byte, v uint64) error {
	return b.Put(key, binary.BigEndian.AppendUint64(nil, v))
}

func getUint(b *bbolt.Bucket, key []byte) (uint64, error) {
	v := b.Get(key)
	if len(v) != 8 {
		return 0, fmt.Errorf("catalog: meta %q has %d bytes, want 8", key, len(v))
	}
	return binary.BigEndian.Uint64(v), nil
}

// A Tx reads, and inside a step changes, the records. It is valid inside the callback only.
type Tx struct {
	tx      *bbolt.Tx
	removed []Removal
	gone    []string // refs of records that were dropped
	put     []Record
}

// Get returns a record; ErrNoRecord if there is none.
func (t *Tx) Get(kind, key string) (Record, error) {
	v := t.tx.Bucket(bucketObjects).Get([]byte(kind + "/" + key))
	if v == nil {
		return Record{}, fmt.Errorf("%s %q: %w", kind, key, ErrNoRecord)
	}
	return decodeRecord(kind, key, v)
}

func decodeRecord(kind, key string, v []byte) (Record, error) {
	r := Record{Kind: kind, Key: key}
	if err := json.Unmarshal(v, &r); err != nil {
		return r, fmt.Errorf("catalog: %s %q: %w", kind, key, err)
	}
	if r.Device > thin.MaxDevID {
		return r, fmt.Errorf("catalog: %s %q: device id %d is over 24 bits", kind, key, r.Device)
	}
	return r, nil
}

// Put writes a record, new or not.
func (t *Tx) Put(r Record) error {
	v, err := json.Marshal(r)
	if err != nil {
		return err
	}
	t.put = append(t.put, Record{Kind: r.Kind, Key: r.Key, Device: r.Device})
	return t.tx.Bucket(bucketObjects).Put([]byte(r.Ref()), v)
}

// Delete drops a record. Its device, if it has one, must get an intent (Remove) in the same step
// or go to another record; otherwise it becomes foreign.
func (t *Tx) Delete(kind, key string) error {
	t.gone = append(t.gone, kind+"/"+key)
	return t.tx.Bucket(bucketObjects).Delete([]byte(kind + "/" + key))
}

// Remove writes the intent to delete a device. The background queue deletes it after the step.
func (t *Tx) Remove(m Removal) error {
	v, err := json.Marshal(m)
	if err != nil {
		return err
	}
	t.removed = append(t.removed, m)
	return t.tx.Bucket(bucketRemovals).Put(idKey(m.Device), v)
}

// Each calls fn for the records of a kind whose key begins with prefix and lies after the key
// after, in the order of their keys, until fn returns false.
func (t *Tx) Each(kind, prefix, after string, fn func(Record) (bool, error)) error {
	c := t.tx.Bucket(bucketObjects).Cursor()
	base := kind + "/"
	start := base + prefix
	if a := base + after; after != "" && a > start {
		start = a
	}
	for k, v := c.Seek([]byte(start)); k != nil; k, v = c.Next() {
		key := string(k)
		if len(key) < len(base+prefix) || key[:len(base+prefix)] != base+prefix {
			return nil
		}
		key = key[len(base):]
		if after != "" && key <= after {
			continue
		}
		r, err := decodeRecord(kind, key, v)
		if err != nil {
			return err
		}
		more, err := fn(r)
		if err != nil || !more {
			return err
		}
	}
	return nil
}

// all calls fn for every record.
func (t *Tx) all(fn func(Record) error) error {
	return t.tx.Bucket(bucketObjects).ForEach(func(k, v []byte) error {
		kind, key, ok := cutRef(string(k))
		if !ok {
			return fmt.Errorf("catalog: key %q has no kind", k)
		}
		r, err := decodeRecord(kind, key, v)
		if err != nil {
			return err
		}
		return fn(r)
	})
}

// Seq returns the next number of a counter that never goes back. Inside a step only.
func (t *Tx) Seq() (uint64, error) {
	b := t.tx.Bucket(bucketMeta)
	n, err := getUint(b, keySeq)
	if err != nil {
		return 0, err
	}
	return n + 1, putUint(b, keySeq, n+1)
}

func cutRef(s string) (kind, key string, ok bool) {
	for i := 0; i < len(s); i++ {
		if s[i] == '/' {
			return s[:i], s[i+1:], i > 0
		}
	}
	return "", "", false
}
