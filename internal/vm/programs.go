package vm

import (
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// Programs returns what Config.Files needs so that programs of this host run in the guest: the
// programs themselves and their shared libraries, at the places where they lie here. Names
// without a slash are looked up in PATH and land in /bin.
func Programs(names ...string) (map[string]string, error) {
	files := map[string]string{}
	for _, name := range names {
		path, err := exec.LookPath(name)
		if err != nil {
			return nil, err
		}
		real, err := filepath.EvalSymlinks(path)
		if err != nil {
			return nil, err
		}
		at := path
		if !strings.Contains(name, "/") {
			at = "/bin/" + name
		}
		files[at] = real
		libs, err := Libraries(real)
		if err != nil {
			return nil, err
		}
		maps.Copy(files, libs)
	}
	return files, nil
}

// Libraries returns the shared libraries of one program or library, and the loader, as ldd tells
// them; none for a static program.
func Libraries(path string) (map[string]string, error) {
	out, err := exec.Command("ldd", path).CombinedOutput()
	if err != nil {
		if strings.Contains(string(out), "not a dynamic executable") {
			return nil, nil
		}
		return nil, fmt.Errorf("ldd %s: %w: %s", path, err, strings.TrimSpace(string(out)))
	}
	files := map[string]string{}
	for line := range strings.Lines(string(out)) {
		// "libm.so.6 => /lib/x86_64-linux-gnu/libm.so.6 (0x...)", "/lib64/ld-linux... (0x...)"
		if _, after, ok := strings.Cut(line, "=>"); ok {
			line = after
		}
		lib, _, _ := strings.Cut(strings.TrimSpace(line), " ")
		if !filepath.IsAbs(lib) {
			if strings.Contains(line, "not found") {
				return nil, fmt.Errorf("ldd %s: %s", path, strings.TrimSpace(line))
			}
			continue // the kernel's vdso
		}
		real, err := filepath.EvalSymlinks(lib)
		if err != nil {
			return nil, err
		}
		if st, err := os.Stat(real); err != nil || !st.Mode().IsRegular() {
			return nil, fmt.Errorf("ldd %s: %s is no file", path, real)
		}
		files[lib] = real
	}
	return files, nil
}
