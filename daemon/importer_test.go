package daemon

import (
	"errors"
	"fmt"
	"io"
	"testing"

	"mica/daemon/api"
	"mica/image"
	"mica/layer"
	"mica/layer/archive"
)

// TestArchiveErrors: what is wrong with an archive is the client's fault, what the store could not
// do is not.
func TestArchiveErrors(t *testing.T) {
	for _, c := range []struct {
		err  error
		want api.Code
	}{
		{image.ErrInvalid, api.CodeInvalid},
		{image.ErrLimit, api.CodeInvalid},
		{io.ErrUnexpectedEOF, api.CodeInvalid},
		{archive.ErrEscape, api.CodeInvalid},
		{archive.ErrInvalid, api.CodeInvalid},
		{archive.ErrLimit, api.CodeInvalid},
		{image.ErrDigest, api.CodeDigest},
		{&image.DigestError{What: "layer 2 of 3"}, api.CodeDigest},
		{layer.ErrNoSpace, api.CodeNoSpace},
		{fmt.Errorf("%w: %w", layer.ErrNoSpace, io.ErrUnexpectedEOF), api.CodeNoSpace},
		{layer.ErrExists, api.CodeExists},
		{errors.New("something else"), api.CodeInternal},
	} {
		err := fmt.Errorf("import %q: layer 2 of 3: %w", "web", c.err)
		got := api.FromError(archiveError(err), "")
		if got.Code != c.want || got.Message != err.Error() {
			t.Errorf("%v: code %s, message %q; want %s", c.err, got.Code, got.Message, c.want)
		}
	}
}
