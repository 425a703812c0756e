package export

// A Noder is a device for which the kernel has a block device node already: the thin target of
// the kernel engine. Package export/dm gives such a node out as it is; no request passes through
// this process, and nothing is copied. Found by type assertion on the device given to Attach.
type Noder interface {
	// Node is the path of the node ("/dev/dm-7"). It lives until the device is closed.
	Node() string
	// KeepNode says whether the node stays when the device is closed, for a successor of this
	// process to adopt. It does not by default.
	KeepNode(keep bool)
	// AdoptNode makes the device use a node that a predecessor has left, which must be one of the
	// same thin device, in place of the one that it has.
	AdoptNode(node string) error
}
