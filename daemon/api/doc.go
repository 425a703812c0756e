// Package api holds what goes over the daemon's Unix socket: the JSON bodies of requests and
// answers, the errors, and the parameters of queries. The server (package daemon) and the client
// (package daemon/client) share it; the OpenAPI page is made from it.
//
// Sizes are bytes, times RFC 3339, durations strings such as "36h", "7d" or "1h30m".
package api

// Version is the prefix of every path.
const Version = "/v1"

// SocketName is the daemon's socket in its RUN directory.
const SocketName = "mica.sock"

// Media types of bodies that are not JSON.
const (
	MediaTar         = "application/x-tar"
	MediaOctets      = "application/octet-stream"
	MediaEventStream = "text/event-stream"
	MediaJSONLines   = "application/x-ndjson"
)

// Trailers of an answer that streams a diff. A diff without the trailer TrailerLevel is cut
// short, and nothing in it may be used.
const (
	TrailerLevel = "Mica-Level"
)
