package ublk

import (
	"context"
	"os"
	"path/filepath"
	"testing"

	"mica/export"
	"mica/export/exporttest"
	"mica/export/helper"
)

var conformance = exporttest.Driver{
	Available: Available,
	New: func(o exporttest.Options) (export.Exporter, error) {
		return New(Options{RunDir: o.Run(), LinkDir: o.Links(), Logger: o.Log, DetachWait: o.Patience, HelperCommand: o.Role("role-helper")})
	},
	Roles: map[string]func([]string) error{
		"role-helper": func([]string) error { return helper.Run(context.Background(), os.Stdin, os.Stdout, Calls, Errors) },
	},
	Left: func(dir string) (left []string) {
		for _, id := range devices() {
			if i, err := getInfo(id); err == nil && i.cookie&cookieRun == cookieOf(filepath.Join(dir, "run"), "")&cookieRun {
				left = append(left, nodeOf(id))
			}
		}
		return left
	},
	TakeAway: func(node string) error {
		id, err := NumberOf(node)
		if err == nil {
			err = stopDev(id)
		}
		if err == nil {
			err = delDevAsync(id)
		}
		return err
	},
}

func TestMain(m *testing.M) { exporttest.Main(m, conformance) }

func TestConformance(t *testing.T) {
	d := conformance
	if f, err := features(); err == nil {
		d.NoResize = f&featUpdateSize == 0
	}
	exporttest.Run(t, d)
}

// udev knows ublk devices from version 254 on; Debian 12 has 252.
func TestUdev(t *testing.T) { exporttest.RunUdev(t, conformance, false) }

func BenchmarkTransport(b *testing.B) { exporttest.Bench(b, conformance) }
