package layer

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"mica/engine/user"
	"mica/export/fuse"
	"mica/internal/storetest"
)

var modelOps = flag.Int("layer.ops", 120, "operations of the layer model test on the real engine")

// TestModel runs random operations on real file systems against maps of files.
func TestModel(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	if v := os.Getenv("LAYER_SEED"); v != "" {
		fmt.Sscan(v, &seed)
	}
	if raceEnabled && *modelOps == 120 {
		*modelOps = 25
	}
	t.Logf("seed %d (LAYER_SEED), %d operations (-layer.ops)", seed, *modelOps)
	rng := rand.New(rand.NewPCG(seed, 3))
	r := newRig(t)
	r.o.BaseSize = 256 << 20
	s := r.open()
	bg := context.Background()
	first := map[string]string{"a": "a", "dir/b": strings.Repeat("b", 100000)}
	importImage(t, s, "img0", []file{{name: "a", data: "a"}, {name: "dir/b", data: first["dir/b"]}})
	start := r.used()
	images := map[string]map[string]string{"img0": first}
	type cont struct {
		files map[string]string
		snaps map[string]map[string]string
	}
	conts := map[string]*cont{}
	pickOf := func(names []string) string { return names[rng.IntN(len(names))] }
	var ops []string
	check := func(name string) {
		if got, want := contents(r, name), conts[name].files; !cmp.Equal(got, want) {
			t.Fatalf("container %s: %s\n%s", name, cmp.Diff(want, got), strings.Join(ops, "\n"))
		}
	}
	serial := 0
	for i := range *modelOps {
		names := slices.Sorted(maps.Keys(conts))
		op := rng.IntN(20)
		if len(names) == 0 {
			op = 0
		}
		say := func(format string, a ...any) { ops = append(ops, fmt.Sprintf("%d ", i)+fmt.Sprintf(format, a...)) }
		fail := func(err error) {
			if err != nil {
				t.Fatalf("%v\n%s", err, strings.Join(ops, "\n"))
			}
		}
		serial++
		switch {
		case op < 3 && len(names) < 8:
			n, img := fmt.Sprintf("c%d", serial), pickOf(slices.Sorted(maps.Keys(images)))
			say("create %s of %s", n, img)
			_, _, err := s.Create(bg, CreateOptions{Name: n, Image: img})
			fail(err)
			conts[n] = &cont{maps.Clone(images[img]), map[string]map[string]string{}}
		case op < 9 && len(names) > 0: // write, overwrite, delete
			n := pickOf(names)
			say("change %s", n)
			c := conts[n]
			live := rng.IntN(2) == 0
			r.mounted(n, func(dir string) {
				for range 1 + rng.IntN(5) {
					f := fmt.Sprintf("%s%d", []string{"", "dir/", "d2/"}[rng.IntN(3)], rng.IntN(8))
					if _, ok := c.files[f]; ok && rng.IntN(3) == 0 {
						fail(os.Remove(filepath.Join(dir, f)))
						delete(c.files, f)
						continue
					}
					data := strings.Repeat(fmt.Sprint(rng.IntN(1000), " "), rng.IntN(60000))
					write(t, dir, f, data)
					c.files[f] = data
				}
				if live { // while mounted
					sn := fmt.Sprintf("live%d", serial)
					say("snapshot %s while mounted", n)
					snap, err := s.Snapshot(bg, n, SnapshotOptions{Name: sn})
					fail(err)
					if snap.Level != LevelFileSystem {
						t.Fatalf("level %s", snap.Level)
					}
					c.snaps[sn] = maps.Clone(c.files)
				}
			})
		case op < 11 && len(names) > 0 && len(names) < 8:
			n, f := pickOf(names), fmt.Sprintf("f%d", serial)
			say("fork %s to %s", n, f)
			_, err := s.Fork(bg, n, ForkOptions{Names: []string{f}})
			fail(err)
			conts[f] = &cont{maps.Clone(conts[n].files), map[string]map[string]string{}}
		case op < 13 && len(names) > 0:
			n := pickOf(names)
			if len(conts[n].snaps) == 0 {
				continue
			}
			sn := pickOf(slices.Sorted(maps.Keys(conts[n].snaps)))
			say("roll back %s to %s", n, sn)
			_, err := s.Rollback(bg, n, sn)
			fail(err)
			conts[n].files = maps.Clone(conts[n].snaps[sn])
		case op < 14 && len(names) > 0 && len(images) < 5:
			n, img := pickOf(names), fmt.Sprintf("img%d", serial)
			say("commit %s to %s", n, img)
			_, err := s.Commit(bg, n, CommitOptions{Image: img})
			fail(err)
			images[img] = maps.Clone(conts[n].files)
		case op < 15 && len(images) > 1:
			img := pickOf(slices.Sorted(maps.Keys(images)))
			if img == "img0" {
				continue
			}
			say("remove image %s", img)
			fail(s.RemoveImage(bg, img))
			delete(images, img)
		case op < 17 && len(names) > 0:
			n := pickOf(names)
			say("remove %s", n)
			fail(s.Remove(bg, n, RemoveOptions{Snapshots: true}))
			delete(conts, n)
		case op < 18 && len(names) > 0:
			n := pickOf(names)
			for sn := range conts[n].snaps {
				say("remove snapshot %s of %s", sn, n)
				fail(s.RemoveSnapshot(bg, n, sn))
				delete(conts[n].snaps, sn)
				break
			}
		case op < 19 && len(names) > 0:
			n := pickOf(names)
			say("check %s", n)
			check(n)
		default:
			say("restart")
			s = r.reopen()
		}
	}
	for _, n := range slices.Sorted(maps.Keys(conts)) {
		check(n)
		c := must[Container](t)(s.Container(bg, n))
		own, err := r.pool.OwnBlocks(bg, c.Device)
		ok(t, err)
		if c.UsedBytes != int64(own)*s.block {
			t.Errorf("container %s uses %d bytes, a count says %d", n, c.UsedBytes, int64(own)*s.block)
		}
		r.fsck(n)
		for sn, want := range conts[n].snaps {
			must[Container](t)(s.Rollback(bg, n, sn))
			if got := contents(r, n); !cmp.Equal(got, want) {
				t.Errorf("snapshot %s of %s: %s", sn, n, cmp.Diff(want, got))
			}
		}
		ok(t, s.Remove(bg, n, RemoveOptions{Snapshots: true}))
	}
	for img := range images {
		if img != "img0" {
			ok(t, s.RemoveImage(bg, img))
		}
	}
	if n := r.used(); n != start {
		t.Errorf("pool uses %d blocks at the end, %d at the start", n, start)
	}
}

// serveRole is a daemon that works until it is killed and says what it has done.
func serveRole(dir string) error {
	ctx := context.Background()
	o := rigOptions(dir, slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelError})))
	o.BaseSize = 256 << 20
	pool, err := user.Open(ctx, user.Location{Dir: filepath.Join(dir, "pool")}, user.Options{Logger: o.Logger})
	if err != nil {
		return err
	}
	e, err := fuse.New(fuse.Options{RunDir: o.Run, LinkDir: filepath.Join(dir, "links"), Logger: o.Logger, HelperCommand: storetest.Role("fuse-helper")})
	if err != nil {
		return err
	}
	o.Pool, o.Exporter = pool, e
	s, err := Open(ctx, o)
	if err != nil {
		return err
	}
	rng := rand.New(rand.NewPCG(uint64(time.Now().UnixNano()), 0))
	var names []string
	for _, c := range first2(s.Containers(ctx, Filter{})) {
		names = append(names, c.Name)
	}
	for i := 0; ; i++ {
		n := fmt.Sprintf("k%d-%d", os.Getpid(), i)
		switch op := rng.IntN(10); {
		case op < 3 || len(names) == 0:
			fmt.Println("begin create", n)
			if _, _, err := s.Create(ctx, CreateOptions{Name: n, Image: "a"}); err != nil {
				return err
			}
			fmt.Println("done create", n)
			names = append(names, n)
		case op < 5:
			fmt.Println("begin create", n)
			if _, err := s.Fork(ctx, names[rng.IntN(len(names))], ForkOptions{Names: []string{n}}); err != nil {
				return err
			}
			fmt.Println("done create", n)
			names = append(names, n)
		case op < 6:
			if _, err := s.Resize(ctx, names[rng.IntN(len(names))], int64(300+rng.IntN(50))<<20); err != nil && !errors.Is(err, ErrInvalid) {
				return err
			}
		case op < 7:
			n := names[rng.IntN(len(names))]
			if _, err := s.Attach(ctx, n, AttachOptions{}); err != nil {
				return err
			}
			if rng.IntN(2) == 0 {
				if err := s.Detach(ctx, n, DetachOptions{}); err != nil {
					return err
				}
			}
		default:
			k := rng.IntN(len(names))
			fmt.Println("begin remove", names[k])
			if err := s.Remove(ctx, names[k], RemoveOptions{}); err != nil {
				return err
			}
			fmt.Println("done remove", names[k])
			names = slices.Delete(names, k, k+1)
		}
	}
}

func first2[T any](v T, _ error) T { return v }

// A daemon is killed in the middle of its work, again and again: what it said is done is done,
// the rest is done or not, and nothing is left over.
func TestKill(t *testing.T) {
	r := newRig(t)
	r.o.BaseSize = 256 << 20
	s := r.open()
	importImage(t, s, "a", []file{{name: "a", data: "a"}})
	ctx := tctx(t)
	have := map[string]bool{}
	rounds := 6
	if raceEnabled {
		rounds = 2
	}
	for round := range rounds {
		r.close()
		cmd := exec.Command(storetest.Role("serve")[0], storetest.Role("serve", r.dir)[1:]...)
		cmd.Stderr = os.Stderr
		out, err := cmd.StdoutPipe()
		ok(t, err)
		ok(t, cmd.Start())
		begun := map[string]string{}
		done := 0
		lines := bufio.NewScanner(out)
		kill := time.AfterFunc(time.Duration(400+round*150)*time.Millisecond, func() { cmd.Process.Kill() })
		for lines.Scan() {
			var what, op, n string
			fmt.Sscan(lines.Text(), &what, &op, &n)
			if what == "begin" {
				begun[n] = op
				continue
			}
			delete(begun, n)
			done++
			if op == "create" {
				have[n] = true
			} else {
				delete(have, n)
			}
		}
		kill.Stop()
		err = cmd.Wait()
		if err == nil || !strings.Contains(err.Error(), "killed") {
			t.Fatalf("the daemon ended by itself: %v", err)
		}
		s = r.open()
		got := map[string]bool{}
		for _, c := range must[[]Container](t)(s.Containers(ctx, Filter{})) {
			got[c.Name] = true
			if begun[c.Name] == "create" {
				have[c.Name] = true
			}
		}
		for n, op := range begun {
			if op == "remove" && !got[n] {
				delete(have, n)
			}
		}
		if !cmp.Equal(got, have) {
			t.Fatalf("round %d: %s", round, cmp.Diff(have, got))
		}
		ok(t, s.WaitQueue(ctx))
		st := must[Status](t)(s.Status(ctx))
		devs, err := r.pool.Devices(ctx)
		ok(t, err)
		if len(devs) != 2+len(have) || len(st.Foreign)+len(st.Broken) != 0 || st.ReadOnly != "" {
			t.Fatalf("round %d: %d devices for %d containers, status %+v", round, len(devs), len(have), st)
		}
		t.Logf("round %d: %d operations, %d containers, %d attached", round, done, len(have), st.Attached)
		for n := range have { // each is a file system
			if m := contents(r, n); m["a"] != "a" {
				t.Errorf("container %s holds %v", n, m)
			}
			break
		}
	}
}

// Deleting the catalog deletes no device; plumbing's devices survive restarts.
func TestLostCatalog(t *testing.T) {
	r := newRig(t)
	r.o.BaseSize = 256 << 20
	s, ctx := r.openImage()
	create(t, s, "c", "a")
	ok(t, r.pool.CreateThin(ctx, 5)) // by hand
	r.close()
	ok(t, os.Remove(filepath.Join(r.dir, "root/catalog.db")))
	for range 10 {
		s = r.open()
		ok(t, s.WaitQueue(ctx))
		<-s.base.ready
		st := must[Status](t)(s.Status(ctx))
		if len(st.Foreign) != 4 || !slices.Contains(st.Foreign, 5) || st.Containers != 0 {
			t.Fatalf("status %+v", st)
		}
		r.close()
	}
	s = r.open()
	importImage(t, s, "a", []file{{name: "a", data: "a"}})
	create(t, s, "c", "a")
	if got := contents(r, "c"); got["a"] != "a" {
		t.Errorf("contents %v", got)
	}
	if st := must[Status](t)(s.Status(ctx)); len(st.Foreign) != 4 {
		t.Errorf("status %+v", st)
	}
}
