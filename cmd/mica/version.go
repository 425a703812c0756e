package main

import (
	"runtime"
	"runtime/debug"
)

// release is the version; the build may set it: -ldflags "-X main.release=1.2.3".
var release = "0.1.0-dev"

// version is the release with the commit that it was built from, where that is known.
func version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return release
	}
	commit, dirty := "", ""
	for _, s := range info.Settings {
		switch {
		case s.Key == "vcs.revision":
			commit = "+" + s.Value[:min(12, len(s.Value))]
		case s.Key == "vcs.modified" && s.Value == "true":
			dirty = "-changed"
		}
	}
	if commit == "" {
		return release
	}
	return release + commit + dirty
}

func goVersion() string { return runtime.Version() + " " + runtime.GOOS + "/" + runtime.GOARCH }
