// Package systemd checks the units that are shipped: what they must have, and what must not be in them.
package systemd

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// unit is what a unit file says: section/key to values.
func unit(t *testing.T, name string) map[string][]string {
	t.Helper()
	f, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	m, section := map[string][]string{}, ""
	for s, n := bufio.NewScanner(f), 1; s.Scan(); n++ {
		line := strings.TrimSpace(s.Text())
		switch {
		case line == "" || line[0] == '#':
		case line[0] == '[' && line[len(line)-1] == ']':
			section = line[1 : len(line)-1]
		default:
			k, v, ok := strings.Cut(line, "=")
			if !ok || section == "" {
				t.Fatalf("%s:%d: %q", name, n, line)
			}
			m[section+"/"+k] = append(m[section+"/"+k], v)
		}
	}
	return m
}

// TestService: the daemon survives the end of the host and of itself, comes before its clients, and
// sees the host's mounts.
func TestService(t *testing.T) {
	u := unit(t, "mica.service")
	for k, want := range map[string]string{
		"Unit/DefaultDependencies": "no", "Service/KillMode": "process", "Service/Type": "notify",
		"Service/ExecStart": "@/usr/bin/mica @mica serve", "Install/Also": "mica.socket",
	} {
		if got := strings.Join(u[k], " "); got != want {
			t.Errorf("%s is %q, want %q", k, got, want)
		}
	}
	before := strings.Join(u["Unit/Before"], " ")
	for _, client := range []string{"containerd.service", "docker.service"} {
		if !strings.Contains(before, client) {
			t.Errorf("not before %s", client)
		}
	}
	if c := u["Unit/Conflicts"]; len(c) > 0 {
		t.Errorf("conflicts with %v: it would be stopped at shutdown", c)
	}
	for k := range u {
		key := strings.TrimPrefix(k, "Service/")
		for _, p := range []string{"Private", "Protect", "ReadOnly", "ReadWrite", "Inaccessible", "Bind", "Root", "TemporaryFileSystem", "MountFlags",
			"MountAPIVFS", "DynamicUser", "ExecPaths", "NoExecPaths", "RuntimeDirectory", "Extension"} {
			if strings.HasPrefix(key, p) {
				t.Errorf("%s makes a mount namespace, or takes RUN away", k)
			}
		}
	}
}

// TestSocket: every socket that containerd uses is there, for root alone.
func TestSocket(t *testing.T) {
	u := unit(t, "mica.socket")
	want := []string{"/run/mica/mica.sock", "/run/mica/snapshotter.sock", "/run/mica/diff.sock"}
	if got := u["Socket/ListenStream"]; !slices.Equal(got, want) {
		t.Errorf("sockets %v, want %v", got, want)
	}
	if got := u["Socket/SocketMode"]; len(got) != 1 || got[0] != "0600" {
		t.Errorf("mode %v", got)
	}
}

// TestVerify lets systemd read the units, where it is installed.
func TestVerify(t *testing.T) {
	tool, err := exec.LookPath("systemd-analyze")
	if err != nil {
		t.Skip("SKIPPED: systemd-analyze is not installed (package systemd)")
	}
	dir := t.TempDir()
	for _, name := range []string{"mica.service", "mica.socket"} {
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		text = []byte(strings.ReplaceAll(string(text), "/usr/bin/mica", "/bin/true"))
		if err := os.WriteFile(filepath.Join(dir, name), text, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.Command(tool, "verify", "--man=no", filepath.Join(dir, "mica.service"), filepath.Join(dir, "mica.socket"))
	cmd.Env = append(os.Environ(), fmt.Sprintf("SYSTEMD_UNIT_PATH=%s:", dir))
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}
