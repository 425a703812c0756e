package fuse

import (
	"context"
	"os"
	"path/filepath"
	"testing"

	"mica/export"
	"mica/export/exporttest"
	"mica/export/helper"
	"mica/export/holder"
	"mica/export/loop"
)

var conformance = exporttest.Driver{
	Available: func() error {
		for _, p := range []string{"/dev/fuse", "/dev/loop-control"} {
			if _, err := os.Stat(p); err != nil {
				return err
			}
		}
		return nil
	},
	New: func(o exporttest.Options) (export.Exporter, error) {
		socket := o.Dir + "/holder.sock"
		return New(Options{
			RunDir: o.Run(), LinkDir: o.Links(), Logger: o.Log, DetachWait: o.Patience,
			HolderSocket: socket, HolderCommand: o.Role("role-holder", socket), HelperCommand: o.Role("role-helper"),
		})
	},
	Roles: map[string]func([]string) error{
		"role-holder": func(args []string) error { return holder.Run(context.Background(), args[0]) },
		"role-helper": func([]string) error { return helper.Run(context.Background(), os.Stdin, os.Stdout, Calls, Errors) },
	},
	Left: func(dir string) (left []string) {
		for _, n := range boundTo(dir) {
			left = append(left, loop.Backing(n))
		}
		return left
	},
	TakeAway: func(node string) error {
		n, err := loop.NumberOf(node)
		if err != nil {
			return err
		}
		abort(filepath.Dir(loop.Backing(n)))
		return nil
	},
	End: func(o exporttest.Options) {
		if c, err := holder.Dial(o.Dir + "/holder.sock"); err == nil {
			c.Quit(true)
			c.Close()
		}
	},
	DiscardIs0: true,
}

func TestConformance(t *testing.T) { exporttest.Run(t, conformance) }

func TestUdev(t *testing.T) { exporttest.RunUdev(t, conformance, true) }

func BenchmarkTransport(b *testing.B) { exporttest.Bench(b, conformance) }
