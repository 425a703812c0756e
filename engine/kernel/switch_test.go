//go:build guest

package kernel

import (
	"bytes"
	"errors"
	"testing"

	"mica/engine"
	"mica/engine/enginetest"
	"mica/engine/user"
	"mica/internal/crossing"
	"mica/thin"
)

// TestSwitch sends a pool back and forth between the engines. After each phase every byte of every
// device is compared with the model, by both engines, and the metadata is checked.
func TestSwitch(t *testing.T) {
	for i, bs := range []int64{64 << 10, 192 << 10} {
		const deviceBytes = 3 << 20
		seed := uint64(1000 + i)
		t.Logf("seed %d", seed)
		dir := newDir(t, 40<<20/bs*bs, 4<<20, bs)
		model := crossing.NewModel(bs, 40<<20/bs*bs, 4<<20)
		gen := crossing.NewGenerator(model, seed, deviceBytes)
		gen.NoMetadataSnap = true // the engine that opens a pool lets go of what the other held
		gen.MaxDevs = 5
		openers := map[string]func() (engine.Pool, error){
			"kernel": func() (engine.Pool, error) {
				return openFor(t, Source{Dir: dir}, enginetest.Options{ErrorIfNoSpace: true})
			},
			"user": func() (engine.Pool, error) {
				return user.Open(ctx, user.Location{Dir: dir}, user.Options{ErrorIfNoSpace: true})
			},
		}
		verify := func(who string) {
			t.Helper()
			p, err := openers[who]()
			if err != nil {
				t.Fatalf("%s opens the pool: %v", who, err)
			}
			got, want := make([]byte, 1<<20), make([]byte, 1<<20)
			for id, m := range model.Devices {
				d, err := p.Open(ctx, thin.DevID(id), engine.OpenOptions{SizeBytes: deviceBytes, ReadOnly: true})
				if err != nil {
					t.Fatal(err)
				}
				for off := int64(0); off < deviceBytes; off += 1 << 20 {
					if _, err := d.ReadAt(got, off); err != nil {
						t.Fatal(err)
					}
					m.ReadAt(want, off)
					for s := 0; s < len(got); s += 512 {
						if !bytes.Equal(got[s:s+512], want[s:s+512]) {
							t.Fatalf("%s: device %d, byte %d: %s, want %s", who, id, off+int64(s), crossing.Describe(got[s:s+512]), crossing.Describe(want[s:s+512]))
						}
					}
				}
				if n := d.MappedBlocks(); n < 1 && len(m.Mapped) > 0 {
					t.Errorf("%s: device %d maps %d blocks", who, id, n)
				}
				if err := d.Close(); err != nil {
					t.Fatal(err)
				}
			}
			if err := p.Close(); err != nil {
				t.Fatal(err)
			}
		}
		existing := map[uint32]int64{}
		for phase, who := range []string{"kernel", "user", "kernel", "user"} {
			p, err := openers[who]()
			if err != nil {
				t.Fatalf("phase %d: %s opens the pool: %v", phase, who, err)
			}
			gen.NoDiscard = who == "kernel" && bs&(bs-1) != 0
			ops := gen.Script(60)
			r := crossing.NewRunner(crossing.EnginePool{Pool: p}, existing, make([]byte, 1<<20))
			if err := errors.Join(r.Run(ops), r.Close(), p.Close()); err != nil {
				t.Fatalf("phase %d, %s: %v", phase, who, err)
			}
			existing = map[uint32]int64{}
			for id := range model.Devices {
				existing[id] = deviceBytes
			}
			d := openDevice(t, dir+"/metadata")
			if rep, err := thin.Check(d, thin.CheckOptions{}); err != nil || !rep.Clean() {
				t.Fatalf("phase %d, %s: %v %v", phase, who, rep.Findings, err)
			}
			d.Close()
			verify("user")
			verify("kernel")
		}
	}
}
