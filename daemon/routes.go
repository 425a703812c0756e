package daemon

import (
	"net/http"

	"mica/daemon/api"
	"mica/layer"
)

// A route is one method of one path. The table of routes is the only place where they are
// listed: the mux and the OpenAPI page are both made from it.
type route struct {
	method, path string
	summary      string
	doc          string
	query        []param
	body         any    // a value of the type of the JSON body; nil: none
	stream       string // media type of a body that is not JSON; "": none
	replies      map[int]any
	codes        []api.Code // errors beside invalid, internal and closing
	// change: refused once the daemon shuts down.
	change bool
	handle func(*server, *request) (status int, body any, err error)
}

// Values of route.replies that are not JSON.
type (
	// streamed is an answer of another media type.
	streamed struct{ media, doc string }
)

var (
	paramLabels = param{name: "label", kind: "string", many: true, doc: "only objects with this label: KEY=VALUE, or KEY for any value; may be repeated"}
	paramOwner  = param{name: "owner", kind: "string", doc: "only objects of this owner; \"*\" for all; left out: mica"}
	paramPrefix = param{name: "prefix", kind: "string", doc: "only names that begin so"}
	paramLimit  = param{name: "limit", kind: "integer", doc: "at most so many; 0: all"}
	paramCursor = param{name: "cursor", kind: "string", doc: "where to go on: \"next\" of the page before"}
	paramWait   = param{name: "wait", kind: "duration", doc: "wait so long for the end before answering, such as 30s; at most 10m"}
	paramOp     = param{name: "operation", kind: "string", doc: "id for the operation, chosen by the client, so that the request can be repeated and the operation found again"}

	listParams  = []param{paramLabels, paramOwner, paramPrefix, paramLimit, paramCursor}
	quiesceDocs = []param{
		{name: "quiesced", kind: "boolean", doc: "the caller has made the contents consistent"},
		{name: "crash_ok", kind: "boolean", doc: "a copy as after power loss will do"},
		{name: "trust_guest", kind: "boolean", doc: "the host may mount a file system that a guest wrote"},
	}
)

func params(list []param, more ...param) []param { return append(append([]param{}, list...), more...) }

// operationReplies are those of every route that starts long work.
var operationReplies = map[int]any{http.StatusOK: api.Operation{}, http.StatusAccepted: api.Operation{}}

const operationDoc = "Answers 202 with the operation, or 200 with the ended one if it ends within the time of wait. " +
	"If it fails in that time, the answer is its error. Repeating a request with the same operation id gives the same operation."

// changeCodes are the errors of everything that changes an object.
func changeCodes(more ...api.Code) []api.Code {
	return append([]api.Code{api.CodeNotFound, api.CodeReadOnly, api.CodeBroken, api.CodeNoSpace, api.CodeNeedsCheck, api.CodeCancelled}, more...)
}

// routes lists every route. A {name...} at the end takes slashes, so that image names need not be
// escaped there; everywhere else a slash in a name is written %2F.
func routes() []route {
	return []route{
		{
			method: "GET", path: "/v1/openapi.json", summary: "This description",
			replies: map[int]any{200: streamed{"application/json", "OpenAPI 3.0"}},
			handle:  (*server).openAPI,
		},
		{
			method: "GET", path: "/v1/status", summary: "State of the daemon, its pool, its store and its exports",
			replies: map[int]any{200: api.Status{}},
			handle:  (*server).status,
		},
		{
			method: "GET", path: "/v1/metrics", summary: "Figures for Prometheus",
			replies: map[int]any{200: streamed{metricsMedia, "the text format of Prometheus"}},
			handle:  (*server).metrics,
		},
		{
			method: "POST", path: "/v1/shutdown", summary: "Detach everything and end the daemon, or refuse and name the holders",
			doc:     "If one device is busy nothing is detached and details.holders lists who uses what.",
			body:    api.Shutdown{},
			replies: map[int]any{204: nil},
			codes:   []api.Code{api.CodeBusy, api.CodeReadOnly},
			change:  true,
			handle:  (*server).shutdown,
		},
		{
			method: "GET", path: "/v1/events", summary: "What happens, as it happens",
			doc: "JSON lines, or server-sent events if the request accepts text/event-stream. Events have ids that rise; " +
				"after=ID, or the header Last-Event-ID, goes on behind one. An event of kind lost says that some are no longer kept.",
			query: []param{
				{name: "after", kind: "integer", doc: "events with ids above this one; 0: all that are kept; left out: from now on"},
				{name: "follow", kind: "boolean", doc: "false: end after the events that are kept"},
				{name: "kind", kind: "string", many: true, doc: "only events of this kind; may be repeated"},
				{name: "object", kind: "string", doc: "only events about objects that begin so, such as container/ or container/web"},
			},
			replies: map[int]any{200: streamed{api.MediaJSONLines, "one Event a line"}},
			handle:  (*server).events,
		},
		{
			method: "GET", path: "/v1/images", summary: "Images, by name",
			query:   listParams,
			replies: map[int]any{200: api.List[layer.Image]{}},
			handle:  (*server).images,
		},
		{
			method: "POST", path: "/v1/images", summary: "Import an image",
			doc: "The body is an archive (OCI or docker save), with the parameters in the query; the answer comes when it is imported, " +
				"and meanwhile the operation shows the progress under the id that the client chose. Or the body is JSON " +
				"and names a file on the daemon's host; that is an operation in the background. " + operationDoc,
			query: []param{
				{name: "name", kind: "string", doc: "name of the image; left out: the one in the archive"},
				{name: "platform", kind: "string", doc: "os/arch[/variant]; left out: the host's"},
				{name: "ref", kind: "string", doc: "which image of an archive that holds several"},
				{name: "replace", kind: "boolean", doc: "move the name if another image has it"},
				{name: "label", kind: "string", many: true, doc: "label to set: KEY=VALUE; may be repeated"},
				paramOp, paramWait,
			},
			body: api.ImportFile{}, stream: api.MediaOctets,
			replies: operationReplies,
			codes:   changeCodes(api.CodeExists, api.CodeDigest, api.CodeTooMany),
			change:  true,
			handle:  (*server).importImage,
		},
		{
			method: "GET", path: "/v1/images/{name...}", summary: "One image",
			replies: map[int]any{200: layer.Image{}},
			codes:   []api.Code{api.CodeNotFound},
			handle:  (*server).image,
		},
		{
			method: "DELETE", path: "/v1/images/{name...}", summary: "Remove an image's name, and the layers that nothing needs any more",
			replies: map[int]any{204: nil},
			codes:   changeCodes(api.CodeInUse),
			change:  true,
			handle:  (*server).removeImage,
		},
		{
			method: "POST", path: "/v1/images/{name}/tags", summary: "Give an image a further name",
			body:    api.TagImage{},
			replies: map[int]any{200: layer.Image{}},
			codes:   changeCodes(api.CodeExists),
			change:  true,
			handle:  (*server).tagImage,
		},
		{
			method: "GET", path: "/v1/layers", summary: "Image layers",
			replies: map[int]any{200: api.List[layer.Layer]{}},
			handle:  (*server).layers,
		},
		{
			method: "GET", path: "/v1/containers", summary: "Containers, by name",
			query:   params(listParams, param{name: "image", kind: "string", doc: "only containers of this image"}),
			replies: map[int]any{200: api.List[api.Container]{}},
			handle:  (*server).containers,
		},
		{
			method: "POST", path: "/v1/containers", summary: "Make a container from an image",
			doc:     "201: made. 200: one with the same name and parameters was there.",
			body:    api.CreateContainer{},
			replies: map[int]any{200: api.Container{}, 201: api.Container{}},
			codes:   changeCodes(api.CodeExists),
			change:  true,
			handle:  (*server).createContainer,
		},
		{
			method: "GET", path: "/v1/containers/{name}", summary: "One container",
			replies: map[int]any{200: api.Container{}},
			codes:   []api.Code{api.CodeNotFound},
			handle:  (*server).container,
		},
		{
			method: "PATCH", path: "/v1/containers/{name}", summary: "Change labels or the time to live",
			body:    api.UpdateContainer{},
			replies: map[int]any{200: api.Container{}},
			codes:   changeCodes(),
			change:  true,
			handle:  (*server).updateContainer,
		},
		{
			method: "DELETE", path: "/v1/containers/{name}", summary: "Remove a container; its blocks are freed in the background",
			query: []param{
				{name: "deferred", kind: "boolean", doc: "a busy one is removed when it is free"},
				{name: "snapshots", kind: "boolean", doc: "remove its snapshots too"},
			},
			replies: map[int]any{204: nil},
			codes:   changeCodes(api.CodeBusy, api.CodeInUse),
			change:  true,
			handle:  (*server).removeContainer,
		},
		{
			method: "POST", path: "/v1/containers/{name}/fork", summary: "Make copies, all of the same moment",
			body:    api.ForkContainer{},
			replies: map[int]any{201: api.ForkResult{}},
			codes:   changeCodes(api.CodeExists, api.CodeBusy, api.CodeInUse, api.CodeGuestOwned),
			change:  true,
			handle:  (*server).forkContainer,
		},
		{
			method: "POST", path: "/v1/containers/{name}/rollback", summary: "Give a detached container the contents of a snapshot",
			body:    api.RollbackContainer{},
			replies: map[int]any{200: api.Container{}},
			codes:   changeCodes(api.CodeBusy, api.CodeInUse),
			change:  true,
			handle:  (*server).rollbackContainer,
		},
		{
			method: "POST", path: "/v1/containers/{name}/commit", summary: "Make an image from a container",
			doc:     operationDoc,
			query:   []param{paramOp, paramWait},
			body:    api.CommitContainer{},
			replies: operationReplies,
			codes:   changeCodes(api.CodeExists, api.CodeBusy, api.CodeInUse, api.CodeGuestOwned, api.CodeTooMany),
			change:  true,
			handle:  (*server).commitContainer,
		},
		{
			method: "GET", path: "/v1/containers/{name}/diff", summary: "What a container changed, as an OCI layer tar",
			doc:     "Complete only with the trailer " + api.TrailerLevel + ", which names how consistent it is; a failure on the way cuts the body short.",
			query:   params(quiesceDocs, param{name: "snapshot", kind: "string", doc: "of this snapshot instead of now"}),
			replies: map[int]any{200: streamed{api.MediaTar, "OCI layer tar, not compressed"}},
			codes:   changeCodes(api.CodeBusy, api.CodeInUse, api.CodeGuestOwned),
			handle:  (*server).diffContainer,
		},
		{
			method: "POST", path: "/v1/containers/{name}/resize", summary: "Enlarge a container's device and file system",
			body:    api.ResizeContainer{},
			replies: map[int]any{200: api.Container{}},
			codes:   changeCodes(api.CodeBusy, api.CodeInUse, api.CodeGuestOwned, api.CodeUnsupported),
			change:  true,
			handle:  (*server).resizeContainer,
		},
		{
			method: "POST", path: "/v1/containers/{name}/mounts", summary: "Tell of a directory where the node was mounted",
			body:    api.MountNote{},
			replies: map[int]any{204: nil},
			codes:   changeCodes(),
			change:  true,
			handle:  (*server).noteMount,
		},
		{
			method: "DELETE", path: "/v1/containers/{name}/mounts", summary: "Tell that the node was unmounted from a directory",
			body:    api.MountNote{},
			replies: map[int]any{204: nil},
			codes:   changeCodes(),
			change:  true,
			handle:  (*server).forgetMount,
		},
		{
			method: "GET", path: "/v1/snapshots", summary: "Snapshots of a container, or of all",
			query:   []param{{name: "container", kind: "string", doc: "only those of this container"}, paramLimit, paramCursor},
			replies: map[int]any{200: api.List[layer.Snapshot]{}},
			codes:   []api.Code{api.CodeNotFound},
			handle:  (*server).snapshots,
		},
		{
			method: "POST", path: "/v1/snapshots", summary: "Keep a container's contents as of now",
			doc:     "201: made. 200: one of that name was there, with the same labels.",
			body:    api.CreateSnapshot{},
			replies: map[int]any{200: layer.Snapshot{}, 201: layer.Snapshot{}},
			codes:   changeCodes(api.CodeExists, api.CodeBusy, api.CodeInUse, api.CodeGuestOwned),
			change:  true,
			handle:  (*server).createSnapshot,
		},
		{
			method: "GET", path: "/v1/snapshots/{container}/{snapshot}", summary: "One snapshot",
			replies: map[int]any{200: layer.Snapshot{}},
			codes:   []api.Code{api.CodeNotFound},
			handle:  (*server).snapshot,
		},
		{
			method: "DELETE", path: "/v1/snapshots/{container}/{snapshot}", summary: "Remove a snapshot",
			replies: map[int]any{204: nil},
			codes:   changeCodes(api.CodeInUse),
			change:  true,
			handle:  (*server).removeSnapshot,
		},
		{
			method: "GET", path: "/v1/attachments", summary: "Containers that are attached, and where",
			query:   []param{paramOwner, paramLimit, paramCursor},
			replies: map[int]any{200: api.List[api.AttachmentOf]{}},
			handle:  (*server).attachments,
		},
		{
			method: "POST", path: "/v1/attachments", summary: "Export a container as a block device or an NBD socket",
			doc:     "201: attached. 200: it was attached in the same way.",
			body:    api.CreateAttachment{},
			replies: map[int]any{200: api.AttachmentOf{}, 201: api.AttachmentOf{}},
			codes:   changeCodes(api.CodeExists, api.CodeInUse, api.CodeBusy, api.CodeGuestOwned, api.CodeUnsupported),
			change:  true,
			handle:  (*server).createAttachment,
		},
		{
			method: "GET", path: "/v1/attachments/{container}", summary: "A container's attachment",
			replies: map[int]any{200: api.AttachmentOf{}},
			codes:   []api.Code{api.CodeNotFound},
			handle:  (*server).attachment,
		},
		{
			method: "DELETE", path: "/v1/attachments/{container}", summary: "Take a container's node away",
			query:   []param{{name: "deferred", kind: "boolean", doc: "if it is busy, go on trying in the background; the answer is busy all the same"}},
			replies: map[int]any{204: nil},
			codes:   changeCodes(api.CodeBusy),
			change:  true,
			handle:  (*server).removeAttachment,
		},
		{
			method: "GET", path: "/v1/pool", summary: "The pool and its space",
			replies: map[int]any{200: api.Pool{}},
			handle:  (*server).poolStatus,
		},
		{
			method: "GET", path: "/v1/pool/df", summary: "What uses the pool's space, device by device",
			replies: map[int]any{200: layer.DF{}},
			handle:  (*server).df,
		},
		{
			method: "POST", path: "/v1/pool/grow", summary: "Enlarge the pool",
			doc:     operationDoc,
			query:   []param{paramOp, paramWait},
			body:    api.GrowPool{},
			replies: operationReplies,
			codes:   changeCodes(api.CodeTooMany, api.CodeUnsupported),
			change:  true,
			handle:  (*server).growPool,
		},
		{
			method: "POST", path: "/v1/pool/trim", summary: "Give free blocks back to the host",
			doc:     operationDoc,
			query:   []param{paramOp, paramWait},
			replies: operationReplies,
			codes:   changeCodes(api.CodeTooMany),
			change:  true,
			handle:  (*server).trimPool,
		},
		{
			method: "POST", path: "/v1/pool/check", summary: "Check the pool's metadata as of the last commit",
			doc:     operationDoc,
			query:   []param{paramOp, paramWait},
			replies: operationReplies,
			codes:   []api.Code{api.CodeTooMany, api.CodeUnsupported, api.CodeCancelled},
			handle:  (*server).checkPool,
		},
		backupRoutes()[0], backupRoutes()[1],
		{
			method: "GET", path: "/v1/operations", summary: "Long work: running, and ended not long ago",
			query:   []param{{name: "state", kind: "string", doc: "only running, done, failed or cancelled ones"}, paramLimit, paramCursor},
			replies: map[int]any{200: api.List[api.Operation]{}},
			handle:  (*server).operationList,
		},
		{
			method: "GET", path: "/v1/operations/{id}", summary: "One operation, with its progress",
			query:   []param{paramWait},
			replies: map[int]any{200: api.Operation{}},
			codes:   []api.Code{api.CodeNotFound},
			handle:  (*server).operation,
		},
		{
			method: "DELETE", path: "/v1/operations/{id}", summary: "Cancel an operation; forget one that has ended",
			doc:     "The answer is the operation. What it has done is undone before it ends; wait=30s waits for that.",
			query:   []param{paramWait},
			replies: map[int]any{200: api.Operation{}},
			codes:   []api.Code{api.CodeNotFound},
			handle:  (*server).cancelOperation,
		},
	}
}
