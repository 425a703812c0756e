package snapshotter

import (
	"archive/tar"
	"bytes"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"

	"mica/internal/mutate"
)

var labelSeeds = [][]byte{[]byte("10G"), []byte("4096"), []byte("1.5T"), []byte("-1"), []byte("9223372036854775807"), nil, []byte("0:1000:65536"),
	[]byte("0:1000:1,1:2000:65535"), []byte("0:4294967296:1"), []byte("a:b:c"), []byte(":,:"), []byte("0:0:1,remount,suid")}

// FuzzLabels: whatever containerd's labels hold, they are refused, or are sizes of whole blocks and
// mount options that say nothing else.
func FuzzLabels(f *testing.F) { mutate.Fuzz(f, labelSeeds, readLabels) }

// TestLabelsMutated is FuzzLabels for a moment.
func TestLabelsMutated(t *testing.T) {
	mutate.Test(t, "FuzzLabels", labelSeeds, mutate.Options{Inputs: 5000, MaxBytes: 1000, Words: []string{":", ",", "0:0:1", "4294967295", "suid", "K", "\x00", " "}}, readLabels)
}

func readLabels(t *testing.T, b []byte) {
	v := string(b)
	for _, k := range []string{LabelSize, LabelDiskQuota, snapshots.LabelSnapshotMaxSize} {
		n, hint, err := sizeOf(map[string]string{k: v})
		if err == nil && (n < 0 || n%4096 != 0 || v != "" && n == 0 || hint != (k == snapshots.LabelSnapshotMaxSize) && v != "") {
			t.Errorf("label %s=%q: size %d, hint %v", k, v, n, hint)
		}
	}
	o, err := idmapOptions(map[string]string{snapshots.LabelSnapshotUIDMapping: v, snapshots.LabelSnapshotGIDMapping: "0:0:1"})
	if err != nil {
		return
	}
	for _, opt := range o {
		value, ok := strings.CutPrefix(opt, "uidmap=")
		if !ok {
			value, ok = strings.CutPrefix(opt, "gidmap=")
		}
		if !ok || strings.Trim(value, "0123456789:,") != "" || value == "" {
			t.Errorf("label %q: mount option %q", v, opt)
		}
	}
}

func streamSeeds(tb testing.TB) [][]byte {
	var plain bytes.Buffer
	w := tar.NewWriter(&plain)
	for _, h := range []*tar.Header{{Name: "d/", Typeflag: tar.TypeDir, Mode: 0o755}, {Name: "d/f", Mode: 0o644, Size: 3, ModTime: time.Unix(1<<32, 5), Format: tar.FormatPAX}} {
		if err := w.WriteHeader(h); err != nil {
			tb.Fatal(err)
		}
		if h.Size > 0 {
			io.WriteString(w, "abc")
		}
	}
	w.Close()
	out := [][]byte{plain.Bytes(), nil}
	for _, kind := range []compression{gzipTar, zstdTar} {
		var b bytes.Buffer
		z, err := compress(&b, kind)
		if err != nil {
			tb.Fatal(err)
		}
		z.Write(plain.Bytes())
		z.Close()
		out = append(out, b.Bytes())
	}
	return out
}

// FuzzStream: any bytes as a layer's blob, and as the tar whose times are cut: an error or an end,
// and no time later than asked for.
func FuzzStream(f *testing.F) { mutate.Fuzz(f, streamSeeds(f), readStream) }

// TestStreamMutated is FuzzStream for a moment.
func TestStreamMutated(t *testing.T) {
	mutate.Test(t, "FuzzStream", streamSeeds(t), mutate.Options{Inputs: 1000, Words: []string{"mtime=", "ustar\x0000", "\x28\xb5\x2f\xfd", "\x1f\x8b"}}, readStream)
}

func readStream(t *testing.T, b []byte) {
	z, err := decompress(bytes.NewReader(b))
	if err != nil {
		return
	}
	defer z.Close()
	plain, err := io.ReadAll(io.LimitReader(z, 1<<20))
	if err != nil {
		return
	}
	latest := time.Unix(1_700_000_000, 0)
	var out bytes.Buffer
	if clampTar(&out, bytes.NewReader(plain), latest) != nil {
		return
	}
	for r := tar.NewReader(&out); ; {
		h, err := r.Next()
		if err == io.EOF {
			return
		}
		if err != nil {
			t.Fatalf("what was written cannot be read: %v", err)
		}
		if h.ModTime.After(latest) || h.AccessTime.After(latest) || h.ChangeTime.After(latest) {
			t.Errorf("%q: times %v %v %v, latest is %v", h.Name, h.ModTime, h.AccessTime, h.ChangeTime, latest)
		}
	}
}
