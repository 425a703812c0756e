package lvm

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"time"
)

// commandTimeout bounds one command. Wiping and zeroing the metadata of a large pool on a slow
// disk is what takes long.
const commandTimeout = 2 * time.Minute

// run runs one of lvm's commands. Errors hold what it printed.
func run(ctx context.Context, command string, args ...string) ([]byte, error) {
	path, err := exec.LookPath("lvm")
	if err != nil {
		return nil, ErrNoTools
	}
	ctx, cancel := context.WithTimeout(ctx, commandTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, path, slices.Insert(args, 0, command)...)
	// The parsed output must not depend on the language; inherited descriptors are closed by Go,
	// the warning about them is for shells.
	cmd.Env = append(os.Environ(), "LC_ALL=C", "LVM_SUPPRESS_FD_WARNINGS=1")
	cmd.WaitDelay = time.Second
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		if ctx.Err() != nil {
			err = fmt.Errorf("%w after %s", ctx.Err(), commandTimeout)
		}
		return nil, fmt.Errorf("%s %s: %w: %s", command, strings.Join(args, " "), err, lastWords(stderr.String()))
	}
	return stdout.Bytes(), nil
}

// lastWords is a command's complaint on one line, without the warnings before it.
func lastWords(stderr string) string {
	var lines []string
	for l := range strings.Lines(stderr) {
		if l = strings.TrimSpace(l); l != "" && !strings.HasPrefix(l, "WARNING:") {
			lines = append(lines, l)
		}
	}
	if len(lines) == 0 {
		return strings.Join(strings.Fields(stderr), " ")
	}
	return strings.Join(lines, "; ")
}

// report runs lvs, vgs or pvs and returns its rows, column to value; sizes are bytes.
func report(ctx context.Context, command, columns string, args ...string) ([]map[string]string, error) {
	fixed := []string{"--reportformat", "json", "--units", "b", "--nosuffix", "--options", columns}
	out, err := run(ctx, command, append(fixed, args...)...)
	if err != nil {
		return nil, err
	}
	var doc struct {
		Report []map[string][]map[string]string `json:"report"`
	}
	if err := json.Unmarshal(out, &doc); err != nil {
		return nil, fmt.Errorf("output of %s: %w", command, err)
	}
	if len(doc.Report) != 1 {
		return nil, fmt.Errorf("output of %s: %d reports, want 1", command, len(doc.Report))
	}
	for _, rows := range doc.Report[0] { // its one key is the kind of the rows
		return rows, nil
	}
	return nil, nil
}

// exists reports whether a volume group of that name is there.
func exists(ctx context.Context, vg string) (bool, error) {
	rows, err := report(ctx, "vgs", "vg_name")
	if err != nil {
		return false, err
	}
	return slices.ContainsFunc(rows, func(r map[string]string) bool { return r["vg_name"] == vg }), nil
}

// Available returns ErrNoTools if the LVM tools are not there.
func Available() error {
	if _, err := exec.LookPath("lvm"); err != nil {
		return ErrNoTools
	}
	return nil
}

// joined joins errors of undoing to the one that made it necessary.
func joined(err error, undo ...error) error {
	if u := errors.Join(undo...); u != nil {
		return fmt.Errorf("%w (and undoing what was done: %w)", err, u)
	}
	return err
}
