package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"mica/daemon/api"
	"mica/daemon/client"
	"mica/layer"
)

func newCommitCmd() *cobra.Command {
	var in api.CommitContainer
	var labels labelsFlag
	var q quiesceFlags
	var asJSON bool
	c := &cobra.Command{
		Use:   "commit NAME IMAGE",
		Short: "Make an image from a container",
		Long: `Make an image from a container: the layers of its image and one more with what the container
changed. The container goes on unchanged, also if it is in use.`,
		Example: `  mica commit web web:tuned --comment 'more workers'`,
		Args:    cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			var err error
			if in.Labels, err = labels.labels(); err != nil {
				return err
			}
			in.Image, in.Quiesce = args[1], q.z
			c := connect()
			op, err := c.Commit(cmd.Context(), args[0], in, client.OpOptions{ID: newOperationID()})
			if err != nil {
				return err
			}
			r, err := await[layer.CommitResult](cmd, c, op)
			if err != nil {
				return err
			}
			if asJSON {
				return printJSON(cmd.OutOrStdout(), r)
			}
			fmt.Fprintf(cmd.OutOrStdout(), "%s  %s  %d layers\n", r.Image.Name, short(r.Image.Digest), len(r.Image.Layers))
			noteLevel(cmd, r.Level)
			return nil
		},
	}
	c.Flags().BoolVar(&in.Replace, "replace", false, "move the name if another image has it")
	c.Flags().StringVar(&in.Author, "author", "", "author, for the image's history")
	c.Flags().StringVar(&in.Comment, "comment", "", "comment, for the image's history")
	labels.add(c)
	q.add(c)
	jsonFlag(c, &asJSON)
	c.ValidArgsFunction = complete(containerNames, imageNames)
	return c
}

func newDiffCmd() *cobra.Command {
	var o layer.DiffOptions
	var q quiesceFlags
	var out string
	c := &cobra.Command{
		Use:   "diff NAME",
		Short: "Write what a container changed, as an OCI layer tar",
		Long: `Write what a container changed against its image, as the tar of an OCI image layer (deleted files
are whiteouts), to the standard output or a file. The file appears when it is complete.`,
		Example: `  mica diff web | tar -tv
  mica diff web -o web.tar --snapshot before-upgrade`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			o.QuiesceOptions = layer.QuiesceOptions{Quiesced: q.z.Quiesced, CrashOK: q.z.CrashOK, TrustGuest: q.z.TrustGuest}
			if out == "" || out == "-" {
				w := cmd.OutOrStdout()
				if isTerminal(w) {
					return usagef("the tar would go to the terminal: give -o FILE, or pipe it, as in: mica diff %s | tar -tv", args[0])
				}
				level, err := connect().Diff(cmd.Context(), args[0], w, o)
				if err == nil {
					noteLevel(cmd, level)
				}
				return err
			}
			return writeFile(out, func(w io.Writer) error {
				level, err := connect().Diff(cmd.Context(), args[0], w, o)
				if err == nil {
					noteLevel(cmd, level)
				}
				return err
			})
		},
	}
	c.Flags().StringVarP(&out, "output", "o", "", "`FILE` to write")
	c.Flags().StringVar(&o.Snapshot, "snapshot", "", "the changes of this snapshot of the container")
	q.add(c)
	c.ValidArgsFunction = complete(containerNames)
	return c
}

// writeFile makes a file that appears only when write has ended without an error. What is not a
// regular file, such as a pipe, is written as it is.
func writeFile(path string, write func(io.Writer) error) (err error) {
	if st, err := os.Stat(path); err == nil && !st.Mode().IsRegular() {
		f, err := os.OpenFile(path, os.O_WRONLY, 0)
		if err != nil {
			return err
		}
		return errors.Join(write(f), f.Close())
	}
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			f.Close()
			os.Remove(f.Name())
		}
	}()
	if err := write(f); err != nil {
		return err
	}
	if err := f.Chmod(0o644); err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}
