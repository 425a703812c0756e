// Package recordfs is a file system that records what is written to the files in it, for tests
// that cut the power under a program that writes plain files (bbolt): each write, truncation and
// sync with the times at which it began and ended, on a clock shared with a dev.CrashLog of
// another process.
//
// It is served by a process of its own (Serve): bbolt maps its file, and a page fault in the
// serving process could wait for itself.
package recordfs

import (
	"bufio"
	"context"
	"encoding/gob"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"

	"mica/dev"
)

// A record is one request, of the file with a name.
type record struct {
	Name string
	dev.CrashRecord
}

const (
	clockFile = "clock"
	logFile   = "log"
	filesDir  = "files"
	mountDir  = "mnt"
)

// Serve mounts the recording file system on dir/mnt, says so by a line on out, and serves until
// in ends. Create has made dir.
func Serve(dir string, in io.Reader, out io.Writer) error {
	clock, err := openClock(filepath.Join(dir, clockFile))
	if err != nil {
		return err
	}
	f, err := os.OpenFile(filepath.Join(dir, logFile), os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	w := bufio.NewWriter(f)
	r := &recorder{clock: clock, enc: gob.NewEncoder(w)}
	root := &fs.LoopbackRoot{Path: filepath.Join(dir, filesDir)}
	root.NewNode = func(data *fs.LoopbackRoot, _ *fs.Inode, _ string, _ *syscall.Stat_t) fs.InodeEmbedder {
		return &node{LoopbackNode: fs.LoopbackNode{RootData: data}, r: r}
	}
	top := &node{LoopbackNode: fs.LoopbackNode{RootData: root}, r: r}
	root.RootNode = top
	s, err := fs.Mount(filepath.Join(dir, mountDir), top, &fs.Options{MountOptions: fuse.MountOptions{DirectMount: true, FsName: "recordfs"}})
	if err != nil {
		return fmt.Errorf("mount: %w", err)
	}
	if _, err := fmt.Fprintln(out, "mounted"); err != nil {
		return err
	}
	io.Copy(io.Discard, in)
	err = s.Unmount()
	r.mu.Lock()
	defer r.mu.Unlock()
	return errors.Join(err, r.err, w.Flush())
}

type recorder struct {
	clock *atomic.Int64
	mu    sync.Mutex
	enc   *gob.Encoder // guarded by mu
	err   error        // guarded by mu
}

func (r *recorder) now() int { return int(r.clock.Add(1)) }

// do carries a request out and writes it down.
func (r *recorder) do(name string, c dev.CrashRecord, do func() syscall.Errno) syscall.Errno {
	c.Begin = r.now()
	c.Data = append([]byte(nil), c.Data...)
	errno := do()
	if errno == 0 {
		c.End = r.now()
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.err = errors.Join(r.err, r.enc.Encode(record{name, c}))
	return errno
}

type node struct {
	fs.LoopbackNode
	r *recorder
}

func (n *node) wrap(fh fs.FileHandle, name string) fs.FileHandle {
	if l, ok := fh.(*fs.LoopbackFile); ok {
		return &file{l: l, r: n.r, name: name}
	}
	return fh
}

func (n *node) Open(ctx context.Context, flags uint32) (fs.FileHandle, uint32, syscall.Errno) {
	fh, f, errno := n.LoopbackNode.Open(ctx, flags)
	return n.wrap(fh, n.Path(n.Root())), f, errno
}

func (n *node) Create(ctx context.Context, name string, flags, mode uint32, out *fuse.EntryOut) (*fs.Inode, fs.FileHandle, uint32, syscall.Errno) {
	i, fh, f, errno := n.LoopbackNode.Create(ctx, name, flags, mode, out)
	return i, n.wrap(fh, filepath.Join(n.Path(n.Root()), name)), f, errno
}

// Link records a name that appears: the file with all that it holds, or nothing. That it lasts is
// taken for granted at the return: the directory's sync is not followed.
func (n *node) Link(ctx context.Context, target fs.InodeEmbedder, name string, out *fuse.EntryOut) (i *fs.Inode, errno syscall.Errno) {
	path := filepath.Join(n.Path(n.Root()), name)
	content, err := os.ReadFile(filepath.Join(n.RootData.Path, target.EmbeddedInode().Path(n.Root())))
	if err != nil {
		return nil, fs.ToErrno(err)
	}
	errno = n.r.do(path, dev.CrashRecord{Data: content, Whole: true}, func() (e syscall.Errno) {
		i, e = n.LoopbackNode.Link(ctx, target, name, out)
		return e
	})
	if errno == 0 {
		errno = n.r.do(path, dev.CrashRecord{Flush: true}, func() syscall.Errno { return 0 })
	}
	return i, errno
}

// A file is an open file. It has no passthrough: every request comes by here.
type file struct {
	l    *fs.LoopbackFile
	r    *recorder
	name string
}

func (f *file) Read(ctx context.Context, buf []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	return f.l.Read(ctx, buf, off)
}

func (f *file) Write(ctx context.Context, data []byte, off int64) (n uint32, errno syscall.Errno) {
	errno = f.r.do(f.name, dev.CrashRecord{Off: off, Data: data}, func() (e syscall.Errno) {
		n, e = f.l.Write(ctx, data, off)
		return e
	})
	return n, errno
}

func (f *file) Fsync(ctx context.Context, flags uint32) syscall.Errno {
	return f.r.do(f.name, dev.CrashRecord{Flush: true}, func() syscall.Errno { return f.l.Fsync(ctx, flags) })
}

func (f *file) Setattr(ctx context.Context, in *fuse.SetAttrIn, out *fuse.AttrOut) syscall.Errno {
	size, ok := in.GetSize()
	if !ok {
		return f.l.Setattr(ctx, in, out)
	}
	return f.r.do(f.name, dev.CrashRecord{Truncate: true, N: int64(size)}, func() syscall.Errno { return f.l.Setattr(ctx, in, out) })
}

func (f *file) Getattr(ctx context.Context, out *fuse.AttrOut) syscall.Errno {
	return f.l.Getattr(ctx, out)
}

func (f *file) Allocate(context.Context, uint64, uint64, uint32) syscall.Errno {
	return syscall.EOPNOTSUPP
}

func (f *file) Flush(ctx context.Context) syscall.Errno { return f.l.Flush(ctx) }

func (f *file) Release(ctx context.Context) syscall.Errno { return f.l.Release(ctx) }

// Create makes the directories in dir and returns the clock, and where the files are to be opened
// once Serve has said that it is mounted.
func Create(dir string) (clock *atomic.Int64, mount string, err error) {
	for _, d := range []string{filesDir, mountDir} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o700); err != nil {
			return nil, "", err
		}
	}
	if err := os.WriteFile(filepath.Join(dir, clockFile), make([]byte, 4096), 0o600); err != nil {
		return nil, "", err
	}
	clock, err = openClock(filepath.Join(dir, clockFile))
	return clock, filepath.Join(dir, mountDir), err
}

// Load reads what was recorded of the file with a name, after Serve has ended.
func Load(dir, name string) ([]dev.CrashRecord, error) {
	f, err := os.Open(filepath.Join(dir, logFile))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var out []dev.CrashRecord
	for dec := gob.NewDecoder(bufio.NewReader(f)); ; {
		var r record
		if err := dec.Decode(&r); errors.Is(err, io.EOF) {
			return out, nil
		} else if err != nil {
			return nil, err
		}
		if r.Name == name {
			out = append(out, r.CrashRecord)
		}
	}
}
