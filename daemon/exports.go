package daemon

import (
	"fmt"
	"log/slog"
	"os"
	"path/filepath"

	"mica/engine"
	"mica/export"
	"mica/export/dm"
	"mica/export/fuse"
	"mica/export/nbdkernel"
	"mica/export/ublk"
)

// exportOptions are what all exporters of a daemon are made with.
type exportOptions struct {
	kind   string // of the configuration
	run    string
	links  string
	holder string   // socket
	exe    []string // starts this program in a role
	log    *slog.Logger
	engine string // engine.User or engine.Kernel
}

func (o exportOptions) role(args ...string) []string {
	return append(append([]string{}, o.exe...), args...)
}

// newExporter makes what exports the pool's devices as nodes. Devices of the kernel engine have
// nodes; for those of the user engine the best way that the host has is chosen.
func newExporter(o exportOptions) (*export.Auto, error) {
	if o.engine == engine.Kernel {
		return export.NewAuto(export.AutoKind, o.kernelNodes())
	}
	return export.NewAuto(o.kind, o.candidates()...)
}

// kernelNodes gives out the nodes of the kernel engine.
func (o exportOptions) kernelNodes() export.Candidate {
	return export.Candidate{Kind: "dm", Left: left(o.run, "dm"), Open: func() (export.Exporter, error) {
		return dm.New(dm.Options{RunDir: o.run, LinkDir: o.links, Logger: o.log})
	}}
}

// candidates are the ways to export devices of the user engine, the best one first.
func (o exportOptions) candidates() []export.Candidate {
	helper := o.role("helper", "exports")
	return []export.Candidate{
		{Kind: "ublk", Left: left(o.run, "ublk"), Open: func() (export.Exporter, error) {
			return ublk.New(ublk.Options{RunDir: o.run, LinkDir: o.links, HelperCommand: helper, Logger: o.log})
		}},
		{Kind: "nbd", Left: left(o.run, "nbd"), Open: func() (export.Exporter, error) {
			return nbdkernel.New(nbdkernel.Options{RunDir: o.run, LinkDir: o.links, HelperCommand: helper, Logger: o.log})
		}},
		{Kind: "fuse", Left: left(o.run, "fuse"), Open: func() (export.Exporter, error) {
			return fuse.New(fuse.Options{RunDir: o.run, LinkDir: o.links, HolderSocket: o.holder,
				HolderCommand: o.role("holder", o.holder), HelperCommand: o.role("helper", "loop"), Logger: o.log})
		}},
	}
}

// left reports whether the directory of an exporter of this run directory has anything in it.
func left(run, kind string) func() bool {
	return func() bool {
		list, err := os.ReadDir(filepath.Join(run, kind))
		return err == nil && len(list) > 0
	}
}

// exportDirs are the directories in which exporters that serve nodes have an entry for each.
func exportDirs(run string) (dirs []string) {
	for _, kind := range []string{"ublk", "nbd", "fuse"} {
		dirs = append(dirs, filepath.Join(run, kind))
	}
	return dirs
}

// noSurvivors refuses to start with the kernel engine while nodes of the user engine wait for a
// daemon that goes on serving them.
func noSurvivors(run string) error {
	for _, dir := range exportDirs(run) {
		if list, err := os.ReadDir(dir); err == nil && len(list) > 0 { // an error: never used
			return fmt.Errorf("%d nodes that the user engine serves are still there (%s, ...): start with --engine user and detach them first",
				len(list), filepath.Join(dir, list[0].Name()))
		}
	}
	return nil
}
