package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"mica/thin"
)

// dumpOf is what the dump of the closed pool says about one device.
func (b *box) dumpOf(id int) string {
	b.Helper()
	xml := b.mica("thin", "dump", b.pool)
	begin := strings.Index(xml, fmt.Sprintf("<device dev_id=\"%d\"", id))
	if begin < 0 {
		b.Fatalf("device %d is gone:\n%s", id, xml)
	}
	return xml[begin : begin+strings.Index(xml[begin:], "</device>")]
}

// contents is a digest of a device of the closed pool.
func (b *box) contents(id int) string {
	b.Helper()
	out, stderr, code := b.try("thin", "read", b.pool, fmt.Sprint(id), "--length", "4M")
	if code != 0 {
		b.Fatalf("thin read: %s", stderr)
	}
	return digestOf([]byte(out))
}

// TestForeignDevicesKeepEveryByte: devices that are not in the catalog, with exactly the ids that
// the store would take next, a snapshot among them, keep every byte and every mapping over ten
// restarts, half of them kills, with work in between; also without the catalog.
func TestForeignDevicesKeepEveryByte(t *testing.T) {
	b := newBox(t)
	b.start()
	b.smallImage()
	b.figures()
	b.shutdown()
	next := 0
	for _, d := range asJSON[[]struct{ ID int }](b, "thin", "ls", b.pool) {
		next = max(next, d.ID+1)
	}
	ids := []int{next, next + 1, next + 5}
	b.mica("thin", "create", b.pool, fmt.Sprint(ids[0]))
	b.input(pattern(42, 3_000_001), "thin", "write", b.pool, fmt.Sprint(ids[0]), "--offset", "12345")
	b.mica("thin", "snap", b.pool, fmt.Sprint(ids[1]), fmt.Sprint(ids[0]))
	b.input(pattern(43, 100_000), "thin", "write", b.pool, fmt.Sprint(ids[1]), "--offset", "1M")
	b.mica("thin", "create", b.pool, fmt.Sprint(ids[2]))
	var want []thin.DevID
	var dumps, sums []string
	for _, id := range ids {
		want = append(want, thin.DevID(id))
		dumps, sums = append(dumps, b.dumpOf(id)), append(sums, b.contents(id))
	}
	check := func(when string) {
		t.Helper()
		for i, id := range ids {
			if got := b.dumpOf(id); got != dumps[i] {
				t.Errorf("%s: device %d: %s", when, id, firstDifference(got, dumps[i]))
			}
			if b.contents(id) != sums[i] {
				t.Errorf("%s: device %d has other contents", when, id)
			}
		}
	}
	for i := range 10 {
		b.start()
		if got := b.status().Store.Foreign; !slices.Equal(got, want) {
			t.Fatalf("restart %d: foreign devices %v, want %v", i, got, want)
		}
		name := fmt.Sprint("c", i)
		b.mica("create", "small", name)
		dir := b.mount(name)
		b.done(b.fill(filepath.Join(dir, "f"), "3"))
		b.mica("umount", name)
		b.mica("fork", name, name+"-a", name+"-b")
		b.mica("rm", name, name+"-a")
		if i%2 == 0 {
			b.stop(syscall.SIGTERM)
		} else {
			b.stop(syscall.SIGKILL) // with removals in the queue
		}
		check(fmt.Sprint("restart ", i))
	}
	if err := os.Remove(filepath.Join(b.root, "catalog.db")); err != nil {
		t.Fatal(err)
	}
	before := asJSON[[]struct{ ID int }](b, "thin", "ls", b.pool)
	b.start()
	b.smallImage()
	b.mica("create", "small", "new")
	b.mica("rm", "new")
	b.figures()
	b.shutdown()
	check("without the catalog")
	after := asJSON[[]struct{ ID int }](b, "thin", "ls", b.pool)
	for _, d := range before {
		if !slices.Contains(after, d) {
			t.Errorf("without the catalog device %d was deleted", d.ID)
		}
	}
}
