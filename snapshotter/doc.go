// Package snapshotter is what containerd sees of mica: its snapshots service and its diff service,
// over the snapshots of package layer.
//
//	containerd  --RUN/snapshotter.sock-->  Server  -->  Snapshotter  -->  layer.SnapStore
//	            --RUN/diff.sock--------->  Server  -->  Differ       -->  layer.SnapStore
//	            <--content service--------------------  Differ
//
// # Bounded
//
// containerd calls Commit inside a write transaction of its own metadata, and its garbage collector
// holds a lock over all Removes and the Cleanup: while they last, nobody else gets on. So these
// three are answered within Options.Timeout, whatever the pool does; what could not be done by
// then has not been done, but for a step that was under way. Removing what somebody has mounted
// is not waited for: it is queued (layer.Store.Queue). The garbage collector goes on to the next
// snapshot only after errors of class FailedPrecondition, so Remove has no others, but for what is
// not there and for a daemon that is closing.
//
// # Classes of errors
//
// Every error has a class of github.com/containerd/errdefs (see class), and a message that names the
// snapshot and the numbers.
package snapshotter
