package config

import (
	"flag"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

var update = flag.Bool("update", false, "rewrite generated documents")

func TestParse(t *testing.T) {
	with := func(f func(*Config)) Config {
		c := Default()
		f(&c)
		return c
	}
	tests := []struct {
		name, text string
		want       Config
	}{
		{"empty file: the defaults", "", Default()},
		{"size as string", "[pool]\nsize = \"10G\"", with(func(c *Config) { c.Pool.Size = 10 << 30 })},
		{"size as integer", "[pool]\nsize = 1073741824", with(func(c *Config) { c.Pool.Size = 1 << 30 })},
		{"duration", "[limits]\nhelper_timeout = \"1h30m\"", with(func(c *Config) { c.Limits.HelperTimeout = Duration(90 * time.Minute) })},
		{"days", "[limits]\nstall_timeout = \"2d\"", with(func(c *Config) { c.Limits.StallTimeout = Duration(48 * time.Hour) })},
		{"percentage as integer", "[auto_extend]\nenabled = true\nthreshold = 75", with(func(c *Config) { c.AutoExtend.Enabled, c.AutoExtend.Threshold = true, 75 })},
		{"percentage as string", "[auto_extend]\nthreshold = \"75%\"", with(func(c *Config) { c.AutoExtend.Threshold = 75 })},
		{"list", "[containers]\nmount_options = [\"noatime\"]", with(func(c *Config) { c.Containers.MountOptions = []string{"noatime"} })},
		{"further snapshotter", "[containerd.snapshotters.kata]\nguest_owned = true", with(func(c *Config) {
			c.Containerd.Snapshotters = map[string]Snapshotter{"kata": {GuestOwned: true}}
		})},
		{"false over a true default", "[containers]\ndiscard = false", with(func(c *Config) { c.Containers.Discard = false })},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := Parse([]byte(tt.text))
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(tt.want, got); d != "" {
				t.Errorf("want (-), got (+):\n%s", d)
			}
		})
	}
}

func TestParseRefuses(t *testing.T) {
	tests := []struct {
		name, text string
		want       []string // all in the message
	}{
		{"unknown key", "roof = \"/x\"", []string{"unknown keys", "roof"}},
		{"unknown key of a table shows its line", "[pool]\nsize = 1048576\nsizes = 3\n", []string{"unknown keys", "3| sizes = 3"}},
		{"unknown table", "[pools]\nsize = 3\n", []string{"unknown keys", "pools"}},
		{"not TOML", "root = ", []string{"1|"}},
		{"wrong type", "[containers]\ndiscard = \"yes\"", []string{"discard"}},
		{"size with a unit that is none", "[pool]\nsize = \"10X\"", []string{`"10X" is not a size`}},
		{"negative size", "[pool]\nsize = -5", []string{"not a size"}},
		{"percentage over 100", "[auto_extend]\nstep = 101", []string{"not a percentage"}},
		{"negative duration", "[limits]\nstall_timeout = \"-1s\"", []string{"negative"}},
		{"duration without a unit", "[limits]\nstall_timeout = 5", []string{"want a number with a unit"}},
		{"relative root", "root = \"mica\"", []string{"root", "not an absolute path"}},
		{"data without metadata", "[pool]\ndata = \"/dev/sdb\"", []string{"set both or none"}},
		{"block size not a multiple of 64K", "[pool]\nblock_size = \"96K\"", []string{"pool.block_size", "98304"}},
		{"pool smaller than a block", "[pool]\nsize = 4096", []string{"less than one block"}},
		{"size for ext4", "[containers]\nbase_size = \"8M\"", []string{"8M", "16M", "ext4"}},
		{"size for xfs", "[containers]\nfile_system = \"xfs\"\nbase_size = \"299M\"", []string{"299M", "300M", "xfs"}},
		{"export kind", "[exports]\nkind = \"floppy\"", []string{"exports.kind", `"floppy"`}},
		{"file system", "[containers]\nfile_system = \"btrfs\"", []string{`"btrfs"`}},
		{"mount option with a blank", "[containers]\nmount_options = [\"a b\"]", []string{"not a mount option"}},
		{"snapshotter of the name that is taken", "[containerd.snapshotters.mica]", []string{"containerd.snapshotters", `"mica"`}},
		{"snapshotter with a slash", "[containerd.snapshotters.\"a/b\"]", []string{"containerd.snapshotters", `"a/b"`}},
		{"mount option of a snapshotter", "[containerd.snapshotters.kata]\nmount_options = [\"\"]", []string{"containerd.snapshotters.kata.mount_options"}},
		{"key of a snapshotter", "[containerd.snapshotters.kata]\nguest = true", []string{"unknown keys", "guest"}},
		{"containerd's socket", "[containerd]\naddress = \"containerd.sock\"", []string{"containerd.address"}},
		{"no entry at all", "[images]\nmax_entries = 0", []string{"images.max_entries"}},
		{"names that Linux cannot open", "[images]\nmax_name = 4096", []string{"images.max_name", "4095"}},
		{"TCP beyond this host without TLS", "[nbd]\nlisten = \"0.0.0.0:10809\"", []string{"nbd.listen", "only with TLS", "127.0.0.1"}},
		{"TCP on every address without TLS", "[nbd]\nlisten = \":10809\"", []string{"nbd.listen", "only with TLS"}},
		{"TCP by name", "[nbd]\nlisten = \"host.example:10809\"", []string{"nbd.listen", "not an IP address"}},
		{"TLS without a CA", "[nbd]\nlisten = \"0.0.0.0:10809\"\ntls_certificate = \"/c\"\ntls_key = \"/k\"", []string{"nbd.tls_client_ca", "not set"}},
		{"TLS without a key", "[nbd]\nlisten = \"127.0.0.1:10809\"\ntls_certificate = \"/c\"\ntls_client_ca = \"/a\"", []string{"nbd.tls_key", "not set"}},
		{"TLS without TCP", "[nbd]\ntls_certificate = \"/c\"\ntls_key = \"/k\"\ntls_client_ca = \"/a\"", []string{"nbd.listen", "not set"}},
		{"relative key", "[nbd]\nlisten = \"127.0.0.1:1\"\ntls_certificate = \"/c\"\ntls_key = \"k\"\ntls_client_ca = \"/a\"", []string{"nbd.tls_key", "absolute"}},
		{"names without TLS", "[nbd]\nlisten = \"127.0.0.1:1\"\ntls_clients = [\"vm1\"]", []string{"nbd.tls_clients"}},
		{"an empty name of a client", "[nbd]\nlisten = \":1\"\ntls_certificate = \"/c\"\ntls_key = \"/k\"\ntls_client_ca = \"/a\"\ntls_clients = [\"\"]", []string{"nbd.tls_clients", "empty"}},
		{"log level", "[log]\nlevel = \"loud\"", []string{`"loud"`}},
		{"threshold that never ends", "[auto_extend]\nenabled = true\nthreshold = 0", []string{"auto_extend.threshold"}},
		{"memory too small to run in", "[limits]\nmemory = \"1M\"", []string{"limits.memory"}},
		{"no operation at all", "[limits]\noperations = 0", []string{"limits.operations"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, err := Parse([]byte(tt.text))
			if err == nil {
				t.Fatal("no error")
			}
			for _, w := range tt.want {
				if !strings.Contains(err.Error(), w) {
					t.Errorf("error %q does not contain %q", err, w)
				}
			}
		})
	}
}

func TestLoad(t *testing.T) {
	dir := t.TempDir()
	if _, _, err := Load(filepath.Join(dir, "none.toml")); err == nil {
		t.Error("a named file that does not exist: no error")
	}
	file := filepath.Join(dir, "c.toml")
	if err := os.WriteFile(file, []byte("root = \"/srv/mica\"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	c, path, err := Load(file)
	if err != nil || path != file || c.Root != "/srv/mica" {
		t.Errorf("Load = root %q, path %q, error %v", c.Root, path, err)
	}
	if err := os.WriteFile(file, []byte("[x]\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, _, err := Load(file); err == nil || !strings.Contains(err.Error(), file) {
		t.Errorf("error %v does not name the file", err)
	}
}

// TestReference: the page in docs is the generated one, every key is documented, and the TOML in
// it reads back as the defaults.
func TestReference(t *testing.T) {
	text := Reference()
	path := "../../docs/configuration.md"
	if *update {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(text, string(b)); d != "" {
		t.Errorf("docs/configuration.md is not what the code says (go test ./daemon/config -update):\n%s", d)
	}
	_, block, _ := strings.Cut(text, "```toml\n")
	block, _, _ = strings.Cut(block, "```")
	c, err := Parse([]byte(block))
	if err != nil {
		t.Fatalf("the reference does not parse: %v", err)
	}
	if d := cmp.Diff(Default(), c, cmpopts.EquateEmpty()); d != "" {
		t.Errorf("the reference is not the defaults:\n%s", d)
	}
	var check func(reflect.Type)
	check = func(ty reflect.Type) {
		for i := range ty.NumField() {
			f := ty.Field(i)
			if f.Tag.Get("doc") == "" || f.Tag.Get("toml") == "" {
				t.Errorf("%s.%s: no toml or doc tag", ty.Name(), f.Name)
			}
			if f.Type.Kind() == reflect.Struct {
				check(f.Type)
			}
		}
	}
	check(reflect.TypeFor[Config]())
}
