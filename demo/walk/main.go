// Command walk is the demo: it does the whole job of a block-level storage driver on a real
// image, prints the pool's own numbers before and after every step, and fails if one of them is
// not what the step promises.
//
//	walk -mica BIN -image ARCHIVE -dir DIR -big PATH
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"
)

func main() {
	bin := flag.String("mica", "bin/mica", "the program")
	image := flag.String("image", "", "OCI archive to import")
	dir := flag.String("dir", "", "where pool, catalog and mounts go; must not exist")
	big := flag.String("big", "", "path of a large file in the image")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	w := &walk{ctx: ctx, bin: *bin, dir: *dir, run: filepath.Join(*dir, "run")}
	start := time.Now()
	err := errors.Join(w.story(*image, *big), w.end())
	if err == nil && len(w.broken) > 0 {
		err = fmt.Errorf("%d of %d promises broken: %v", len(w.broken), w.promises, w.broken)
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "\ndemo: %v\n", err)
		os.Exit(1)
	}
	fmt.Printf("\nAll %d promises held, in %.1f s.\n", w.promises, time.Since(start).Seconds())
}
