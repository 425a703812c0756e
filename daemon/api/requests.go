package api

import "time"

// A Quiesce says what a copy of a container that is in use may rely on. Without any of it the
// file system is frozen for the moment of the copy.
type Quiesce struct {
	// Quiesced: the caller has made the contents consistent and keeps them so during the call.
	Quiesced bool `json:"quiesced,omitempty"`
	// CrashOK: where the file system cannot be frozen, a copy as after power loss will do.
	CrashOK bool `json:"crash_ok,omitempty"`
	// TrustGuest: the host may mount a file system that a guest wrote.
	TrustGuest bool `json:"trust_guest,omitempty"`
}

// ImportFile is the body of POST /v1/images that names an archive or an OCI layout directory on
// the daemon's host.
type ImportFile struct {
	File string `json:"file"`
	ImportParams
}

// ImportParams say what to do with an archive. With a streamed archive they are in the query.
type ImportParams struct {
	// Name of the image; empty: the one in the archive.
	Name string `json:"name,omitempty"`
	// Platform is "os/arch[/variant]"; empty: the host's.
	Platform string `json:"platform,omitempty"`
	// Ref chooses one of several images of an archive by the name written in it.
	Ref string `json:"ref,omitempty"`
	// Replace: move the name if another image has it.
	Replace bool              `json:"replace,omitempty"`
	Labels  map[string]string `json:"labels,omitempty"`
}

// TagImage is the body of POST /v1/images/{name}/tags.
type TagImage struct {
	Name string `json:"name"`
}

// CreateContainer is the body of POST /v1/containers.
type CreateContainer struct {
	Name  string `json:"name"`
	Image string `json:"image"`
	// SizeBytes of the device; 0: that of the image.
	SizeBytes int64             `json:"size_bytes,omitempty"`
	Labels    map[string]string `json:"labels,omitempty"`
	// TTL after which it is removed; empty: never.
	TTL Duration `json:"ttl,omitempty"`
}

// UpdateContainer is the body of PATCH /v1/containers/{name}. What is left out stays.
type UpdateContainer struct {
	// Labels to set; null removes one.
	Labels map[string]*string `json:"labels,omitempty"`
	// TTL counts from now; "0s": never.
	TTL *Duration `json:"ttl,omitempty"`
}

// ForkContainer is the body of POST /v1/containers/{name}/fork: either names, or a count with a
// prefix, which gives PREFIX1, PREFIX2 and so on.
type ForkContainer struct {
	Names  []string          `json:"names,omitempty"`
	Count  int               `json:"count,omitempty"`
	Prefix string            `json:"prefix,omitempty"`
	Labels map[string]string `json:"labels,omitempty"` // left out: those of the source
	TTL    Duration          `json:"ttl,omitempty"`
	Quiesce
}

// MaxFork is the largest number of copies of one fork.
const MaxFork = 10000

// RollbackContainer is the body of POST /v1/containers/{name}/rollback.
type RollbackContainer struct {
	Snapshot string `json:"snapshot"`
}

// CommitContainer is the body of POST /v1/containers/{name}/commit.
type CommitContainer struct {
	Image   string            `json:"image"`
	Replace bool              `json:"replace,omitempty"`
	Author  string            `json:"author,omitempty"`
	Comment string            `json:"comment,omitempty"`
	Labels  map[string]string `json:"labels,omitempty"`
	Quiesce
}

// ResizeContainer is the body of POST /v1/containers/{name}/resize.
type ResizeContainer struct {
	SizeBytes int64 `json:"size_bytes"`
}

// MountNote is the body of POST and DELETE /v1/containers/{name}/mounts: a client has mounted or
// unmounted the container's node on a directory.
type MountNote struct {
	Directory string `json:"directory"`
}

// CreateSnapshot is the body of POST /v1/snapshots.
type CreateSnapshot struct {
	Container string            `json:"container"`
	Name      string            `json:"name,omitempty"` // empty: made from the time
	Labels    map[string]string `json:"labels,omitempty"`
	Quiesce
}

// CreateAttachment is the body of POST /v1/attachments.
type CreateAttachment struct {
	Container string `json:"container"`
	As        string `json:"as,omitempty"` // "block" (the default) or "nbd"
	ReadOnly  bool   `json:"read_only,omitempty"`
	// TCP: with "nbd", serve it over TCP too, at the daemon's nbd.listen.
	TCP bool `json:"tcp,omitempty"`
	// TrustGuest: with "nbd", do not mark the container as owned by a guest.
	TrustGuest bool `json:"trust_guest,omitempty"`
}

// GrowPool is the body of POST /v1/pool/grow. Zero: stays as it is.
type GrowPool struct {
	SizeBytes     int64 `json:"size_bytes,omitempty"`
	MetadataBytes int64 `json:"metadata_bytes,omitempty"`
	// Devices are further block devices for a pool that was made with the LVM tools, which grows
	// over them by the percentages of the configuration.
	Devices []string `json:"devices,omitempty"`
	// Force takes devices that carry a signature; what they hold is lost.
	Force bool `json:"force,omitempty"`
}

// Shutdown is the body of POST /v1/shutdown.
type Shutdown struct {
	// Timeout bounds the wait for devices that are just being closed; empty: 5 s.
	Timeout Duration `json:"timeout,omitempty"`
}

// MaxWait is the longest time that a request for an operation may wait.
const MaxWait = 10 * time.Minute
