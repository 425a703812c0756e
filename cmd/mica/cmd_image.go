package main

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"mica/daemon/api"
	"mica/daemon/client"
)

func newImageCmd() *cobra.Command {
	c := &cobra.Command{
		Use:   "image",
		Short: "Import, list and remove images",
		Long: `Images come from archives: what 'docker save', 'podman save', 'skopeo copy ... oci-archive:FILE'
and 'buildah push ... oci:DIR' write. Every layer of an image becomes a thin snapshot of the
layer below; layers that several images share are there once.`,
	}
	c.AddCommand(newImageImportCmd(), newImageLsCmd(), newImageRmCmd(), newImageTagCmd())
	return c
}

func newImageImportCmd() *cobra.Command {
	var p api.ImportParams
	var labels labelsFlag
	var asJSON bool
	c := &cobra.Command{
		Use:   "import FILE|-",
		Short: "Import an image from an archive",
		Long: `Import an image from an OCI archive, a docker save archive or an OCI layout directory, compressed
or not; from the standard input with '-'. Everything is checked against the digests in it before
the image becomes visible; an import that fails or is interrupted leaves nothing behind and can
simply be repeated. Layers that are there already are not read again.

Of an image for several platforms the host's is taken, or the one that --platform names.`,
		Example: `  mica image import debian.tar --name debian:12
  docker save nginx | mica image import - --name nginx
  mica image import ./oci-layout --name app --platform linux/arm64`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			var err error
			if p.Labels, err = labels.labels(); err != nil {
				return err
			}
			r, err := importImage(cmd, connect(), args[0], p)
			if err != nil {
				return err
			}
			if asJSON {
				return printJSON(cmd.OutOrStdout(), r)
			}
			for _, i := range r.Images {
				what := fmt.Sprintf("%d layers, %d new", len(i.Layers), i.NewLayers)
				if i.Existed {
					what = "was there already"
				}
				fmt.Fprintf(cmd.OutOrStdout(), "%s  %s  %s\n", i.Name, short(i.Digest), what)
			}
			return nil
		},
	}
	c.Flags().StringVar(&p.Name, "name", "", "name for the image (default: the one in the archive)")
	c.Flags().StringVar(&p.Platform, "platform", "", "`OS/ARCH[/VARIANT]` of an image for several (default: the host's)")
	c.Flags().StringVar(&p.Ref, "ref", "", "import only the image that the archive has under this name")
	c.Flags().BoolVar(&p.Replace, "replace", false, "move the name if another image has it")
	labels.add(c)
	jsonFlag(c, &asJSON)
	return c
}

// importImage lets the daemon read the file, or sends it where the daemon does not see it.
func importImage(cmd *cobra.Command, c *client.Client, file string, p api.ImportParams) (r api.ImportResult, err error) {
	if file == "-" {
		return importStream(cmd, c, cmd.InOrStdin(), p)
	}
	f, err := os.Open(file)
	if err != nil {
		return r, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return r, err
	}
	if !st.IsDir() && !st.Mode().IsRegular() {
		return importStream(cmd, c, f, p)
	}
	path, err := filepath.Abs(file)
	if err != nil {
		return r, err
	}
	op, err := c.ImportFile(cmd.Context(), api.ImportFile{File: path, ImportParams: p}, client.OpOptions{ID: newOperationID()})
	if err == nil {
		r, err = await[api.ImportResult](cmd, c, op)
	}
	var e *api.Error
	if errors.As(err, &e) && e.Code == api.CodeNotFound && e.Name == path && !st.IsDir() {
		return importStream(cmd, c, f, p) // the daemon has other mounts
	}
	return r, err
}

// importStream sends an archive and shows how far the daemon is with it.
func importStream(cmd *cobra.Command, c *client.Client, in io.Reader, p api.ImportParams) (r api.ImportResult, err error) {
	if isTerminalReader(in) {
		return r, usagef("'-' reads an archive from the standard input, which is a terminal")
	}
	id, o := newOperationID(), newOpProgress(cmd, false)
	stop, watched := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(watched)
		watch(cmd.Context(), c, id, o, stop)
	}()
	op, err := c.ImportStream(cmd.Context(), in, p, client.OpOptions{ID: id})
	close(stop)
	<-watched
	if err != nil && cmd.Context().Err() != nil {
		// The daemon sees the broken connection and undoes it; wait for that.
		op = api.Operation{ID: id, State: api.OperationRunning}
		_, err = c.Wait(cmd.Context(), op, nil)
		if err == nil {
			err = context.Cause(cmd.Context())
		}
	}
	if err == nil {
		o.show(op)
	}
	o.end()
	if err != nil {
		return r, interrupted(cmd.Context(), err)
	}
	return client.Result[api.ImportResult](op)
}

func newOperationID() string {
	var b [8]byte
	rand.Read(b[:])
	return hex.EncodeToString(b[:])
}

func isTerminalReader(r io.Reader) bool {
	f, ok := r.(*os.File)
	return ok && isTerminal(f)
}

func newImageLsCmd() *cobra.Command {
	var f client.Filter
	var asJSON, all bool
	c := &cobra.Command{
		Use:     "ls",
		Aliases: []string{"list"},
		Short:   "List images",
		Example: `  mica image ls
  mica image ls --label team=web --json`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if all {
				f.Owner = "*"
			}
			list, err := connect().Images(cmd.Context(), f)
			if err != nil {
				return err
			}
			if asJSON {
				return printJSON(cmd.OutOrStdout(), list)
			}
			rows := [][]string{{"NAME", "DIGEST", "PLATFORM", "LAYERS", "USED", "IMPORTED"}}
			for _, i := range list {
				name := i.Name
				if i.Broken != "" {
					name += " (broken)"
				}
				rows = append(rows, []string{name, short(i.Digest), dash(i.Platform), fmt.Sprint(len(i.Layers)), size(i.UsedBytes), when(i.Created)})
			}
			return table(cmd.OutOrStdout(), rows)
		},
	}
	c.Flags().StringArrayVar(&f.Labels, "label", nil, "only images with this label, `KEY[=VALUE]`; may be repeated")
	c.Flags().StringVar(&f.Prefix, "prefix", "", "only names that begin so")
	c.Flags().BoolVar(&all, "all", false, "also what containerd owns")
	jsonFlag(c, &asJSON)
	return c
}

func newImageRmCmd() *cobra.Command {
	c := &cobra.Command{
		Use:     "rm NAME...",
		Aliases: []string{"remove"},
		Short:   "Remove images",
		Long: `Remove the names of images, and the layers that nothing needs any more. Containers made from
an image keep their layers.`,
		Example: `  mica image rm debian:12`,
		Args:    cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return each(cmd, args, func(name string) error { return connect().RemoveImage(cmd.Context(), name) })
		},
	}
	c.ValidArgsFunction = complete(imageNames)
	return c
}

func newImageTagCmd() *cobra.Command {
	c := &cobra.Command{
		Use:     "tag NAME NEWNAME",
		Short:   "Give an image a further name",
		Example: `  mica image tag debian:12 base`,
		Args:    cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			_, err := connect().TagImage(cmd.Context(), args[0], args[1])
			return err
		},
	}
	c.ValidArgsFunction = complete(imageNames)
	return c
}

// each does one thing for every name, goes on after an error, and reports all of them.
func each(cmd *cobra.Command, names []string, do func(string) error) error {
	var failed []error
	for _, n := range names {
		err := do(n)
		var none *client.NoDaemonError
		if errors.As(err, &none) || cmd.Context().Err() != nil {
			return err
		}
		if err != nil {
			failed = append(failed, err)
		}
	}
	if len(failed) == 0 {
		return nil
	}
	lines := make([]string, len(failed))
	for i, err := range failed {
		lines[i] = err.Error()
	}
	return fmt.Errorf("%s", strings.Join(lines, "\nmica: "))
}
