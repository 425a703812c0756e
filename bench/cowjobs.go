package bench

import (
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// page is what databases write.
const page = 8 << 10

// jobs are what containers do, each in a container of its own.
func (s cowShape) jobs() []cowJob {
	return []cowJob{
		{nameFirst(s), "ms", s.firstWrite},
		{"SQLite-like transactions in it", "per second", s.rollbackJournal},
		{"PostgreSQL-like transactions in it", "per second", s.writeAheadLog},
		{fmt.Sprintf("chmod -R of %d files", s.files), "ms", func(dir string) (figure, error) {
			return figure{}, errors.Join(chmodAll(filepath.Join(dir, "tree")), syncDir(dir))
		}},
		{fmt.Sprintf("create %d small files", s.created), "ms", func(dir string) (figure, error) {
			return figure{}, errors.Join(s.createSmall(dir), syncDir(dir))
		}},
		{fmt.Sprintf("create and delete %d small files", s.created), "ms", func(dir string) (figure, error) {
			err := errors.Join(s.createSmall(dir), syncDir(dir), os.RemoveAll(filepath.Join(dir, "small")), syncDir(dir))
			return figure{}, err
		}},
	}
}

func syncDir(dir string) error {
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return unix.Syncfs(fd)
}

// firstWrite writes 4 KiB into the middle of the big file, durably.
func (s cowShape) firstWrite(dir string) (figure, error) {
	f, err := os.OpenFile(filepath.Join(dir, "big"), os.O_RDWR, 0)
	if err != nil {
		return figure{}, err
	}
	defer f.Close()
	if _, err := f.WriteAt(make([]byte, 4096), s.big/2&^4095); err != nil {
		return figure{}, err
	}
	return figure{}, f.Sync()
}

// A database is a big file that is open, and random places in it.
type database struct {
	f     *os.File
	rnd   *rand.Rand
	pages int64
	buf   []byte
}

func (s cowShape) database(dir string) (*database, error) {
	f, err := os.OpenFile(filepath.Join(dir, "big"), os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	d := &database{f: f, rnd: rand.New(rand.NewPCG(1, 2)), pages: s.big / page, buf: make([]byte, page)}
	// overlayfs copied the file when it was opened: that is in the first row, not in these.
	return d, f.Sync()
}

// change reads a random page, changes it and writes it back.
func (d *database) change() error {
	off := d.rnd.Int64N(d.pages) * page
	if _, err := d.f.ReadAt(d.buf, off); err != nil {
		return err
	}
	d.buf[d.rnd.IntN(page)]++
	_, err := d.f.WriteAt(d.buf, off)
	return err
}

// perSecond counts calls of fn in a time.
func perSecond(d time.Duration, fn func(i int) error) (figure, error) {
	begin := time.Now()
	for i := 0; ; i++ {
		if err := fn(i); err != nil {
			return figure{}, err
		}
		if t := time.Since(begin); t > d {
			return figure{value: float64(i+1) / t.Seconds()}, nil
		}
	}
}

// rollbackJournal does transactions as SQLite does by default: the old page into a journal, fsync,
// the new page, fsync, the journal is deleted.
func (s cowShape) rollbackJournal(dir string) (figure, error) {
	d, err := s.database(dir)
	if err != nil {
		return figure{}, err
	}
	defer d.f.Close()
	journal := filepath.Join(dir, "big-journal")
	return perSecond(s.writes, func(int) error {
		if err := writeSynced(journal, make([]byte, page+512)); err != nil {
			return err
		}
		if err := d.change(); err != nil {
			return err
		}
		return errors.Join(unix.Fdatasync(int(d.f.Fd())), os.Remove(journal))
	})
}

// writeAheadLog does transactions as PostgreSQL does: a page of log and fdatasync for each, and
// after 64 of them a checkpoint: the changed pages, and fsync.
func (s cowShape) writeAheadLog(dir string) (figure, error) {
	d, err := s.database(dir)
	if err != nil {
		return figure{}, err
	}
	defer d.f.Close()
	log, err := os.Create(filepath.Join(dir, "wal"))
	if err != nil {
		return figure{}, err
	}
	defer log.Close()
	segment := make([]byte, 1<<20) // segments are allocated before they are used
	for range 16 {
		if _, err := log.Write(segment); err != nil {
			return figure{}, err
		}
	}
	if err := log.Sync(); err != nil {
		return figure{}, err
	}
	return perSecond(s.writes, func(i int) error {
		if _, err := log.WriteAt(d.buf, int64(i)*page%(16<<20)); err != nil {
			return err
		}
		if err := unix.Fdatasync(int(log.Fd())); err != nil {
			return err
		}
		if err := d.change(); err != nil {
			return err
		}
		if i%64 == 63 {
			return d.f.Sync()
		}
		return nil
	})
}

// chmodAll changes the mode of everything below dir.
func chmodAll(dir string) error {
	return filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if e.IsDir() {
			return os.Chmod(path, 0o750)
		}
		return os.Chmod(path, 0o600)
	})
}

// createSmall creates many files of 4 KiB.
func (s cowShape) createSmall(dir string) error {
	data := make([]byte, 4096)
	for i := range data {
		data[i] = byte(i)
	}
	for i := range s.created {
		d := filepath.Join(dir, "small", strconv.Itoa(i/100))
		if i%100 == 0 {
			if err := os.MkdirAll(d, 0o755); err != nil {
				return err
			}
		}
		if err := os.WriteFile(filepath.Join(d, strconv.Itoa(i)), data, 0o644); err != nil {
			return err
		}
	}
	return nil
}
