//go:build guest

package dmioctl

import (
	"errors"
	"fmt"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// These tests run inside the test machine (test/kernel builds and starts them), with an empty
// data disk of 64 MiB and an empty metadata disk of 4 MiB.
const (
	dataDisk = "/dev/vda"
	metaDisk = "/dev/vdb"
	sectors  = (64 << 20) / 512
)

func open(t *testing.T) *Control {
	t.Helper()
	c, err := Open()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// activate makes a device that goes with the test.
func activate(t *testing.T, c *Control, name string, table ...Target) Info {
	t.Helper()
	info, err := c.Activate(name, "", false, table...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Remove(name, false); err != nil && !errors.Is(err, unix.ENXIO) {
			t.Error(err)
		}
	})
	return info
}

func wantErr(t *testing.T, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("got error %v, want %v", err, want)
	}
}

func TestDevices(t *testing.T) {
	c := open(t)
	table := []Target{
		{Start: 0, Length: 8, Type: "linear"}, // parameters below: tables name devices by number
		{Start: 8, Length: 120, Type: "error"},
	}
	var st unix.Stat_t
	if err := unix.Stat(dataDisk, &st); err != nil {
		t.Fatal(err)
	}
	table[0].Params = LinearTarget(fmt.Sprintf("%d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev)), 16, 8).Params
	info := activate(t, c, "two", table...)

	got, err := c.Table("two")
	if err != nil || len(got) != 2 || got[0] != table[0] || got[1] != table[1] {
		t.Errorf("table: got %v (%v), want %v", got, err, table)
	}
	list, err := c.List()
	if err != nil || list["two"] != info.Dev {
		t.Errorf("list: got %v (%v), want device %d", list, err, info.Dev)
	}
	_, err = c.Create("two", "")
	wantErr(t, err, unix.EBUSY)
	_, err = c.Info("none")
	wantErr(t, err, unix.ENXIO)
	wantErr(t, c.Remove("none", false), unix.ENXIO)
	_, err = c.Activate("bad", "", false, Target{Length: 8, Type: "no-such-target"})
	wantErr(t, err, unix.EINVAL)
	if _, err = c.Info("bad"); !errors.Is(err, unix.ENXIO) {
		t.Errorf("a device with a refused table was left behind: %v", err)
	}

	if err := c.Suspend("two", false, false); err != nil {
		t.Fatal(err)
	}
	if info, err = c.Info("two"); err != nil || !info.Suspended() {
		t.Errorf("suspended device: %+v, %v", info, err)
	}
	if err := c.Resume("two"); err != nil {
		t.Fatal(err)
	}

	f, err := os.OpenFile(info.Node(), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	wantErr(t, c.Remove("two", false), unix.EBUSY)
	if err := c.Remove("two", true); err != nil {
		t.Errorf("deferred remove: %v", err)
	}
	f.Close()
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		if _, err = c.Info("two"); errors.Is(err, unix.ENXIO) {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("5 s after its last close the device is still there: %v", err)
		}
	}
}

func TestThinPool(t *testing.T) {
	c := open(t)
	pool := ThinPool{Metadata: metaDisk, Data: dataDisk, LengthSectors: sectors / 2, BlockSectors: 128, LowWaterMark: 500}
	info := activate(t, c, "pool", pool.Target())

	for id := uint32(1); id <= 2; id++ {
		if err := c.CreateThin("pool", id); err != nil {
			t.Fatal(err)
		}
	}
	wantErr(t, c.CreateThin("pool", 2), unix.EEXIST)
	wantErr(t, c.CreateThin("pool", 1<<24), unix.EINVAL)
	wantErr(t, c.CreateSnap("pool", 3, 77), unix.ENODATA)
	wantErr(t, c.DeleteThin("pool", 77), unix.ENODATA)
	wantErr(t, c.SetTransactionID("pool", 5, 6), unix.EINVAL)
	if err := c.SetTransactionID("pool", 0, 1<<40); err != nil {
		t.Fatal(err)
	}
	wantErr(t, c.ReleaseMetadataSnap("pool"), unix.EINVAL)
	if err := c.ReserveMetadataSnap("pool"); err != nil {
		t.Fatal(err)
	}
	wantErr(t, c.ReserveMetadataSnap("pool"), unix.EBUSY)
	s, err := c.PoolStatus("pool")
	if err != nil || s.TransactionID != 1<<40 || s.HeldRoot == 0 || s.Mode != "rw" || s.DataSize != 512 || s.NeedsCheck {
		t.Errorf("status %+v, %v", s, err)
	}
	if err := c.ReleaseMetadataSnap("pool"); err != nil {
		t.Fatal(err)
	}

	// 13 blocks of 512 leave less than 500 free: an event.
	before, err := c.Info("pool")
	if err != nil {
		t.Fatal(err)
	}
	event := make(chan Info, 1)
	go func() {
		after, err := c.Wait("pool", before.Event)
		if err != nil {
			t.Errorf("wait: %v", err)
		}
		event <- after
	}()
	thin := activate(t, c, "thin", ThinTarget(info.Node(), 1, 4096, ""))
	f, err := os.OpenFile(thin.Node(), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for i := int64(0); i < 14; i++ {
		if _, err := f.WriteAt([]byte("x"), i<<16); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	select {
	case after := <-event:
		if after.Event <= before.Event {
			t.Errorf("event %d after event %d", after.Event, before.Event)
		}
	case <-time.After(20 * time.Second):
		t.Fatal("no event 20 s after the low water mark was crossed")
	}
	mapped, highest, ok, err := c.ThinStatus("thin")
	if err != nil || mapped != 14*128 || highest != 14*128-1 || !ok {
		t.Errorf("thin status: %d mapped, highest %d %v, %v", mapped, highest, ok, err)
	}
	wantErr(t, c.DeleteThin("pool", 1), unix.EBUSY)

	pool.LengthSectors = sectors
	if err := c.Reload("pool", false, false, false, pool.Target()); err != nil {
		t.Fatal(err)
	}
	if s, err = c.PoolStatus("pool"); err != nil || s.DataSize != 1024 {
		t.Errorf("grown pool: %+v, %v", s, err)
	}
}
