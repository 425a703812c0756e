package e2e

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"mica/daemon/api"
	"mica/daemon/client"
	"mica/layer"
)

// TestKilledInChurn kills the daemon 200 times at random moments, while two clients import images,
// make, write, fork, commit, roll back and remove containers. A client whose request dies with the
// daemon asks again, as programs do. In the end everything that was acknowledged is there with its
// contents, nothing else is, and the pool holds what it held before.
func TestKilledInChurn(t *testing.T) {
	kills := 200
	if testing.Short() {
		kills = 20
	}
	b := newBox(t)
	b.watchdog.Reset(3 * boxLimit)
	b.start()
	b.needResend()
	b.archive("small.tar", ociImage{name: "small", layers: [][]byte{
		tarOf(t, file{name: "etc/"}, file{name: "etc/motd", body: []byte("low\n")}, file{name: "big", body: pattern(1, 256<<10)}),
		tarOf(t, file{name: "etc/"}, file{name: "etc/motd", body: []byte("high\n")}),
	}})
	b.figures() // the base is ready
	before := b.status().Pool

	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	churns := []*churn{newChurn(b, "a", seed), newChurn(b, "b", seed+1)}
	for _, c := range churns {
		wg.Go(func() { c.run(stop) })
	}
	rng := rand.New(rand.NewPCG(seed, 3))
	slowest := time.Duration(0)
	for i := range kills {
		most := 80_000 // µs
		if i%5 == 4 {
			most = 600_000 // long enough for what takes longest
		}
		time.Sleep(time.Duration(rng.IntN(most)) * time.Microsecond)
		b.stop(syscall.SIGKILL)
		begin := time.Now()
		b.start()
		slowest = max(slowest, time.Since(begin))
		if t.Failed() {
			break
		}
	}
	close(stop)
	wg.Wait()
	ops, repeated := 0, 0
	for _, c := range churns {
		t.Logf("client %s: %d operations, %d repeated, %v", c.prefix, c.ops, c.repeated, c.counts)
		ops, repeated = ops+c.ops, repeated+c.repeated
	}
	if ops < kills/4 || repeated < kills/20 {
		t.Errorf("%d operations, %d repeated: too little between %d kills, the test tests little", ops, repeated, kills)
	}
	t.Logf("%d kills, longest start of a daemon %v", kills, slowest.Round(time.Millisecond))
	if t.Failed() {
		return
	}

	st := b.status()
	if len(st.Store.Broken) > 0 || len(st.Store.Foreign) > 0 {
		t.Errorf("broken: %v, foreign devices: %v, want none", st.Store.Broken, st.Store.Foreign)
	}
	var containers, images []string
	for _, c := range churns {
		for name, v := range c.containers {
			containers = append(containers, name)
			c.verify(name, v)
		}
		for name := range c.images {
			images = append(images, name)
		}
	}
	slices.Sort(containers)
	if got := names(asJSON[[]api.Container](b, "ls"), func(c api.Container) string { return c.Name }); !slices.Equal(got, containers) {
		t.Errorf("containers %v, want %v", got, containers)
	}
	slices.Sort(images)
	if got := names(asJSON[[]layer.Image](b, "image", "ls"), func(i layer.Image) string { return strings.TrimSuffix(i.Name, ":latest") }); !slices.Equal(got, images) {
		t.Errorf("images %v, want %v", got, images)
	}
	for _, c := range churns {
		for name, content := range c.images {
			b.mica("create", name, c.prefix+"-look")
			c.verify(c.prefix+"-look", content)
			b.mica("rm", c.prefix+"-look")
		}
	}
	if len(containers) > 0 {
		b.mica(append([]string{"rm", "--snapshots"}, containers...)...)
	}
	for _, name := range images {
		b.mica("image", "rm", name)
	}
	b.figures()
	if after := b.status().Pool; after.DataUsed != before.DataUsed || after.Devices != before.Devices {
		t.Errorf("the pool holds %d blocks and %d devices, want %d and %d as before", after.DataUsed, after.Devices, before.DataUsed, before.Devices)
	}
}

func names[T any](list []T, name func(T) string) []string {
	out := []string{}
	for _, v := range list {
		out = append(out, name(v))
	}
	slices.Sort(out)
	return out
}

// churnLimit is how long one request may be repeated.
const churnLimit = 90 * time.Second

// content is what a client knows to be in a container or an image: the text of the file that it
// writes, empty if it has written none.
type content string

// A churn is a client and what has been acknowledged to it.
type churn struct {
	b          *box
	prefix     string
	c          *client.Client
	rng        *rand.Rand
	containers map[string]content
	images     map[string]content
	next       int
	ops        int
	repeated   int
	counts     map[string]int
}

func newChurn(b *box, prefix string, seed uint64) *churn {
	return &churn{b: b, prefix: prefix, c: client.New(b.run), rng: rand.New(rand.NewPCG(seed, 1)),
		containers: map[string]content{}, images: map[string]content{}, counts: map[string]int{}}
}

func (c *churn) run(stop <-chan struct{}) {
	defer c.c.Close()
	for {
		select {
		case <-stop:
			return
		default:
		}
		if err := c.step(); err != nil {
			c.b.Errorf("client %s, operation %d: %v", c.prefix, c.ops, err)
			return
		}
		c.ops++
	}
}

// name makes one that was never there.
func (c *churn) name() string { c.next++; return fmt.Sprintf("%s-%d", c.prefix, c.next) }

func pick[V any](c *churn, m map[string]V) string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys[c.rng.IntN(len(keys))]
}

// step does one operation to its end, however often the daemon dies meanwhile, and notes what it
// made.
func (c *churn) step() error {
	ctx := context.Background()
	kind := []string{"import", "create", "write", "write", "fork", "commit", "rollback", "rm", "rmi"}[c.rng.IntN(9)]
	switch {
	case len(c.images) == 0:
		kind = "import"
	case len(c.containers) == 0:
		kind = "create"
	case len(c.containers) > 8:
		kind = "rm"
	case len(c.images) > 5:
		kind = "rmi"
	}
	c.counts[kind]++
	switch kind {
	case "import":
		name := c.name()
		err := c.again(kind+" "+name, api.CodeExists, func() error {
			op, err := c.c.ImportFile(ctx, api.ImportFile{File: c.b.path("small.tar"), ImportParams: api.ImportParams{Name: name}}, client.OpOptions{})
			if err == nil {
				_, err = c.c.Wait(ctx, op, nil)
			}
			return err
		})
		c.images[name] = ""
		return err
	case "create":
		image, name := pick(c, c.images), c.name()
		err := c.again(kind+" "+name, "", func() error {
			_, _, err := c.c.CreateContainer(ctx, api.CreateContainer{Name: name, Image: image})
			return err
		})
		c.containers[name] = c.images[image]
		return err
	case "write":
		name, text := pick(c, c.containers), content(c.name())
		err := c.write(name, text)
		c.containers[name] = text
		return err
	case "fork":
		from, name := pick(c, c.containers), c.name()
		err := c.again(kind+" "+name, api.CodeExists, func() error {
			_, err := c.c.Fork(ctx, from, api.ForkContainer{Names: []string{name}})
			return err
		})
		c.containers[name] = c.containers[from]
		return err
	case "commit":
		from, name := pick(c, c.containers), c.name()
		err := c.again(kind+" "+name, api.CodeExists, func() error {
			op, err := c.c.Commit(ctx, from, api.CommitContainer{Image: name}, client.OpOptions{})
			if err == nil {
				_, err = c.c.Wait(ctx, op, nil)
			}
			return err
		})
		c.images[name] = c.containers[from]
		return err
	case "rollback":
		name, snap, was := pick(c, c.containers), c.name(), content("")
		was = c.containers[name]
		if err := c.again("snapshot "+snap, "", func() error {
			_, _, err := c.c.CreateSnapshot(ctx, api.CreateSnapshot{Container: name, Name: snap})
			return err
		}); err != nil {
			return err
		}
		if err := c.write(name, content(c.name())); err != nil {
			return err
		}
		if err := c.again("rollback "+name, "", func() error {
			_, err := c.c.Rollback(ctx, name, snap)
			return err
		}); err != nil {
			return err
		}
		c.containers[name] = was
		return c.again("rm of snapshot "+snap, api.CodeNotFound, func() error { return c.c.RemoveSnapshot(ctx, name, snap) })
	case "rm":
		name := pick(c, c.containers)
		delete(c.containers, name)
		return c.again(kind+" "+name, api.CodeNotFound, func() error {
			return c.c.RemoveContainer(ctx, name, layer.RemoveOptions{Snapshots: true})
		})
	default:
		name := pick(c, c.images)
		delete(c.images, name)
		return c.again("rm of image "+name, api.CodeNotFound, func() error { return c.c.RemoveImage(ctx, name) })
	}
}

// again repeats a request until the daemon has answered it. When it is repeated, an answer with
// the code done means that the first one was carried out before the daemon died.
func (c *churn) again(what string, done api.Code, f func() error) error {
	limit := time.Now().Add(churnLimit)
	for n := 0; ; n++ {
		err := f()
		if n == 1 {
			c.repeated++
		}
		var answer *api.Error
		switch {
		case err == nil, n > 0 && errors.As(err, &answer) && answer.Code == done:
			return nil
		// An operation that was under way is not known to the next daemon.
		case errors.As(err, &answer) && answer.Code != api.CodeNotFound && answer.Code != api.CodeClosing && answer.Code != api.CodeCancelled,
			time.Now().After(limit):
			return fmt.Errorf("%s, asked %d times: %w", what, n+1, err)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// repeat is again for commands.
func (c *churn) repeat(args ...string) error {
	limit := time.Now().Add(churnLimit)
	for n := 0; ; n++ {
		_, stderr, code := c.b.tryCommand(c.b.command(args...))
		if n == 1 {
			c.repeated++
		}
		if code == 0 || n > 0 && args[0] == "umount" && strings.Contains(stderr, "not mounted") {
			return nil
		}
		if time.Now().After(limit) {
			return fmt.Errorf("mica %v, tried %d times: %s", args, n+1, stderr)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// mounted runs f on the mounted container.
func (c *churn) mounted(name string, f func(dir string) error) error {
	dir := filepath.Join(c.b.dir, "mnt", name)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	if err := c.repeat("mount", name, dir); err != nil {
		return err
	}
	err := f(dir)
	return errors.Join(err, c.repeat("umount", name))
}

// holds compares a mounted container with what is known of it.
func holds(dir string, want content) error {
	motd, err := os.ReadFile(filepath.Join(dir, "etc/motd"))
	if err != nil || string(motd) != "high\n" {
		return fmt.Errorf("etc/motd is %q, %v", motd, err)
	}
	got, err := os.ReadFile(filepath.Join(dir, "text"))
	if want == "" && errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil || content(got) != want {
		return fmt.Errorf("text is %q, %v, want %q", got, err, want)
	}
	return nil
}

// write looks at what a container holds and gives it another text.
func (c *churn) write(name string, text content) error {
	err := c.mounted(name, func(dir string) error {
		if err := holds(dir, c.containers[name]); err != nil {
			return err
		}
		f, err := os.Create(filepath.Join(dir, "text"))
		if err != nil {
			return err
		}
		_, err = f.WriteString(string(text))
		return errors.Join(err, f.Sync(), f.Close())
	})
	if err != nil {
		return fmt.Errorf("write to %s: %w", name, err)
	}
	return nil
}

// verify looks at a container after the last kill.
func (c *churn) verify(name string, want content) {
	c.b.Helper()
	if err := c.mounted(name, func(dir string) error { return holds(dir, want) }); err != nil {
		c.b.Errorf("%s: %v", name, err)
	}
}
