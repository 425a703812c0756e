package image

import (
	"fmt"
	"runtime"
	"strings"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// A Platform is an operating system, an architecture in Go's spelling, and for some
// architectures a variant ("v7").
type Platform struct{ OS, Arch, Variant string }

// HostPlatform is the platform that images are chosen for by default.
func HostPlatform() Platform { return Platform{OS: "linux", Arch: runtime.GOARCH}.normal() }

// ParsePlatform reads "os/arch" or "os/arch/variant".
func ParsePlatform(s string) (Platform, error) {
	parts := strings.Split(s, "/")
	bad := len(parts) < 2 || len(parts) > 3
	for _, p := range parts {
		bad = bad || p == "" || strings.ContainsFunc(p, func(r rune) bool {
			return !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("_.-", r))
		})
	}
	if bad {
		return Platform{}, fmt.Errorf("platform %s is not os/arch or os/arch/variant, such as linux/amd64 or linux/arm/v7", quote(s))
	}
	p := Platform{OS: parts[0], Arch: parts[1]}
	if len(parts) == 3 {
		p.Variant = parts[2]
	}
	return p.normal(), nil
}

func (p Platform) String() string {
	if p.Variant == "" {
		return p.OS + "/" + p.Arch
	}
	return p.OS + "/" + p.Arch + "/" + p.Variant
}

// normal spells a platform as Go and the image spec do; variants that an architecture has
// anyway are left out.
func (p Platform) normal() Platform {
	p.OS, p.Arch, p.Variant = strings.ToLower(p.OS), strings.ToLower(p.Arch), strings.ToLower(p.Variant)
	switch p.Arch {
	case "x86_64", "x86-64":
		p.Arch = "amd64"
	case "i386", "i486", "i586", "i686", "x86":
		p.Arch = "386"
	case "aarch64":
		p.Arch = "arm64"
	case "armhf":
		p.Arch, p.Variant = "arm", "v7"
	case "armel":
		p.Arch, p.Variant = "arm", "v6"
	}
	if p.Arch == "arm64" && (p.Variant == "8" || p.Variant == "v8" || p.Variant == "v8.0") ||
		p.Arch == "amd64" && p.Variant == "v1" {
		p.Variant = ""
	}
	if p.Arch == "arm" {
		switch p.Variant {
		case "":
			p.Variant = "v7"
		case "5", "6", "7", "8":
			p.Variant = "v" + p.Variant
		}
	}
	return p
}

func platformOf(p *ocispec.Platform) Platform {
	return Platform{OS: p.OS, Arch: p.Architecture, Variant: p.Variant}.normal()
}

// score says how well an image for p runs where want is asked for: 0 is not at all, more is
// better. A 32-bit ARM machine runs older variants; otherwise variants must be equal.
func (p Platform) score(want Platform) int {
	if p.OS != want.OS || p.Arch != want.Arch {
		return 0
	}
	if p.Variant == want.Variant {
		return 100
	}
	if p.Arch == "arm" && p.Variant < want.Variant && len(p.Variant) == 2 {
		return int(p.Variant[1] - '0')
	}
	return 0
}
