// Package lint holds the project's own rules as tests: who may import whom, where unsafe is
// allowed, how long a file may be, and what must not be written down.
package lint

// Layers is the import rule: a package of the module may import only what its line names, itself
// and its own sub-packages aside. Names are relative to the module; "x/..." is x and all below
// it. The first line that matches a package counts; a package without a line is an error, so a
// new one has to find its place here. Tests may import more: only what is shipped is bound.
//
// Imports point down: cmd, daemon, snapshotter, image, layer, then export beside engine, then
// thin, pdata, dev.
var Layers = []Layer{
	{"cmd/mica/...", []string{"bench/...", "daemon/...", "snapshotter/...", "image/...", "layer/...", "export/...", "engine/...", "journal", "lvm", "thin/...", "pdata/...", "dev/..."}},
	{"bench/...", []string{"daemon/...", "layer/...", "export/...", "engine/...", "thin/...", "dev/..."}}, // measures the rest
	{"daemon/...", []string{"snapshotter/...", "image/...", "layer/...", "export/...", "engine/...", "lvm", "thin/...", "dev/..."}},
	{"snapshotter/...", []string{"layer/...", "engine", "thin", "dev"}},
	{"image/...", []string{"layer/...", "dev"}},
	{"layer/...", []string{"export/...", "engine/...", "thin", "dev/..."}},
	{"export/...", []string{"export/...", "dev/...", "internal/uring"}}, // they know dev.Device only
	{"engine", []string{"thin", "dev"}},
	// Loop devices serve below the kernel engine as they do above the user engine.
	{"engine/kernel/...", []string{"engine", "journal", "thin/...", "pdata/...", "dev/...", "internal/dmioctl", "export/loop"}},
	{"engine/...", []string{"engine", "journal", "thin/...", "pdata/...", "dev/..."}},
	{"journal", []string{"thin", "dev"}},
	{"lvm", []string{"dev/..."}}, // storage set up with the LVM tools
	{"thin/repair", []string{"thin", "pdata/...", "dev"}},
	{"thin/backup", []string{"thin", "thin/repair", "pdata/block", "dev"}},
	{"thin/...", []string{"pdata/...", "dev/..."}},
	{"pdata/spacemap", []string{"pdata/btree", "pdata/txn", "pdata/block", "dev"}},
	{"pdata/btree", []string{"pdata/txn", "pdata/block", "dev"}},
	{"pdata/txn", []string{"pdata/block", "dev"}},
	{"pdata/block", []string{"dev"}},
	{"dev/...", nil},
	// Tools and helpers of tests. Nothing above imports them, but dmioctl and uring.
	{"internal/dmioctl", nil},
	{"internal/uring", nil},
	{"internal/...", []string{"internal/...", "bench/...", "daemon/...", "layer/...", "image/...", "export/...", "engine/...", "thin/...", "pdata/...", "dev/..."}},
	{"test/...", []string{"internal/...", "daemon/...", "lvm", "layer/...", "image/...", "export/...", "engine/...", "thin/...", "pdata/...", "dev/..."}},
	{"packaging/...", nil},               // units and rules, with the tests that read them
	{"demo/...", []string{"daemon/api"}}, // it uses the binary, as everybody does
}

// A Layer is one line of Layers.
type Layer struct {
	Package string
	May     []string
}

// MaxLines is the longest a Go file may be. Past 800 look for the second idea in it.
const MaxLines = 900
