// Command mkimage makes an OCI archive from directories, each the root file system of one layer
// together with those below: the first becomes the lowest layer, every further one the layer
// that leads from its predecessor to it.
//
//	mkimage -o ARCHIVE [-name NAME] [-compression zstd|gzip|none] [-cmd COMMAND] ROOT...
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strings"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"mica/image"
	"mica/layer/archive"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "mkimage:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context) error {
	out := flag.String("o", "", "archive to write")
	name := flag.String("name", "", "name of the image, such as demo:latest")
	compression := flag.String("compression", "zstd", "of layers: zstd, gzip or none")
	command := flag.String("cmd", "/bin/sh", "command of the image, words separated by spaces")
	platform := flag.String("platform", image.HostPlatform().String(), "os/arch[/variant] of the image")
	flag.Parse()
	roots := flag.Args()
	if *out == "" || len(roots) == 0 {
		flag.Usage()
		return errors.New("needs -o and at least one directory")
	}
	p, err := image.ParsePlatform(*platform)
	if err != nil {
		return err
	}
	c := ocispec.Image{Platform: ocispec.Platform{OS: p.OS, Architecture: p.Arch, Variant: p.Variant}}
	c.Config.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
	c.Config.Cmd = strings.Fields(*command)
	c.Config.WorkingDir = "/"
	im := image.ExportImage{}
	if *name != "" {
		im.Names = []string{*name}
	}
	lower := ""
	for i, root := range roots {
		im.Layers = append(im.Layers, layerOf(i+1, len(roots), lower, root))
		lower = root
	}
	if im.Config, err = json.Marshal(c); err != nil {
		return err
	}
	return writeWhole(*out, func(f io.Writer) error {
		_, err := image.Export(ctx, f, im, image.ExportOptions{Compression: *compression, SpoolDir: filepath.Dir(*out)})
		return err
	})
}

// layerOf writes one layer, and says what is in it.
func layerOf(n, of int, lower, root string) func(context.Context, io.Writer) error {
	return func(ctx context.Context, w io.Writer) error {
		warn := func(name, what string) { fmt.Fprintf(os.Stderr, "mkimage: %s: %s\n", name, what) }
		st, err := archive.Diff(ctx, lower, root, w, archive.DiffOptions{Warn: warn})
		if err == nil {
			fmt.Printf("layer %d of %d: %d entries, %.1f MiB of files\n", n, of, st.Entries, float64(st.Bytes)/(1<<20))
		}
		return err
	}
}

// writeWhole makes path complete or not at all.
func writeWhole(path string, write func(io.Writer) error) error {
	f, err := os.CreateTemp(filepath.Dir(path), ".mkimage-")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // fails after the rename
	err = write(f)
	if err == nil {
		err = f.Chmod(0o644)
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return nil
}
