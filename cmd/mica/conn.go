package main

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"mica/daemon/api"
	"mica/daemon/client"
)

// A completer lists names for the shell's completion.
type completer func(context.Context, *client.Client) ([]string, error)

func containerNames(ctx context.Context, c *client.Client) ([]string, error) {
	list, err := c.Containers(ctx, client.Filter{})
	names := make([]string, len(list))
	for i, v := range list {
		names[i] = v.Name
	}
	return names, err
}

func imageNames(ctx context.Context, c *client.Client) ([]string, error) {
	list, err := c.Images(ctx, client.Filter{})
	names := make([]string, len(list))
	for i, v := range list {
		names[i] = v.Name
	}
	return names, err
}

// complete makes the shell complete argument number i with the i-th list.
func complete(lists ...completer) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, prefix string) ([]cobra.Completion, cobra.ShellCompDirective) {
		if len(args) >= len(lists) || lists[len(args)] == nil {
			return nil, cobra.ShellCompDirectiveDefault
		}
		ctx, cancel := context.WithTimeout(cmd.Context(), 2*time.Second)
		defer cancel()
		names, err := lists[len(args)](ctx, connect())
		if err != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		var out []cobra.Completion
		for _, n := range names {
			if strings.HasPrefix(n, prefix) {
				out = append(out, n)
			}
		}
		return out, cobra.ShellCompDirectiveNoFileComp
	}
}

// A labelsFlag is --label K=V, repeated.
type labelsFlag struct{ list []string }

func (l *labelsFlag) add(c *cobra.Command) {
	c.Flags().StringArrayVar(&l.list, "label", nil, "label to set, `KEY=VALUE`; may be repeated")
}

func (l *labelsFlag) labels() (map[string]string, error) {
	var m map[string]string
	for _, s := range l.list {
		k, v, ok := strings.Cut(s, "=")
		if !ok || k == "" {
			return nil, usagef("--label %s: want KEY=VALUE", s)
		}
		if m == nil {
			m = map[string]string{}
		}
		m[k] = v
	}
	return m, nil
}

// A ttlFlag is a duration that also takes days and weeks.
type ttlFlag struct{ d time.Duration }

func (f *ttlFlag) String() string {
	if f.d == 0 {
		return ""
	}
	return f.d.String()
}

func (f *ttlFlag) Set(s string) error {
	d, err := api.ParseDuration(s)
	if err == nil && d <= 0 {
		err = fmt.Errorf("%s is not a time to live", s)
	}
	f.d = d
	return err
}

func (f *ttlFlag) Type() string { return "duration" }

func (f *ttlFlag) add(c *cobra.Command) {
	c.Flags().Var(f, "ttl", "remove it after this time, such as 90m, 36h, 7d")
}

// quiesceFlags say what a copy of a container that is in use may rely on.
type quiesceFlags struct{ z api.Quiesce }

func (q *quiesceFlags) add(c *cobra.Command) {
	c.Flags().BoolVar(&q.z.Quiesced, "quiesced", false, "the contents are consistent: do not freeze the file system")
	c.Flags().BoolVar(&q.z.CrashOK, "crash-ok", false, "if the file system cannot be frozen, a copy as after power loss will do")
	c.Flags().BoolVar(&q.z.TrustGuest, "trust-guest", false, "let this host mount a file system that a guest wrote")
}

// when formats a time for a table.
func when(t time.Time) string {
	if t.IsZero() {
		return "-"
	}
	return t.Local().Format("2006-01-02 15:04:05")
}

// short cuts a digest to what people compare: "sha256:12ab34cd56ef7890..." to "12ab34cd56ef".
func short(digest string) string {
	_, hex, ok := strings.Cut(digest, ":")
	if !ok {
		hex = digest
	}
	return hex[:min(12, len(hex))]
}

// dash is s, or "-" where a column would be empty.
func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}
