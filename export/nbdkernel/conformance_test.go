package nbdkernel

import (
	"context"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"mica/export"
	"mica/export/exporttest"
	"mica/export/helper"
)

// connections of a device in this process and its children.
const connectionsVar = "MICA_TEST_NBD_CONNECTIONS"

var conformance = exporttest.Driver{
	Available: Available,
	New: func(o exporttest.Options) (export.Exporter, error) {
		n, _ := strconv.Atoi(os.Getenv(connectionsVar))
		return New(Options{RunDir: o.Run(), LinkDir: o.Links(), Logger: o.Log, DetachWait: o.Patience, HelperCommand: o.Role("role-helper"),
			Connections: n, RequestTimeout: 2 * time.Second, RetryAfter: time.Second})
	},
	Roles: map[string]func([]string) error{
		"role-helper": func([]string) error { return helper.Run(context.Background(), os.Stdin, os.Stdout, Calls, Errors) },
	},
	Left: func(dir string) (left []string) {
		for index := range devices() {
			if strings.HasPrefix(backendOf(index), backendPrefix+filepath.Join(dir, "run")+":") {
				left = append(left, nodeOf(index))
			}
		}
		return left
	},
	TakeAway: func(node string) error {
		index, err := NumberOf(node)
		if err != nil {
			return err
		}
		return with(func(k *control) error { return k.disconnect(index) })
	},
	NoENOSPC: true,
}

func TestMain(m *testing.M) { exporttest.Main(m, conformance) }

func TestConformance(t *testing.T) { exporttest.Run(t, conformance) }

// TestSeveralConnections is the same with connections that share the load.
func TestSeveralConnections(t *testing.T) {
	t.Setenv(connectionsVar, "3")
	exporttest.Run(t, conformance)
}

func TestUdev(t *testing.T) { exporttest.RunUdev(t, conformance, true) }

func BenchmarkTransport(b *testing.B) { exporttest.Bench(b, conformance) }
