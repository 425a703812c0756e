package image

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"sort"
	"strings"

	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Docker's media types for the same things.
const (
	dockerIndex    = "application/vnd.docker.distribution.manifest.list.v2+json"
	dockerManifest = "application/vnd.docker.distribution.manifest.v2+json"
	dockerConfig   = "application/vnd.docker.container.image.v1+json"
	dockerLayer    = "application/vnd.docker.image.rootfs."
)

// Names of images in the annotations of a layout's index.
const (
	annotationName = "io.containerd.image.name" // the full name; containerd, buildkit and docker write it
	annotationRef  = ocispec.AnnotationRefName  // often the tag only
)

const (
	maxDepth     = 4     // of indexes in indexes
	maxManifests = 10000 // in all indexes together
	maxLayers    = 1000  // of one image
)

func isIndex(mediaType string) bool {
	return mediaType == ocispec.MediaTypeImageIndex || mediaType == dockerIndex
}

func isManifest(mediaType string) bool {
	return mediaType == ocispec.MediaTypeImageManifest || mediaType == dockerManifest
}

// A candidate is one manifest that an index offers.
type candidate struct {
	desc     ocispec.Descriptor
	platform *Platform // nil: the index does not say
}

// loadLayout reads an OCI image layout.
func (a *Archive) loadLayout(ctx context.Context, layout []byte) error {
	var l ocispec.ImageLayout
	if err := decodeJSON(ocispec.ImageLayoutFile, layout, &l); err != nil {
		return err
	}
	if !strings.HasPrefix(l.Version, "1.") {
		return fmt.Errorf("%s: layout version %s, want 1.x: %w", ocispec.ImageLayoutFile, quote(l.Version), ErrInvalid)
	}
	b, err := a.readAll(ocispec.ImageIndexFile)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%s is missing in the archive: %w", ocispec.ImageIndexFile, ErrInvalid)
	} else if err != nil {
		return err
	}
	index, err := parseIndex(ocispec.ImageIndexFile, b)
	if err != nil {
		return err
	}
	groups, err := groupByImage(index.Manifests)
	if err != nil {
		return err
	}
	for _, g := range groups {
		if err := ctx.Err(); err != nil {
			return err
		}
		im, err := a.loadGroup(ctx, g)
		if errors.Is(err, errNotImage) && len(groups) > 1 {
			continue
		}
		if err != nil {
			return fmt.Errorf("%s: %w", g, err)
		}
		a.addImage(im)
	}
	if len(a.images) == 0 {
		return fmt.Errorf("%s lists no image: %w", ocispec.ImageIndexFile, ErrInvalid)
	}
	return a.addDockerNames()
}

// addImage merges an image that is there already under other names.
func (a *Archive) addImage(im Image) {
	for i := range a.images {
		if a.images[i].Digest == im.Digest {
			for _, n := range im.Names {
				if !slices.Contains(a.images[i].Names, n) {
					a.images[i].Names = append(a.images[i].Names, n)
				}
			}
			return
		}
	}
	a.images = append(a.images, im)
}

// A group is what the top index says about one image: one descriptor, or one for each platform.
type group struct {
	name  string
	descs []ocispec.Descriptor
}

func (g group) String() string {
	if g.name != "" {
		return "image " + quote(g.name)
	}
	return fmt.Sprintf("image %s", g.descs[0].Digest)
}

// groupByImage sorts out what the top index means: descriptors of one name are one image for
// several platforms; nameless ones are too if all have different platforms, else each is an
// image.
func groupByImage(descs []ocispec.Descriptor) ([]group, error) {
	if len(descs) > maxManifests {
		return nil, fmt.Errorf("%s: %d manifests, at most %d: %w", ocispec.ImageIndexFile, len(descs), maxManifests, ErrLimit)
	}
	var groups []group
	at := map[string]int{}
	for _, d := range descs {
		if isAttestation(d) {
			continue
		}
		name := d.Annotations[annotationName]
		if name == "" {
			name = d.Annotations[annotationRef]
		}
		i, ok := at[name]
		if !ok {
			i = len(groups)
			at[name] = i
			groups = append(groups, group{name: name})
		}
		if !slices.ContainsFunc(groups[i].descs, func(o ocispec.Descriptor) bool { return o.Digest == d.Digest }) {
			groups[i].descs = append(groups[i].descs, d)
		}
	}
	var out []group
	for _, g := range groups {
		switch {
		case len(g.descs) == 1 || differentPlatforms(g.descs):
			out = append(out, g)
		case g.name != "":
			return nil, fmt.Errorf("%s: the name %s stands for two images, %s and %s: %w",
				ocispec.ImageIndexFile, quote(g.name), g.descs[0].Digest, g.descs[1].Digest, ErrInvalid)
		default:
			for _, d := range g.descs {
				out = append(out, group{descs: []ocispec.Descriptor{d}})
			}
		}
	}
	return out, nil
}

func differentPlatforms(descs []ocispec.Descriptor) bool {
	seen := map[Platform]bool{}
	for _, d := range descs {
		if d.Platform == nil || seen[platformOf(d.Platform)] {
			return false
		}
		seen[platformOf(d.Platform)] = true
	}
	return true
}

// isAttestation recognises what buildkit puts beside images in an index.
func isAttestation(d ocispec.Descriptor) bool {
	return d.Annotations["vnd.docker.reference.type"] != "" ||
		d.Platform != nil && d.Platform.OS == "unknown" && d.Platform.Architecture == "unknown"
}

// errNotImage: a manifest of something else (a signature, a chart).
var errNotImage = errors.New("not a container image")

// loadGroup chooses the manifest for the platform and reads it.
func (a *Archive) loadGroup(ctx context.Context, g group) (Image, error) {
	var cands []candidate
	for _, d := range g.descs {
		var err error
		if cands, err = a.candidates(ctx, cands, d, 0); err != nil {
			return Image{}, err
		}
	}
	im, err := a.choose(ctx, cands)
	if err != nil {
		return Image{}, err
	}
	if g.name != "" {
		im.Names = []string{g.name}
	}
	return im, nil
}

// candidates collects the manifests that a descriptor leads to.
func (a *Archive) candidates(ctx context.Context, cands []candidate, d ocispec.Descriptor, depth int) ([]candidate, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if isAttestation(d) {
		return cands, nil
	}
	switch {
	case isManifest(d.MediaType):
		if len(cands) >= maxManifests {
			return nil, fmt.Errorf("more than %d manifests: %w", maxManifests, ErrLimit)
		}
		c := candidate{desc: d}
		if d.Platform != nil && d.Platform.Architecture != "" {
			p := platformOf(d.Platform)
			c.platform = &p
		}
		return append(cands, c), nil
	case isIndex(d.MediaType):
		if depth >= maxDepth {
			return nil, fmt.Errorf("indexes nested more than %d deep: %w", maxDepth, ErrLimit)
		}
		what := "index " + string(d.Digest)
		b, err := a.readBlob(what, d)
		if err != nil {
			return nil, err
		}
		index, err := parseIndex(what, b)
		if err != nil {
			return nil, err
		}
		for _, child := range index.Manifests {
			if cands, err = a.candidates(ctx, cands, child, depth+1); err != nil {
				return nil, err
			}
		}
		return cands, nil
	}
	return nil, fmt.Errorf("manifest %s has media type %s, which is not an image: %w: %w", d.Digest, quote(d.MediaType), errNotImage, ErrInvalid)
}

// choose takes the best candidate for the platform.
func (a *Archive) choose(ctx context.Context, cands []candidate) (Image, error) {
	want, asked := a.opts.Platform.normal(), a.opts.Platform != Platform{}
	if !asked {
		want = HostPlatform()
	}
	if len(cands) == 0 {
		return Image{}, fmt.Errorf("the index lists no image: %w", ErrInvalid)
	}
	if len(cands) == 1 && !asked {
		return a.loadManifest(cands[0].desc)
	}
	best, score := -1, 0
	var have []string
	for i := range cands {
		if err := ctx.Err(); err != nil {
			return Image{}, err
		}
		p := cands[i].platform
		if p == nil {
			im, err := a.loadManifest(cands[i].desc)
			if errors.Is(err, errNotImage) {
				continue
			}
			if err != nil {
				return Image{}, err
			}
			p = &im.Platform
		}
		have = append(have, p.String())
		if s := p.score(want); s > score {
			best, score = i, s
		}
	}
	if best < 0 {
		sort.Strings(have)
		return Image{}, fmt.Errorf("%w %s: the archive has %s", ErrPlatform, want, strings.Join(slices.Compact(have), ", "))
	}
	return a.loadManifest(cands[best].desc)
}

// indexOrManifest catches documents that could be read as either.
type indexOrManifest struct {
	SchemaVersion int                   `json:"schemaVersion"`
	MediaType     string                `json:"mediaType"`
	Manifests     *[]ocispec.Descriptor `json:"manifests"`
	Config        *ocispec.Descriptor   `json:"config"`
	Layers        *[]ocispec.Descriptor `json:"layers"`
	FSLayers      *[]any                `json:"fsLayers"`
}

func parseIndex(what string, b []byte) (ocispec.Index, error) {
	var d indexOrManifest
	if err := decodeJSON(what, b, &d); err != nil {
		return ocispec.Index{}, err
	}
	if d.Manifests == nil || d.Config != nil || d.Layers != nil || d.FSLayers != nil {
		return ocispec.Index{}, fmt.Errorf("%s is not an index: %w", what, ErrInvalid)
	}
	if d.MediaType != "" && !isIndex(d.MediaType) {
		return ocispec.Index{}, fmt.Errorf("%s has media type %s, want an index: %w", what, quote(d.MediaType), ErrInvalid)
	}
	return ocispec.Index{Manifests: *d.Manifests}, nil
}

func parseManifest(what string, b []byte) (ocispec.Manifest, error) {
	var d indexOrManifest
	if err := decodeJSON(what, b, &d); err != nil {
		return ocispec.Manifest{}, err
	}
	if d.FSLayers != nil || d.SchemaVersion == 1 {
		return ocispec.Manifest{}, fmt.Errorf("%s has schema version 1, which has no digests to check: %w", what, ErrInvalid)
	}
	if d.Layers == nil { // null stands for none
		d.Layers = &[]ocispec.Descriptor{}
	}
	if d.Config == nil || d.Manifests != nil {
		return ocispec.Manifest{}, fmt.Errorf("%s is not an image manifest: %w", what, ErrInvalid)
	}
	if d.MediaType != "" && !isManifest(d.MediaType) {
		return ocispec.Manifest{}, fmt.Errorf("%s has media type %s, want a manifest: %w", what, quote(d.MediaType), ErrInvalid)
	}
	if len(*d.Layers) > maxLayers {
		return ocispec.Manifest{}, fmt.Errorf("%s: %d layers, at most %d: %w", what, len(*d.Layers), maxLayers, ErrLimit)
	}
	return ocispec.Manifest{Config: *d.Config, Layers: *d.Layers}, nil
}

// loadManifest reads and checks a manifest and its config, and looks whether all layers are there.
func (a *Archive) loadManifest(desc ocispec.Descriptor) (Image, error) {
	what := "manifest " + string(desc.Digest)
	b, err := a.readBlob(what, desc)
	if err != nil {
		return Image{}, err
	}
	m, err := parseManifest(what, b)
	if err != nil {
		return Image{}, err
	}
	if m.Config.MediaType != ocispec.MediaTypeImageConfig && m.Config.MediaType != dockerConfig {
		return Image{}, fmt.Errorf("%s: config of media type %s: %w: %w", what, quote(m.Config.MediaType), errNotImage, ErrInvalid)
	}
	config, err := a.readBlob("config "+string(m.Config.Digest), m.Config)
	if err != nil {
		return Image{}, fmt.Errorf("%s: %w", what, err)
	}
	im := Image{Digest: desc.Digest, MediaType: desc.MediaType, RawConfig: config}
	if err := im.parseConfig(len(m.Layers)); err != nil {
		return Image{}, fmt.Errorf("%s: %w", what, err)
	}
	for i, l := range m.Layers {
		layer := &im.Layers[i]
		layer.a, layer.what = a, fmt.Sprintf("layer %d of %d", i+1, len(m.Layers))
		if _, err := layerKind(l.MediaType); err != nil {
			return Image{}, fmt.Errorf("%s: %s: %w", what, layer.what, err)
		}
		if layer.file, err = a.checkBlob(layer.what, l); err != nil {
			return Image{}, fmt.Errorf("%s: %w", what, err)
		}
		layer.Digest, layer.Size, layer.MediaType = l.Digest, l.Size, l.MediaType
	}
	return im, nil
}

// parseConfig decodes the config and makes the list of layers from its diff ids.
func (im *Image) parseConfig(layers int) error {
	if err := decodeJSON("config", im.RawConfig, &im.Config); err != nil {
		return err
	}
	ids := im.Config.RootFS.DiffIDs
	if t := im.Config.RootFS.Type; t != "layers" && !(t == "" && len(ids) == 0) {
		return fmt.Errorf("config: rootfs of type %s, want \"layers\": %w", quote(t), ErrInvalid)
	}
	if len(ids) != layers {
		return fmt.Errorf("config: %d diff ids for %d layers: %w", len(ids), layers, ErrInvalid)
	}
	for i, id := range ids {
		if err := id.Validate(); err != nil {
			return fmt.Errorf("config: diff id %s of layer %d: %w: %w", quote(string(id)), i+1, err, ErrInvalid)
		}
	}
	im.Platform = Platform{OS: im.Config.OS, Arch: im.Config.Architecture, Variant: im.Config.Variant}.normal()
	im.Layers = make([]Layer, layers)
	for i, chain := range identity.ChainIDs(slices.Clone(ids)) {
		im.Layers[i] = Layer{DiffID: ids[i], ChainID: chain}
	}
	return nil
}

// layerKind says how a layer with a media type is compressed.
func layerKind(mediaType string) (string, error) {
	base, suffix, _ := strings.Cut(mediaType, "+")
	switch base {
	case ocispec.MediaTypeImageLayer, "application/vnd.oci.image.layer.nondistributable.v1.tar":
		if suffix == "" || suffix == "gzip" || suffix == "zstd" {
			return suffix, nil
		}
	case dockerLayer + "diff.tar", dockerLayer + "foreign.diff.tar":
		if suffix == "" {
			return "", nil
		}
	case dockerLayer + "diff.tar.gzip", dockerLayer + "foreign.diff.tar.gzip":
		return "gzip", nil
	case dockerLayer + "diff.tar.zstd":
		return "zstd", nil
	}
	return "", fmt.Errorf("media type %s is not a layer: %w", quote(mediaType), ErrInvalid)
}
