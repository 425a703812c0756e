package vm

import (
	"bytes"
	"debug/elf"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// A moduleTree is the lib/modules/VERSION directory of a kernel, indexed by module name.
// Distribution packages carry no modules.dep (it is made at installation), so dependencies are
// read from the .modinfo section of the modules themselves.
type moduleTree struct {
	files   map[string]string // normalised name -> path
	builtin map[string]bool   // normalised name
}

// normalName is how the kernel spells a module: file names use '-' and '_' alike.
func normalName(name string) string { return strings.ReplaceAll(name, "-", "_") }

func openModuleTree(dir string) (*moduleTree, error) {
	t := &moduleTree{files: map[string]string{}, builtin: map[string]bool{}}
	err := filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if base, _, ok := strings.Cut(d.Name(), ".ko"); ok && d.Type().IsRegular() {
			t.files[normalName(base)] = p
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("kernel modules in %s: %w", dir, err)
	}
	list, err := os.ReadFile(filepath.Join(dir, "modules.builtin"))
	if err != nil {
		return nil, err
	}
	for _, line := range strings.Fields(string(list)) {
		t.builtin[normalName(strings.TrimSuffix(filepath.Base(line), ".ko"))] = true
	}
	return t, nil
}

// A module is one kernel module ready to be inserted.
type module struct {
	name  string
	image []byte // ELF, not compressed
}

// resolve returns the named modules and all they depend on, dependencies first. Modules built
// into the kernel are left out. A name that the kernel does not have at all is an error.
func (t *moduleTree) resolve(names ...string) ([]module, error) {
	var out []module
	done := map[string]bool{}
	var visit func(name string, path []string) error
	visit = func(name string, path []string) error {
		name = normalName(name)
		if done[name] || t.builtin[name] {
			return nil
		}
		for _, p := range path {
			if p == name {
				return fmt.Errorf("kernel module %s depends on itself: %v", name, path)
			}
		}
		file, ok := t.files[name]
		if !ok {
			return fmt.Errorf("kernel module %s (wanted by %v): neither a file nor built in", name, path)
		}
		image, err := readModule(file)
		if err != nil {
			return err
		}
		deps, soft, err := moduleDeps(image)
		if err != nil {
			return fmt.Errorf("kernel module %s: %w", name, err)
		}
		path = append(path, name)
		for _, dep := range deps {
			if err := visit(dep, path); err != nil {
				return err
			}
		}
		for _, dep := range soft {
			if _, ok := t.files[normalName(dep)]; !ok {
				continue // a soft dependency is a wish, and may be an alias
			}
			if err := visit(dep, path); err != nil {
				return err
			}
		}
		done[name] = true
		out = append(out, module{name, image})
		return nil
	}
	for _, name := range names {
		if err := visit(name, nil); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// readModule returns the ELF image of a module file: plain, .xz, .gz or .zst.
func readModule(file string) ([]byte, error) {
	var tool []string
	switch filepath.Ext(file) {
	case ".ko":
		return os.ReadFile(file)
	case ".xz":
		tool = []string{"xz", "-dc"}
	case ".gz":
		tool = []string{"gzip", "-dc"}
	case ".zst":
		tool = []string{"zstd", "-dcq"}
	default:
		return nil, fmt.Errorf("kernel module %s: unknown compression", file)
	}
	image, err := exec.Command(tool[0], append(tool[1:], file)...).Output()
	if err != nil {
		return nil, fmt.Errorf("kernel module %s: %s: %w", file, tool[0], err)
	}
	return image, nil
}

// moduleDeps reads "depends=a,b" and "softdep=pre: c d" from the .modinfo section: a sequence of
// NUL-terminated key=value strings.
func moduleDeps(image []byte) (hard, soft []string, err error) {
	f, err := elf.NewFile(bytes.NewReader(image))
	if err != nil {
		return nil, nil, err
	}
	section := f.Section(".modinfo")
	if section == nil {
		return nil, nil, fmt.Errorf("no .modinfo section")
	}
	info, err := section.Data()
	if err != nil {
		return nil, nil, err
	}
	for _, kv := range strings.Split(string(info), "\x00") {
		switch key, value, _ := strings.Cut(kv, "="); key {
		case "depends":
			for _, dep := range strings.Split(value, ",") {
				if dep != "" {
					hard = append(hard, dep)
				}
			}
		case "softdep":
			if list, ok := strings.CutPrefix(value, "pre:"); ok {
				list, _, _ = strings.Cut(list, "post:")
				soft = append(soft, strings.Fields(list)...)
			}
		}
	}
	return hard, soft, nil
}
