package node

import "testing"

func TestParseMount(t *testing.T) {
	for _, c := range []struct {
		line string
		want mount
		ok   bool
	}{
		{"36 35 7:3 / /mnt/a rw,noatime shared:1 - ext4 /dev/loop3 rw", mount{"7:3", "/mnt/a", "ext4", "/dev/loop3"}, true},
		{`36 35 7:3 / /mnt/a\040b\134 rw - ext4 /dev/lo\011p rw`, mount{"7:3", `/mnt/a b\`, "ext4", "/dev/lo\tp"}, true},
		{"36 35 0:40 /sub /mnt/a rw shared:1 master:2 - btrfs /dev/loop3 rw,subvol=/sub", mount{"0:40", "/mnt/a", "btrfs", "/dev/loop3"}, true},
		{"36 35 7:3 / /mnt/a rw", mount{}, false},
		{"36 35 - ext4 x", mount{}, false},
		{"", mount{}, false},
	} {
		got, ok := parseMount(c.line)
		if got != c.want || ok != c.ok {
			t.Errorf("%q: %+v, %v; want %+v, %v", c.line, got, ok, c.want, c.ok)
		}
	}
}
