package helper

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"strings"
	"testing"

	"mica/internal/mutate"
)

var lineSeeds = [][]byte{
	[]byte(`{"op":"apply","node":"/dev/loop7","fs_type":"ext4","trim":true,"limits":{"max_name":100},"changed":null}` + "\n"),
	[]byte(`{"op":"diff","node":"/dev/loop7","lower":"/dev/loop8","changed":[{"first":1,"last":2}]}` + "\n"),
	[]byte(`{"op":"mount","target":"/x","options":["ro","noload"]}`),
	[]byte(`{"error":{"text":"t","kind":"limit","errno":28,"entry":"e"},"warnings":["w"]}`),
	[]byte(`{"state":"frozen","entries":3}{"state":"thawed"}`), []byte("{}"), []byte("\n"), nil,
	[]byte(`36 35 7:1 / /mnt/a\040b rw,relatime - ext4 /dev/loop1 rw`),
}

// FuzzLine: any bytes as a request, an answer, or a line of the kernel's list of mounts. Operations
// are not done: they mount and unmount.
func FuzzLine(f *testing.F) { mutate.Fuzz(f, lineSeeds, readLines) }

// TestLineMutated is FuzzLine for a moment.
func TestLineMutated(t *testing.T) {
	mutate.Test(t, "FuzzLine", lineSeeds, mutate.Options{Inputs: 5000, MaxBytes: 256 << 10, AllocBase: 2 << 20, AllocPerByte: 200,
		Words: []string{`"op":`, `"error":`, `"changed":[`, `"options":[`, `\040`, `\777`, `{`, "\n"}}, readLines)
}

func readLines(t *testing.T, b []byte) {
	line, err := readLine(bufio.NewReaderSize(bytes.NewReader(b), 4096))
	if len(line) > maxRequest+1 || err == nil && !bytes.HasSuffix(line, []byte("\n")) {
		t.Errorf("a request of %d bytes, %v", len(line), err)
	}
	var req Request
	if json.Unmarshal(line, &req) == nil {
		again, err := json.Marshal(req)
		var r2 Request
		if err == nil {
			err = json.Unmarshal(again, &r2)
		}
		if err != nil || (req.Changed == nil) != (r2.Changed == nil) || len(req.Options) != len(r2.Options) {
			t.Errorf("request %+v reads back as %+v, %v", req, r2, err)
		}
	}
	d := json.NewDecoder(bytes.NewReader(b))
	for range 3 {
		var resp Response
		if d.Decode(&resp) != nil {
			break
		}
		if resp.Err != nil {
			err := resp.Err.err("op")
			var e *Error
			if !errors.As(err, &e) || !strings.HasPrefix(err.Error(), "op: ") || errors.Is(err, io.EOF) {
				t.Errorf("answer %+v is error %v", resp, err)
			}
			toWire(err)
		}
	}
	if s := string(b); len(unescape(s)) > len(s) {
		t.Errorf("%q unescaped is longer: %q", s, unescape(s))
	}
}
