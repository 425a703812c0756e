package image

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"
)

// dockerManifestFile of a docker save archive. It lists images; there are no manifests with
// digests. Layers are checked by the diff ids of the config, the config by its name, which is
// its digest.
const dockerManifestFile = "manifest.json"

type dockerImage struct {
	Config   string
	RepoTags []string
	Layers   []string
}

func parseDockerManifest(b []byte) ([]dockerImage, error) {
	var list []dockerImage
	if err := decodeJSON(dockerManifestFile, b, &list); err != nil {
		return nil, err
	}
	if len(list) > maxManifests {
		return nil, fmt.Errorf("%s: %d images, at most %d: %w", dockerManifestFile, len(list), maxManifests, ErrLimit)
	}
	return list, nil
}

// loadDocker reads a docker save archive that is not an OCI layout.
func (a *Archive) loadDocker(ctx context.Context, manifest []byte) error {
	list, err := parseDockerManifest(manifest)
	if err != nil {
		return err
	}
	owner := map[string]digest.Digest{}
	for i, d := range list {
		if err := ctx.Err(); err != nil {
			return err
		}
		im, err := a.loadDockerImage(d)
		if err != nil {
			return fmt.Errorf("%s: image %d of %d: %w", dockerManifestFile, i+1, len(list), err)
		}
		for _, name := range im.Names {
			if other, ok := owner[name]; ok && other != im.Digest {
				return fmt.Errorf("%s: the name %s stands for two images, with configs %s and %s: %w",
					dockerManifestFile, quote(name), other, im.Digest, ErrInvalid)
			}
			owner[name] = im.Digest
		}
		if want, asked := a.opts.Platform.normal(), a.opts.Platform != (Platform{}); asked && im.Platform.score(want) == 0 {
			return fmt.Errorf("%s: image %d of %d: %w %s: the archive has %s", dockerManifestFile, i+1, len(list), ErrPlatform, want, im.Platform)
		}
		a.addImage(im)
	}
	if len(a.images) == 0 {
		return fmt.Errorf("%s lists no image: %w", dockerManifestFile, ErrInvalid)
	}
	return nil
}

func (a *Archive) loadDockerImage(d dockerImage) (Image, error) {
	name, err := cleanName(d.Config)
	if err != nil {
		return Image{}, fmt.Errorf("config %s: %w", quote(d.Config), err)
	}
	config, err := a.readAll(name)
	if errors.Is(err, fs.ErrNotExist) {
		return Image{}, fmt.Errorf("config %s is missing in the archive: %w", quote(d.Config), ErrInvalid)
	} else if err != nil {
		return Image{}, fmt.Errorf("config: %w", err)
	}
	if len(d.Layers) > maxLayers {
		return Image{}, fmt.Errorf("%d layers, at most %d: %w", len(d.Layers), maxLayers, ErrLimit)
	}
	im := Image{Digest: digest.FromBytes(config), MediaType: dockerConfig, RawConfig: config}
	hex := strings.TrimSuffix(path.Base(name), ".json")
	want := digest.NewDigestFromEncoded(digest.SHA256, hex)
	if want.Validate() != nil {
		return Image{}, fmt.Errorf("config %s is not named by its digest: %w", quote(d.Config), ErrInvalid)
	}
	if im.Digest != want {
		return Image{}, &DigestError{What: "config " + quote(d.Config), Got: im.Digest, Want: want}
	}
	if err := im.parseConfig(len(d.Layers)); err != nil {
		return Image{}, err
	}
	for i, file := range d.Layers {
		layer := &im.Layers[i]
		layer.a, layer.what = a, fmt.Sprintf("layer %d of %d", i+1, len(d.Layers))
		if layer.file, err = cleanName(file); err != nil {
			return Image{}, fmt.Errorf("%s: %s: %w", layer.what, quote(file), err)
		}
		r, size, err := a.src.open(layer.file)
		if errors.Is(err, fs.ErrNotExist) {
			return Image{}, fmt.Errorf("%s: file %s is missing in the archive: %w", layer.what, quote(file), ErrInvalid)
		} else if err != nil {
			return Image{}, fmt.Errorf("%s: %w", layer.what, err)
		}
		r.Close()
		layer.Size = size
	}
	for _, n := range d.RepoTags {
		if n != "" && !slices.Contains(im.Names, n) {
			im.Names = append(im.Names, n)
		}
	}
	return im, nil
}

// addDockerNames names images of a layout that its index does not name by the manifest.json
// that docker save puts beside it.
func (a *Archive) addDockerNames() error {
	b, err := a.readAll(dockerManifestFile)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	list, err := parseDockerManifest(b)
	if err != nil {
		return err
	}
	for i := range a.images {
		im := &a.images[i]
		if len(im.Names) > 0 && slices.ContainsFunc(im.Names, func(n string) bool { return strings.Contains(n, ":") || strings.Contains(n, "/") }) {
			continue
		}
		config := digest.FromBytes(im.RawConfig).Encoded()
		for _, d := range list {
			if strings.TrimSuffix(path.Base(d.Config), ".json") == config && len(d.RepoTags) > 0 {
				im.Names = slices.Clone(d.RepoTags)
			}
		}
	}
	return nil
}
