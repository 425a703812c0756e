package manpage

import (
	"strings"
	"testing"

	"github.com/spf13/cobra"
)

func sample() *cobra.Command {
	root := &cobra.Command{Use: "tool", Short: "Do things"}
	root.PersistentFlags().String("where", "", "the `DIR` to work in")
	sub := &cobra.Command{Use: "copy FROM TO", Short: "Copy one thing", Args: cobra.ExactArgs(2), Run: func(*cobra.Command, []string) {},
		Long: "Copy one thing:\n\n    tool copy a b\n\n.hidden files are copied too.", Example: `  tool copy a\b c`}
	sub.Flags().IntP("times", "n", 3, "how often")
	sub.Flags().Bool("secret", false, "")
	sub.Flags().MarkHidden("secret")
	root.AddCommand(sub, &cobra.Command{Use: "inner", Hidden: true, Run: func(*cobra.Command, []string) {}})
	return root
}

func TestAll(t *testing.T) {
	pages := All(sample())
	if len(pages) != 2 || pages["tool.8"] == "" || pages["tool-copy.8"] == "" {
		t.Fatalf("pages: %d", len(pages))
	}
	want := []struct{ page, text string }{
		{"tool.8", ".SH NAME\ntool \\- do things\n"},
		{"tool.8", ".BR tool\\-copy (8)\nCopy one thing\n"},
		{"tool-copy.8", ".B tool copy\nFROM TO [flags]\n"},
		{"tool-copy.8", ".RS 4\n.nf\ntool copy a b\n.fi\n.RE\n"},
		{"tool-copy.8", "\n\\&.hidden files are copied too.\n"},
		{"tool-copy.8", "\\fB\\-n\\fP, \\fB\\-\\-times\\fP \\fIint\\fP\nHow often (default: 3)\n"},
		{"tool-copy.8", ".SH GLOBAL OPTIONS\n.TP\n\\fB\\-\\-where\\fP \\fIDIR\\fP\nThe DIR to work in\n"},
		{"tool-copy.8", "tool copy a\\eb c\n"},
		{"tool-copy.8", ".SH SEE ALSO\n.BR tool (8)\n"},
	}
	for _, w := range want {
		if !strings.Contains(pages[w.page], w.text) {
			t.Errorf("%s does not contain %q:\n%s", w.page, w.text, pages[w.page])
		}
	}
	if strings.Contains(pages["tool-copy.8"], "secret") || strings.Contains(pages["tool.8"], "inner") {
		t.Error("hidden things are in the pages")
	}
}
