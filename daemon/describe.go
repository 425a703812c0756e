package daemon

import (
	"context"
	"fmt"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"

	"mica/daemon/api"
	"mica/dev"
	"mica/engine/user"
	"mica/export"
	"mica/export/node"
)

// nodeUsers says who uses a node that will not go away by itself. It reads /proc and sysfs only, and
// never opens the device.
func nodeUsers(path string) []string {
	var st unix.Stat_t
	if unix.Stat(path, &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFBLK {
		return nil
	}
	var list []string
	for _, u := range node.Users(st.Rdev, path) {
		list = append(list, u.String())
	}
	return list
}

// describePool fills in the paths and what the host has.
func (d *daemon) describePool(p *api.Pool) {
	p.Data, p.Metadata = d.loc.DataPath(), d.loc.MetadataPath()
	if name := d.c.Pool.ThinPool; name != "" {
		p.Data, p.Metadata = name, name
	}
	if _, free, ok := hostSpace(p.Data); ok {
		p.HostFreeBytes = free
	}
	if x := d.c.AutoExtend; x.Enabled {
		p.AutoExtend = &api.AutoExtend{ThresholdPercent: int(x.Threshold), StepPercent: int(x.Step), MaxBytes: int64(x.Max)}
	}
}

// describe fills in what only the daemon knows.
func (d *daemon) describe(st *api.Status) {
	st.Version, st.Started = d.o.Version, d.started.UTC()
	st.Root, st.Run, st.Config = d.c.Root, d.c.Run, d.o.ConfigFile
	st.PoolName = filepath.Base(d.c.Root) + "-pool"
	st.MemoryBytes, st.MemoryLimitBytes = anonymousMemory(), d.memory
	st.Exports = api.Exports{Kind: d.exporter.Kind(), NBDSocket: d.nbd.path, NBDAddress: d.nbd.address, IOFlusher: isIOFlusher(), HolderPID: peerPID(d.path(holderSocket))}
	st.Exports.Resend, _ = d.exporter.Restartable()
	for _, c := range d.exporter.Choices() {
		if !c.Chosen {
			st.Exports.NotChosen = append(st.Exports.NotChosen, api.ExportChoice{Kind: c.Kind, Why: c.Why})
		}
	}
	st.Exports.HostNamespaces, _ = hostNamespaces()
	st.Notes = d.notes()
	if st.Store.ReadOnly != "" {
		st.Notes = append(st.Notes, "the store is read-only: "+st.Store.ReadOnly)
	}
	if st.Store.BaseError != "" {
		st.Notes = append(st.Notes, "the base file system could not be made: "+st.Store.BaseError)
	}
	if n := len(st.Store.Foreign); n > 0 {
		st.Notes = append(st.Notes, fmt.Sprintf("%d devices of the pool are foreign: not in the catalog, never touched", n))
	}
	b := d.backups.status()
	st.Backups = &b
	if n := d.backups.note(); n != "" {
		st.Notes = append(st.Notes, n)
	}
	p := &st.Pool
	if p.NeedsCheck || p.FailReason != "" {
		st.Notes = append(st.Notes, failureNote(p, d.loc))
	}
	if p.Journal.Problem != "" {
		st.Notes = append(st.Notes, p.Journal.Problem)
	}
	if p.Journal.State == "off" {
		st.Notes = append(st.Notes, "there is no journal (pool.journal): a killed daemon is like a power cut for its containers")
	}
	if promised := p.DataSpaceBytes - max(0, p.HostBytes); p.HostBytes >= 0 && p.HostFreeBytes >= 0 && promised > p.HostFreeBytes {
		st.Notes = append(st.Notes, fmt.Sprintf("the data file may still grow by %d bytes, its file system has %d free: it can fill up before the pool does", promised, p.HostFreeBytes))
	}
}

// failureNote says what to do about a pool that must be checked.
func failureNote(p *api.Pool, l user.Location) string {
	where := l.Dir
	if where == "" {
		where = "--metadata " + l.Metadata
	}
	why := ""
	if p.FailReason != "" {
		why = " (" + p.FailReason + ")"
	}
	return "the pool takes no changes" + why + ": end the daemon with SIGTERM, then run: mica thin check --clear-needs-check " + where
}

// notes are what holds for the whole life of the daemon.
func (d *daemon) notes() []string {
	notes := slices.Clone(d.pool.notes)
	if ok, why := d.exporter.Restartable(); !ok {
		notes = append(notes, "the death of the daemon is an I/O error for attached containers: "+why)
	}
	if !isIOFlusher() {
		notes = append(notes, "PR_SET_IO_FLUSHER is not set (CAP_SYS_RESOURCE is missing): under memory pressure I/O may wait for itself")
	}
	if state, why := hostNamespaces(); state != "yes" {
		notes = append(notes, why)
	}
	if n := d.c.NBD; n.Listen != "" && !n.TLS() {
		notes = append(notes, "NBD is served on "+d.nbd.address+" without TLS: every user of this host can use what is attached with --tcp")
	}
	return notes
}

// peerPID is the process that listens on a Unix socket, 0 if there is none.
func peerPID(path string) int {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0
	}
	defer unix.Close(fd)
	if unix.Connect(fd, &unix.SockaddrUnix{Name: path}) != nil {
		return 0
	}
	cred, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
	if err != nil {
		return 0
	}
	return int(cred.Pid)
}

// refuseOutside is e on a host, and an exporter that attaches nothing where this process
// certainly does not see the host's mounts: nodes would be handed out that nobody can watch.
func refuseOutside(e export.Exporter) export.Exporter {
	if state, why := hostNamespaces(); state == "no" {
		return outside{e, why}
	}
	return e
}

type outside struct {
	export.Exporter
	why string
}

func (o outside) Attach(context.Context, string, dev.Device, export.AttachOptions) (export.Attachment, error) {
	return nil, &api.Error{Code: api.CodeUnsupported, Message: "no block devices are exported here: " + o.why}
}
