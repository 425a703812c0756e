package config

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/pelletier/go-toml/v2"

	"mica/engine"
	"mica/export/nbd"
	"mica/lvm"
)

// DefaultFile is read if it exists and no other is named.
const DefaultFile = "/etc/mica/config.toml"

// Config is the whole file. The zero value is not useful; start from Default.
type Config struct {
	Root string `toml:"root" doc:"Directory of the pool (below pool/) and the catalog (catalog.db). The option --root goes before it."`
	Run  string `toml:"run" doc:"Directory of sockets and of everything that a reboot may delete. The option --run goes before it."`

	API        API        `toml:"api" doc:"The API's socket, RUN/mica.sock."`
	Log        Log        `toml:"log" doc:"What the daemon writes to standard error."`
	Pool       Pool       `toml:"pool" doc:"The pool. Sizes and the block size count only when it is made, at the first start."`
	LVM        LVM        `toml:"lvm" doc:"A thin pool that is made with the LVM tools and used with the kernel engine, in place of files: what dm.directlvm_device was. All values but devices_force count when it is made, at the first start, and other ones are refused later."`
	AutoExtend AutoExtend `toml:"auto_extend" doc:"Growing the pool by itself."`
	Backup     Backup     `toml:"backup" doc:"Backups of the pool's metadata, to which 'mica pool restore' puts a pool back."`
	Containers Containers `toml:"containers" doc:"File systems of containers."`
	Images     Images     `toml:"images" doc:"Bounds of what an image may bring. An archive or a layer beyond one of them is refused, and nothing of it stays. They hold for layers that containerd brings, too."`
	Exports    Exports    `toml:"exports" doc:"Block devices of containers."`
	NBD        NBD        `toml:"nbd" doc:"Network block devices: containers attached with --as nbd. They are on the socket RUN/nbd.sock; those attached with --tcp can be reached over TCP too."`
	Containerd Containerd `toml:"containerd" doc:"What containerd uses as a snapshotter and differ. docs/containerd.md has containerd's side of it."`
	Limits     Limits     `toml:"limits" doc:"Bounds of what the daemon uses."`
}

// API is how clients reach the daemon.
type API struct {
	Group string `toml:"group" doc:"Group (name or number) that may use the socket, which is then 0660. Empty: only the daemon's user. Whoever may use the socket can mount, read and remove everything."`
}

// Log is what the daemon logs.
type Log struct {
	Level  string `toml:"level" doc:"debug, info, warn or error."`
	Format string `toml:"format" doc:"text or json."`
}

// Pool is where the pool is and how it behaves.
type Pool struct {
	Engine         string   `toml:"engine" doc:"Who reads and writes the pool: user (this daemon), kernel (dm-thin, which needs device-mapper), or auto: what 'mica pool switch' has noted in ROOT/pool, else user; kernel for a thin_pool. The option --engine goes before it."`
	ThinPool       string   `toml:"thin_pool" doc:"Active thin pool of device-mapper to use, by its name or its path, in place of data and metadata. Its size, its features and its life are those of whoever made it."`
	Adopt          bool     `toml:"adopt" doc:"Use a thin_pool that has thin devices already, which are then listed and never touched. Counts at the first start. The option --adopt sets it."`
	Data           string   `toml:"data" doc:"Data device: a block device, or a file. Empty: ROOT/pool/data, a sparse file."`
	Metadata       string   `toml:"metadata" doc:"Metadata device: a block device, or a file. Empty: ROOT/pool/metadata, an allocated file."`
	Size           Size     `toml:"size" doc:"Size of a new data file. 0: the smaller of 100G and 80 % of the host's free space."`
	MetadataSize   Size     `toml:"metadata_size" doc:"Size of a new metadata file. 0: 48 bytes for each data block, at least 2M, rounded up."`
	BlockSize      Size     `toml:"block_size" doc:"Data block of a new pool: a multiple of 64K up to 1G."`
	NoSpaceTimeout Duration `toml:"no_space_timeout" doc:"How long a write waits for space when the pool is full before it gets ENOSPC."`
	ErrorIfNoSpace bool     `toml:"error_if_no_space" doc:"Writes get ENOSPC at once when the pool is full."`
	LowWater       Percent  `toml:"low_water" doc:"Free part of the data space at which the event low_water_mark is sent."`
	CommitInterval Duration `toml:"commit_interval" doc:"Longest time between commits while something changes."`
	Journal        bool     `toml:"journal" doc:"Keep changes since the last commit in 64M of memory outside the process (on a tmpfs at /run or /dev/shm), so that nothing is lost when the daemon is killed. Without it a killed daemon is like a power cut for its containers."`
}

// LVM says from what a thin pool is made with the LVM tools.
type LVM struct {
	Devices             []string `toml:"devices" doc:"Empty block devices that are used as a whole, such as [\"/dev/sdb\"]. Add further ones with 'mica pool grow --device'. Empty: no LVM. Was dm.directlvm_device."`
	DevicesForce        bool     `toml:"devices_force" doc:"Take devices with a file system or another signature on them, which is lost. Was dm.directlvm_device_force."`
	VolumeGroup         string   `toml:"volume_group" doc:"Name of the volume group."`
	ThinPool            string   `toml:"thin_pool" doc:"Name of the thin pool in it."`
	DataPercent         Percent  `toml:"data_percent" doc:"Part of the volume group for data. Was dm.thinp_percent."`
	MetadataPercent     Percent  `toml:"metadata_percent" doc:"Part of the volume group for metadata; LVM keeps a spare as large. Was dm.thinp_metapercent."`
	AutoextendThreshold Percent  `toml:"autoextend_threshold" doc:"Used part at which the pool grows within its volume group; 100: never. Was dm.thinp_autoextend_threshold."`
	AutoextendPercent   Percent  `toml:"autoextend_percent" doc:"By how much of its size it grows. Was dm.thinp_autoextend_percent."`
}

// Config is the same for package lvm.
func (l LVM) Config(blockSize Size) lvm.Config {
	return lvm.Config{
		Devices: l.Devices, VolumeGroup: l.VolumeGroup, Pool: l.ThinPool, Force: l.DevicesForce,
		DataPercent: int(l.DataPercent), MetadataPercent: int(l.MetadataPercent),
		ExtendThreshold: int(l.AutoextendThreshold), ExtendPercent: int(l.AutoextendPercent),
		BlockSize: int64(blockSize),
	}
}

// defaultLVM is what package lvm has by default.
func defaultLVM() LVM {
	d := lvm.Defaults()
	return LVM{
		VolumeGroup: d.VolumeGroup, ThinPool: d.Pool, DataPercent: Percent(d.DataPercent), MetadataPercent: Percent(d.MetadataPercent),
		AutoextendThreshold: Percent(d.ExtendThreshold), AutoextendPercent: Percent(d.ExtendPercent),
	}
}

// AutoExtend grows the pool.
type AutoExtend struct {
	Enabled   bool    `toml:"enabled" doc:"Grow the data file when it fills up. Only for pools in files."`
	Threshold Percent `toml:"threshold" doc:"Used part of the data space at which it grows."`
	Step      Percent `toml:"step" doc:"By how much of its size it grows."`
	Max       Size    `toml:"max" doc:"Largest size that it grows to. 0: as far as the host's file system has room."`
	HostFree  Percent `toml:"host_free" doc:"Part of the host's file system that must stay free; growing stops there."`
}

// Backup says when the metadata are backed up.
type Backup struct {
	Interval Duration `toml:"interval" doc:"How often the metadata are backed up, if something has changed. 0: only when the daemon ends."`
	Keep     int      `toml:"keep" doc:"How many backups stay. 0: none are made."`
	Dir      string   `toml:"dir" doc:"Directory of the backups. Empty: backups beside the pool's files, or in ROOT for a pool on devices."`
}

// Containers says what file systems are like.
type Containers struct {
	BaseSize     Size     `toml:"base_size" doc:"Size of the base file system, and of containers whose size is not given. Counts when the base is made, at the first start."`
	FileSystem   string   `toml:"file_system" doc:"ext4 or xfs. Counts when the base is made."`
	MountOptions []string `toml:"mount_options" doc:"Added to the mount options of every container, such as context=... for SELinux."`
	Discard      bool     `toml:"discard" doc:"Mount with discard: blocks of deleted files go back to the pool at once."`
}

// Images bounds what images bring.
type Images struct {
	MaxArchive Size `toml:"max_archive" doc:"Longest archive that comes as a stream or is compressed as a whole, unpacked: it is kept in ROOT/spool meanwhile."`
	MaxLayer   Size `toml:"max_layer" doc:"Longest layer, uncompressed, and largest sum of the sizes of the files in it, holes included."`
	MaxEntries int  `toml:"max_entries" doc:"Entries of a layer."`
	MaxRatio   int  `toml:"max_ratio" doc:"How many times its size a layer or an archive may unpack to, once that is more than 1G. Holes of sparse files count."`
	MaxName    Size `toml:"max_name" doc:"Longest path, or target of a link, in a layer; at most 4095."`
	MaxXattrs  Size `toml:"max_xattrs" doc:"Extended attributes of one file, names and values together."`
}

// Exports says how devices are exported.
type Exports struct {
	Kind    string `toml:"kind" doc:"How nodes of the user engine's devices are made: ublk, nbd (the kernel's NBD client), fuse (FUSE and a loop device), or auto, the first of these that the host can run. What is attached when this changes stays as it is. Devices of the kernel engine have nodes of their own."`
	LinkDir string `toml:"link_dir" doc:"Directory of the links to the nodes of containers."`
}

// NBD says how network block devices are served over TCP.
type NBD struct {
	Listen         string   `toml:"listen" doc:"IP:PORT for TCP. Empty: none. Without the three files below only a loopback address is accepted, such as 127.0.0.1:10809; every user of this host, and every container in the host's network, can then read and write what is served there."`
	TLSCertificate string   `toml:"tls_certificate" doc:"Certificate of the server, PEM. With TLS every client must use TLS (1.2 or later) and show a certificate. The files are read again when they change."`
	TLSKey         string   `toml:"tls_key" doc:"Key of the certificate, PEM. Others than its owner and group must not be able to read it."`
	TLSClientCA    string   `toml:"tls_client_ca" doc:"Certificates of the authorities that sign those of the clients, PEM."`
	TLSClients     []string `toml:"tls_clients" doc:"Names of clients that may connect: the common name, or a DNS, mail or URI name, of the certificate. Empty: every client of the CA. Whoever may connect can use everything that is attached with --tcp."`
}

// TLS tells whether TLS is asked for.
func (n NBD) TLS() bool { return n.TLSCertificate != "" || n.TLSKey != "" || n.TLSClientCA != "" }

func (n NBD) validate() error {
	files := []struct{ key, path string }{
		{"nbd.tls_certificate", n.TLSCertificate}, {"nbd.tls_key", n.TLSKey}, {"nbd.tls_client_ca", n.TLSClientCA},
	}
	for _, f := range files {
		switch {
		case n.TLS() && f.path == "":
			return fmt.Errorf("%s: not set: TLS needs nbd.tls_certificate, nbd.tls_key and nbd.tls_client_ca", f.key)
		case f.path != "" && !filepath.IsAbs(f.path):
			return fmt.Errorf("%s: %q is not an absolute path", f.key, f.path)
		}
	}
	if !n.TLS() && len(n.TLSClients) > 0 {
		return errors.New("nbd.tls_clients: without a certificate nobody is asked for a name: set nbd.tls_certificate, nbd.tls_key and nbd.tls_client_ca")
	}
	if slices.Contains(n.TLSClients, "") {
		return errors.New("nbd.tls_clients: an empty name")
	}
	if n.Listen == "" {
		if n.TLS() {
			return errors.New("nbd.listen: not set, but certificates are: TLS is for TCP")
		}
		return nil
	}
	if err := nbd.CheckTCP(n.Listen, n.TLS()); err != nil {
		return fmt.Errorf("nbd.listen: %w", err)
	}
	return nil
}

// Containerd says what containerd is offered.
type Containerd struct {
	Enabled      bool     `toml:"enabled" doc:"Listen on RUN/snapshotter.sock and RUN/diff.sock, which only root may use."`
	Address      string   `toml:"address" doc:"containerd's own socket, through which the diff service reads and writes blobs."`
	ShareLayers  bool     `toml:"share_layers" doc:"Layers that are there already, unpacked for another namespace or by another snapshotter or imported with 'mica image import', are not unpacked again."`
	MountOptions []string `toml:"mount_options" doc:"Added to the mount options of the snapshotter mica, after those of [containers]."`
	GuestOwned   bool     `toml:"guest_owned" doc:"The containers of the snapshotter mica are virtual machines (Kata, Firecracker) that get their devices raw: the host does not look into their file systems."`
	// Snapshotters are further ones, by name.
	Snapshotters map[string]Snapshotter `toml:"snapshotters" doc:"Further snapshotters, each with snapshots of its own on RUN/snapshotter-NAME.sock: one for each runtime that needs other settings. Their keys are mount_options and guest_owned, as above." example:"[containerd.snapshotters.mica-kata]\nguest_owned = true"`
}

// Snapshotter is one further snapshotter.
type Snapshotter struct {
	MountOptions []string `toml:"mount_options" doc:"Added to the mount options, after those of [containers]."`
	GuestOwned   bool     `toml:"guest_owned" doc:"Its containers are virtual machines that get their devices raw."`
}

// DefaultSnapshotter is the name of the snapshotter that is always there.
const DefaultSnapshotter = "mica"

// Limits bound what the daemon uses.
type Limits struct {
	Memory        Size     `toml:"memory" doc:"Soft limit of the daemon's memory. 0: 192M, twice the size of the table cache and 2 bytes for each data block."`
	TableCache    Size     `toml:"table_cache" doc:"Memory for mapping tables of open devices."`
	MetadataCache Size     `toml:"metadata_cache" doc:"Memory for metadata blocks."`
	HelperTimeout Duration `toml:"helper_timeout" doc:"Longest time of one mount, freeze or file system check; its process is killed then."`
	StallTimeout  Duration `toml:"stall_timeout" doc:"An import or a diff in which nothing moves for that long is given up."`
	Operations    int      `toml:"operations" doc:"Long operations that may run at the same time."`
	Events        int      `toml:"events" doc:"Events that are kept for clients that come back."`
}

// Default is what holds without a file.
func Default() Config {
	return Config{
		Root: "/var/lib/mica",
		Run:  "/run/mica",
		Log:  Log{Level: "info", Format: "text"},
		Pool: Pool{
			Engine: engine.Auto, BlockSize: 64 << 10, NoSpaceTimeout: Duration(60 * time.Second), LowWater: 10,
			CommitInterval: Duration(time.Second), Journal: true,
		},
		LVM:        defaultLVM(),
		AutoExtend: AutoExtend{Threshold: 80, Step: 20, HostFree: 5},
		Backup:     Backup{Interval: Duration(time.Hour), Keep: 48},
		Containers: Containers{BaseSize: 10 << 30, FileSystem: "ext4", Discard: true},
		Images:     Images{MaxArchive: 1 << 40, MaxLayer: 1 << 40, MaxEntries: 8 << 20, MaxRatio: 10_000, MaxName: 4095, MaxXattrs: 256 << 10},
		Exports:    Exports{Kind: "auto", LinkDir: "/dev/mica"},
		Containerd: Containerd{Enabled: true, Address: "/run/containerd/containerd.sock", ShareLayers: true},
		Limits: Limits{
			TableCache: 128 << 20, MetadataCache: 32 << 20,
			HelperTimeout: Duration(time.Minute), StallTimeout: Duration(5 * time.Minute),
			Operations: 16, Events: 4096,
		},
	}
}

// Load reads a file over the defaults. An empty path means DefaultFile if it is there; the
// returned path is the file that was read, empty if none.
func Load(path string) (Config, string, error) {
	named := path != ""
	if !named {
		path = DefaultFile
	}
	b, err := os.ReadFile(path)
	if !named && errors.Is(err, os.ErrNotExist) {
		return Default(), "", nil
	}
	if err != nil {
		return Config{}, "", fmt.Errorf("configuration: %w", err)
	}
	c, err := Parse(b)
	if err != nil {
		return Config{}, "", fmt.Errorf("configuration %s: %w", path, err)
	}
	return c, path, nil
}

// Parse reads the text of a file over the defaults. Keys that do not exist are errors, as are
// values that cannot be used.
func Parse(text []byte) (Config, error) {
	c := Default()
	d := toml.NewDecoder(bytes.NewReader(text)).DisallowUnknownFields()
	err := d.Decode(&c)
	var strict *toml.StrictMissingError
	var bad *toml.DecodeError
	switch {
	case errors.As(err, &strict):
		return c, fmt.Errorf("unknown keys:\n%s", strict.String())
	case errors.As(err, &bad):
		return c, fmt.Errorf("%w\n%s", err, bad.String())
	case err != nil:
		return c, err
	}
	return c, c.Validate()
}

// snapshotterName is what a further snapshotter may be called: its socket's name has it.
var snapshotterName = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9_-]{0,47}$`)

// Validate names the first value that cannot be used.
func (c *Config) Validate() error {
	if err := validateNumbers(reflect.ValueOf(*c), ""); err != nil {
		return err
	}
	bad := func(key, format string, args ...any) error {
		return fmt.Errorf("%s: "+format, append([]any{key}, args...)...)
	}
	for _, p := range []struct{ key, path string }{
		{"root", c.Root}, {"run", c.Run}, {"exports.link_dir", c.Exports.LinkDir}, {"containerd.address", c.Containerd.Address},
	} {
		if !filepath.IsAbs(p.path) {
			return bad(p.key, "%q is not an absolute path", p.path)
		}
	}
	for _, p := range []struct{ key, path string }{
		{"pool.data", c.Pool.Data}, {"pool.metadata", c.Pool.Metadata}, {"backup.dir", c.Backup.Dir},
	} {
		if p.path != "" && !filepath.IsAbs(p.path) {
			return bad(p.key, "%q is not an absolute path", p.path)
		}
	}
	if (c.Pool.Data == "") != (c.Pool.Metadata == "") {
		return bad("pool", "data and metadata go together: set both or none")
	}
	if !slices.Contains([]string{engine.Auto, engine.User, engine.Kernel}, c.Pool.Engine) {
		return bad("pool.engine", "%q is none of auto, user, kernel", c.Pool.Engine)
	}
	if c.Pool.ThinPool != "" && (c.Pool.Data != "" || c.Pool.Engine == engine.User) {
		return bad("pool.thin_pool", "%q is an active pool of the kernel: data and metadata, and the user engine, do not go with it", c.Pool.ThinPool)
	}
	if len(c.LVM.Devices) > 0 {
		if c.Pool.ThinPool != "" || c.Pool.Data != "" || c.Pool.Engine == engine.User {
			return bad("lvm.devices", "data, metadata and thin_pool of [pool], and the user engine, do not go with it")
		}
		if err := c.LVM.Config(c.Pool.BlockSize).Validate(); err != nil {
			return bad("lvm", "%w", err)
		}
	}
	const minBlock, maxBlock = 64 << 10, 1 << 30
	if b := c.Pool.BlockSize; b < minBlock || b > maxBlock || b%minBlock != 0 {
		return bad("pool.block_size", "%d bytes is not a multiple of 64K from 64K to 1G", b)
	}
	if s := c.Pool.Size; s != 0 && s < c.Pool.BlockSize {
		return bad("pool.size", "%s is less than one block of %s", s, c.Pool.BlockSize)
	}
	if !slices.Contains([]string{"ext4", "xfs"}, c.Containers.FileSystem) {
		return bad("containers.file_system", "%q is neither ext4 nor xfs", c.Containers.FileSystem)
	}
	least := Size(16 << 20)
	if c.Containers.FileSystem == "xfs" {
		least = 300 << 20 // mkfs.xfs makes none that is smaller
	}
	if !slices.Contains([]string{"auto", "ublk", "nbd", "fuse"}, c.Exports.Kind) {
		return bad("exports.kind", "%q is none of auto, ublk, nbd, fuse", c.Exports.Kind)
	}
	if c.Containers.BaseSize < least {
		return bad("containers.base_size", "%s is less than %s, the least for %s", c.Containers.BaseSize, least, c.Containers.FileSystem)
	}
	options := map[string][]string{"containers.mount_options": c.Containers.MountOptions, "containerd.mount_options": c.Containerd.MountOptions}
	for name, sn := range c.Containerd.Snapshotters {
		if !snapshotterName.MatchString(name) || name == DefaultSnapshotter {
			return bad("containerd.snapshotters", "%q is not a name for a further snapshotter: want 1 to 48 letters, digits, \"-\" and \"_\", and not %q", name, DefaultSnapshotter)
		}
		options["containerd.snapshotters."+name+".mount_options"] = sn.MountOptions
	}
	for key, list := range options {
		for _, o := range list {
			if o == "" || strings.ContainsAny(o, " \t\n") {
				return bad(key, "%q is not a mount option", o)
			}
		}
	}
	for _, v := range []struct {
		key string
		n   int64
	}{
		{"max_archive", int64(c.Images.MaxArchive)}, {"max_layer", int64(c.Images.MaxLayer)}, {"max_entries", int64(c.Images.MaxEntries)},
		{"max_ratio", int64(c.Images.MaxRatio)}, {"max_name", int64(c.Images.MaxName)}, {"max_xattrs", int64(c.Images.MaxXattrs)},
	} {
		if v.n < 1 {
			return bad("images."+v.key, "%d: want 1 or more", v.n)
		}
	}
	if n := c.Images.MaxName; n > 4095 {
		return bad("images.max_name", "%d: want 1 to 4095", n)
	}
	if err := c.NBD.validate(); err != nil {
		return err
	}
	if !slices.Contains([]string{"debug", "info", "warn", "error"}, c.Log.Level) {
		return bad("log.level", "%q is none of debug, info, warn, error", c.Log.Level)
	}
	if !slices.Contains([]string{"text", "json"}, c.Log.Format) {
		return bad("log.format", "%q is neither text nor json", c.Log.Format)
	}
	if c.AutoExtend.Enabled && (c.AutoExtend.Threshold == 0 || c.AutoExtend.Threshold == 100) {
		return bad("auto_extend.threshold", "%s: want 1%% to 99%%", c.AutoExtend.Threshold)
	}
	if c.AutoExtend.Enabled && c.AutoExtend.Step == 0 {
		return bad("auto_extend.step", "0%%: want 1%% to 100%%")
	}
	if c.Backup.Keep < 0 || c.Backup.Keep > 100000 {
		return bad("backup.keep", "%d: want 0 to 100000", c.Backup.Keep)
	}
	if i := c.Backup.Interval; i != 0 && i < Duration(time.Second) {
		return bad("backup.interval", "%s is less than 1s", i)
	}
	if c.Limits.Operations < 1 || c.Limits.Operations > 1000 {
		return bad("limits.operations", "%d: want 1 to 1000", c.Limits.Operations)
	}
	if c.Limits.Events < 16 || c.Limits.Events > 1<<20 {
		return bad("limits.events", "%d: want 16 to 1048576", c.Limits.Events)
	}
	if m := c.Limits.Memory; m != 0 && m < 64<<20 {
		return bad("limits.memory", "%s is less than 64M", m)
	}
	if c.Limits.HelperTimeout < Duration(time.Second) {
		return bad("limits.helper_timeout", "%s is less than 1s", c.Limits.HelperTimeout)
	}
	if c.Limits.StallTimeout < Duration(time.Second) {
		return bad("limits.stall_timeout", "%s is less than 1s", c.Limits.StallTimeout)
	}
	return nil
}

// validateNumbers checks what the types' text forms check, for values written as integers, which
// do not pass through them.
func validateNumbers(v reflect.Value, prefix string) error {
	for i := range v.NumField() {
		key := prefix + v.Type().Field(i).Tag.Get("toml")
		switch x := v.Field(i).Interface().(type) {
		case Size:
			if x < 0 {
				return fmt.Errorf("%s: %d is not a size", key, int64(x))
			}
		case Percent:
			if x < 0 || x > 100 {
				return fmt.Errorf("%s: %d is not a percentage from 0 to 100", key, int(x))
			}
		case Duration:
			if x < 0 || x%Duration(time.Millisecond) != 0 {
				return fmt.Errorf("%s: duration %d: want a number with a unit, such as \"90s\"", key, int64(x))
			}
		default:
			if v.Field(i).Kind() == reflect.Struct {
				if err := validateNumbers(v.Field(i), key+"."); err != nil {
					return err
				}
			}
		}
	}
	return nil
}
