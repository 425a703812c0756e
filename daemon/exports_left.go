package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"time"

	"mica/daemon/config"
	"mica/export"
)

// LeftOptions say whose nodes LeftExports looks for.
type LeftOptions struct {
	Config config.Config // Run and Exports.LinkDir count
	Exe    []string      // starts this program in a role; see Options
	Log    *slog.Logger
}

// A LeftExport is a node that a daemon has left, and that waits for the next one.
type LeftExport struct {
	Name string `json:"name"` // of the link
	Kind string `json:"kind"`
	Node string `json:"node,omitempty"`
}

// LeftExports lists the nodes that a daemon which is gone has left in a run directory, or, with drop,
// cuts off those that it names: what waits for them fails, and they go as soon as nobody has them
// open or mounted. drop is called with the list and returns the names. It refuses with an
// *InUseError while a daemon runs there.
func LeftExports(ctx context.Context, o LeftOptions, drop func([]LeftExport) ([]string, error)) (list []LeftExport, err error) {
	run := o.Config.Run
	if _, err := os.Stat(run); errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	lock, err := lockDir(ctx, run, owner{PID: os.Getpid(), Run: run}, time.Second, nil)
	if err != nil {
		return nil, err
	}
	defer lock.Close()
	x := exportOptions{run: run, links: o.Config.Exports.LinkDir, holder: filepath.Join(run, holderSocket), exe: o.Exe, log: o.Log}
	open := map[string]export.Exporter{}
	defer func() {
		for _, e := range open {
			err = errors.Join(err, e.Close())
		}
	}()
	for _, c := range append(x.candidates(), x.kernelNodes()) {
		if !c.Left() {
			continue
		}
		if open[c.Kind], err = c.Open(); err != nil {
			delete(open, c.Kind)
			return nil, fmt.Errorf("nodes exported through %s: %w", c.Kind, err)
		}
		names, err := open[c.Kind].Survivors(ctx)
		if err != nil {
			return nil, err
		}
		for _, name := range names {
			node, _ := os.Readlink(filepath.Join(x.links, name)) // it may have no link
			list = append(list, LeftExport{Name: name, Kind: c.Kind, Node: node})
		}
	}
	if drop == nil {
		return list, nil
	}
	names, err := drop(list)
	if err != nil {
		return nil, err
	}
	list = slices.DeleteFunc(list, func(l LeftExport) bool { return !slices.Contains(names, l.Name) })
	for i, l := range list {
		if err := open[l.Kind].Drop(ctx, l.Name); err != nil {
			return list[:i], err
		}
	}
	return list, nil
}
