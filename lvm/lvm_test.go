package lvm

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"mica/dev/signature"
)

func TestValidate(t *testing.T) {
	good := Defaults()
	good.Devices = []string{"/dev/sdb", "/dev/sdc"}
	if err := good.Validate(); err != nil {
		t.Errorf("defaults with two devices: %v", err)
	}
	tests := []struct {
		name string
		set  func(*Config)
		want string // in the error
	}{
		{"no device", func(c *Config) { c.Devices = nil }, "no device"},
		{"relative", func(c *Config) { c.Devices = []string{"sdb"} }, "absolute"},
		{"an option", func(c *Config) { c.Devices = []string{"--force"} }, "absolute"},
		{"dots", func(c *Config) { c.Devices = []string{"/dev/../etc/passwd"} }, "absolute"},
		{"twice", func(c *Config) { c.Devices = []string{"/dev/sdb", "/dev/sdb"} }, "twice"},
		{"group with a slash", func(c *Config) { c.VolumeGroup = "a/b" }, "volume group"},
		{"group that is an option", func(c *Config) { c.VolumeGroup = "-x" }, "volume group"},
		{"group that is a tag", func(c *Config) { c.VolumeGroup = "@x" }, "volume group"},
		{"empty pool", func(c *Config) { c.Pool = "" }, "thin pool"},
		{"pool with a semicolon", func(c *Config) { c.Pool = "a;b" }, "thin pool"},
		{"no data", func(c *Config) { c.DataPercent = 0 }, "data: 0 %"},
		{"too much", func(c *Config) { c.DataPercent, c.MetadataPercent = 97, 2 }, "101 %"},
		{"threshold", func(c *Config) { c.ExtendThreshold = 101 }, "threshold"},
		{"no step", func(c *Config) { c.ExtendPercent = 0 }, "0 %"},
		{"block size", func(c *Config) { c.BlockSize = 100 << 10 }, "102400"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c := good
			tt.set(&c)
			if err := c.Validate(); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("Validate: %v, want an error with %q", err, tt.want)
			}
		})
	}
}

func TestDMName(t *testing.T) {
	c := Config{VolumeGroup: "vg-0", Pool: "thin--pool"}
	if got, want := c.DMName(), "vg--0-thin----pool"; got != want {
		t.Errorf("DMName of %s: %s, want %s", c.FullName(), got, want)
	}
}

// TestChanged goes through what must not be changed later, and what may.
func TestChanged(t *testing.T) {
	made := Defaults()
	made.Devices = []string{"/dev/sdb", "/dev/sdc"}
	tests := []struct {
		set  func(*Config)
		want string // empty: no difference
	}{
		{func(*Config) {}, ""},
		{func(c *Config) { c.Devices = c.Devices[:1] }, ""}, // the second was added later
		{func(c *Config) { c.Force = true }, ""},
		{func(c *Config) { c.Devices = []string{"/dev/sdd"} }, "/dev/sdd"},
		{func(c *Config) { c.VolumeGroup = "other" }, "volume group was mica, is now other"},
		{func(c *Config) { c.Pool = "other" }, "thin pool"},
		{func(c *Config) { c.DataPercent = 90 }, "95, is now 90"},
		{func(c *Config) { c.MetadataPercent = 2 }, "metadata"},
		{func(c *Config) { c.ExtendThreshold = 70 }, "threshold"},
		{func(c *Config) { c.ExtendPercent = 10 }, "step"},
		{func(c *Config) { c.BlockSize = 128 << 10 }, "block size"},
	}
	for i, tt := range tests {
		now := made
		tt.set(&now)
		got := made.differs(now)
		if tt.want == "" && got != "" || !strings.Contains(got, tt.want) {
			t.Errorf("%d: difference %q, want %q", i, got, tt.want)
		}
	}
}

// TestState: what is stored says the same when it is read, and a file that is cut off is an error.
func TestState(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lvm.json")
	if _, ok, err := load(path); ok || err != nil {
		t.Errorf("no file: %v, %v, want none", ok, err)
	}
	s := state{Config: Defaults(), Tag: "mica.x", Done: true}
	s.Devices = []string{"/dev/sdb"}
	if err := s.save(path); err != nil {
		t.Fatal(err)
	}
	got, ok, err := load(path)
	if err != nil || !ok || got.Tag != s.Tag || !got.Done || got.differs(s.Config) != "" {
		t.Errorf("load: %+v, %v, %v, want %+v", got, ok, err, s)
	}
	if err := os.WriteFile(path, []byte(`{"devices":`), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, _, err := load(path); err == nil || !strings.Contains(err.Error(), path) {
		t.Errorf("cut off file: %v, want an error that names it", err)
	}
	if rest, _ := filepath.Glob(filepath.Join(filepath.Dir(path), ".lvm-*")); len(rest) > 0 {
		t.Errorf("left behind: %v", rest)
	}
}

// TestNoTools: without lvm2 nothing is touched and the error names the package.
func TestNoTools(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	c := Defaults()
	c.Devices = []string{"/dev/sdb"}
	file := filepath.Join(t.TempDir(), "lvm.json")
	if _, err := Ensure(context.Background(), file, c); !errors.Is(err, ErrNoTools) || !strings.Contains(err.Error(), "lvm2") {
		t.Errorf("Ensure without the tools: %v, want ErrNoTools naming the package", err)
	}
	if _, err := os.Stat(file); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a set-up was remembered: %v", err)
	}
}

// TestNoBlockDevice: files and directories are refused before anything is done.
func TestNoBlockDevice(t *testing.T) {
	file := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(file, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{file, t.TempDir(), "/dev/null"} {
		if _, err := checkDevice(context.Background(), path, true); err == nil || !strings.Contains(err.Error(), "not a block device") {
			t.Errorf("%s: %v, want: not a block device", path, err)
		}
	}
	if _, err := checkDevice(context.Background(), "/dev/does-not-exist", false); !errors.Is(err, os.ErrNotExist) || errors.Is(err, signature.ErrFound) {
		t.Errorf("missing device: %v, want ErrNotExist", err)
	}
}

func TestLastWords(t *testing.T) {
	in := "  WARNING: Failed to connect to lvmetad.\n  Device /dev/sdb excluded by a filter.\n  Cannot use it.\n"
	if got, want := lastWords(in), "Device /dev/sdb excluded by a filter.; Cannot use it."; got != want {
		t.Errorf("lastWords: %q, want %q", got, want)
	}
	if got, want := lastWords("  WARNING: only this\n"), "WARNING: only this"; got != want {
		t.Errorf("lastWords: %q, want %q", got, want)
	}
}

func TestShare(t *testing.T) {
	c := Defaults()
	const mib = 1 << 20
	tests := []struct {
		size, extent   int64
		metadata, data int64
	}{
		{100 << 30, 4 * mib, 1024 * mib, 97280 * mib},  // 95 % and 1 %, down to extents
		{60 * mib, 4 * mib, 4 * mib, 52 * mib},         // the metadata has its least, the data what is left
		{4 << 40, 4 * mib, 16192 * mib, 3984588 * mib}, // the most that metadata can be
		{4 * mib, 4 * mib, 4 * mib, 0},
	}
	for _, tt := range tests {
		metadata, data := group{tt.size, tt.extent}.share(c)
		if metadata != tt.metadata || data != tt.data {
			t.Errorf("%d bytes: metadata %d, data %d MiB, want %d, %d", tt.size, metadata/mib, data/mib, tt.metadata/mib, tt.data/mib)
		}
		if metadata%tt.extent != 0 || data%tt.extent != 0 || data > 0 && 2*metadata+data > tt.size {
			t.Errorf("%d bytes: metadata %d and data %d are no whole extents or do not fit", tt.size, metadata, data)
		}
	}
}
