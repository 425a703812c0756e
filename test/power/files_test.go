package power

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"mica/dev"
)

// The load of a file system, done by a process of its own, and what must be in it after a cut:
//
//   - files f<n> are written once, with fsync, and removed later;
//   - file log grows by numbered lines, with fdatasync now and then;
//   - file pages is overwritten page by page, with fsync now and then.
//
// The process says on its output what is durable from now on. What it is about to take away it
// says first, and waits for an answer.

const (
	pageCount = 256
	pageBytes = 4096
	lineBytes = 32
)

func fileBytes(n int) []byte {
	rng := rand.New(rand.NewPCG(uint64(n), 5))
	p := make([]byte, 1+rng.IntN(60_000))
	for i := 0; i+8 <= len(p); i += 8 {
		binary.LittleEndian.PutUint64(p[i:], rng.Uint64())
	}
	return p
}

func logLine(n int) string { return fmt.Sprintf("%0*d\n", lineBytes-1, n) }

func page(n, version int) []byte {
	p := make([]byte, pageBytes)
	for i := 0; i < len(p); i += 16 {
		binary.LittleEndian.PutUint64(p[i:], uint64(n))
		binary.LittleEndian.PutUint64(p[i+8:], uint64(version))
	}
	return p
}

// filesRole does steps operations in dir.
func filesRole(dir, seed, steps string) error {
	s, err := strconv.ParseUint(seed, 10, 64)
	n, err2 := strconv.Atoi(steps)
	if err := errors.Join(err, err2); err != nil {
		return err
	}
	rng := rand.New(rand.NewPCG(s, 6))
	answers := bufio.NewReader(os.Stdin)
	log, err := os.OpenFile(filepath.Join(dir, "log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	pages, err := os.OpenFile(filepath.Join(dir, "pages"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	for i := range pageCount {
		if _, err := pages.WriteAt(page(i, 0), int64(i)*pageBytes); err != nil {
			return err
		}
	}
	d, err := os.Open(dir)
	if err := errors.Join(err, pages.Sync(), log.Sync(), d.Sync()); err != nil {
		return err
	}
	fmt.Println("base")
	var live []int
	files, lines := 0, 0
	versions := make([]int, pageCount)
	for range n {
		switch rng.IntN(10) {
		case 0, 1, 2:
			files++
			name := filepath.Join(dir, fmt.Sprintf("d%d", files%7), fmt.Sprintf("f%d", files))
			if err := os.MkdirAll(filepath.Dir(name), 0o700); err != nil {
				return err
			}
			f, err := os.Create(name)
			if err != nil {
				return err
			}
			if _, err := f.Write(fileBytes(files)); err != nil {
				return err
			}
			if err := errors.Join(f.Sync(), f.Close()); err != nil {
				return err
			}
			fmt.Println("file", files)
			live = append(live, files)
		case 3:
			if len(live) < 8 {
				continue
			}
			k := rng.IntN(len(live))
			fmt.Println("remove", live[k])
			if _, err := answers.ReadString('\n'); err != nil {
				return err
			}
			if err := os.Remove(filepath.Join(dir, fmt.Sprintf("d%d", live[k]%7), fmt.Sprintf("f%d", live[k]))); err != nil {
				return err
			}
			live = append(live[:k], live[k+1:]...)
		case 4, 5, 6:
			for range 1 + rng.IntN(200) {
				if _, err := log.WriteString(logLine(lines)); err != nil {
					return err
				}
				lines++
			}
			if rng.IntN(2) == 0 {
				if err := unix.Fdatasync(int(log.Fd())); err != nil {
					return err
				}
				fmt.Println("lines", lines)
			}
		case 7, 8:
			for range 1 + rng.IntN(12) {
				k := rng.IntN(pageCount)
				versions[k]++
				if _, err := pages.WriteAt(page(k, versions[k]), int64(k)*pageBytes); err != nil {
					return err
				}
			}
			if rng.IntN(2) == 0 {
				if err := pages.Sync(); err != nil {
					return err
				}
				fmt.Println("pages", strings.Trim(fmt.Sprint(versions), "[]"))
			}
		case 9: // work that nobody waits for
			name := filepath.Join(dir, fmt.Sprintf("t%d", rng.IntN(5)))
			if err := os.WriteFile(name, fileBytes(rng.IntN(1000)), 0o600); err != nil {
				return err
			}
			if err := os.Rename(name, name+"r"); err != nil {
				return err
			}
		}
	}
	return nil
}

// A fileHistory says what must be there from when on.
type fileHistory struct {
	base    int
	made    map[int]int // file -> clock
	removed map[int]int
	lines   []atClock
	pages   []pagesAt
}

type atClock struct{ n, clock int }

type pagesAt struct {
	versions []int
	clock    int
}

// load runs the process on a mounted file system and writes down what it says.
func load(log *dev.CrashLog, dir string, seed uint64, steps int, each func(step int) error) (*fileHistory, error) {
	h := &fileHistory{made: map[int]int{}, removed: map[int]int{}}
	c := exec.Command("/proc/self/exe", "role-files", dir, fmt.Sprint(seed), fmt.Sprint(steps))
	c.Stderr = os.Stderr
	in, err := c.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := c.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := c.Start(); err != nil {
		return nil, err
	}
	s := bufio.NewScanner(out)
	s.Buffer(nil, 1<<20)
	for n := 0; s.Scan(); n++ {
		now := log.Now()
		word, rest, _ := strings.Cut(s.Text(), " ")
		switch word {
		case "base":
			h.base = now
		case "file", "remove", "lines":
			k, err := strconv.Atoi(rest)
			if err != nil {
				return nil, err
			}
			switch word {
			case "file":
				h.made[k] = now
			case "lines":
				h.lines = append(h.lines, atClock{k, now})
			case "remove":
				h.removed[k] = now
				io.WriteString(in, "\n")
			}
		case "pages":
			p := pagesAt{clock: now}
			for _, w := range strings.Fields(rest) {
				v, _ := strconv.Atoi(w)
				p.versions = append(p.versions, v)
			}
			h.pages = append(h.pages, p)
		}
		if err := each(n); err != nil {
			return nil, err
		}
	}
	return h, c.Wait()
}

// check looks at a file system as of a cut.
func (h *fileHistory) check(dir string, cut int) error {
	if cut < h.base {
		return nil
	}
	for n, made := range h.made {
		if gone, ok := h.removed[n]; made > cut || ok && gone <= cut {
			continue
		}
		b, err := os.ReadFile(filepath.Join(dir, fmt.Sprintf("d%d", n%7), fmt.Sprintf("f%d", n)))
		if err != nil {
			return fmt.Errorf("file %d, durable at %d: %w", n, made, err)
		}
		if string(b) != string(fileBytes(n)) {
			return fmt.Errorf("file %d, durable at %d, has other contents (%d bytes)", n, made, len(b))
		}
	}
	lines := 0
	for _, l := range h.lines {
		if l.clock <= cut {
			lines = l.n
		}
	}
	b, err := os.ReadFile(filepath.Join(dir, "log"))
	if err != nil {
		return err
	}
	if len(b) < lines*lineBytes {
		return fmt.Errorf("log of %d bytes: %d lines of %d were durable", len(b), lines, lineBytes)
	}
	for i := range lines {
		if got := string(b[i*lineBytes : (i+1)*lineBytes]); got != logLine(i) {
			return fmt.Errorf("line %d of the log is %q, %d were durable", i, got, lines)
		}
	}
	versions := make([]int, pageCount)
	for _, p := range h.pages {
		if p.clock <= cut {
			versions = p.versions
		}
	}
	if b, err = os.ReadFile(filepath.Join(dir, "pages")); err != nil {
		return err
	}
	if len(b) != pageCount*pageBytes {
		return fmt.Errorf("pages: %d bytes", len(b))
	}
	for i := range pageCount {
		for at := i * pageBytes; at < (i+1)*pageBytes; at += 16 {
			n, v := binary.LittleEndian.Uint64(b[at:]), binary.LittleEndian.Uint64(b[at+8:])
			if n != uint64(i) || v < uint64(versions[i]) {
				return fmt.Errorf("pages: byte %d is of page %d, version %d; want page %d, version %d or later", at, n, v, i, versions[i])
			}
		}
	}
	// Whatever else is there can be read.
	return filepath.WalkDir(dir, func(p string, e fs.DirEntry, err error) error {
		if err == nil && e.Type().IsRegular() {
			_, err = os.ReadFile(p)
		}
		return err
	})
}
