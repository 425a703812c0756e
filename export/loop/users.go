package loop

import (
	"strconv"

	"mica/export/node"
)

// What package node says about the users of any block device, under the names of this package.
type (
	UserList  = node.UserList
	BusyError = node.BusyError
)

// Users lists what uses loop device n: mounts in every mount namespace that /proc shows, stacked
// devices, swap, and processes that have it open. It reads /proc and sysfs only.
func Users(n int) UserList {
	dev, err := deviceNumber(n)
	if err != nil {
		return nil
	}
	return UsersOf(dev, "/dev/loop"+strconv.Itoa(n))
}

// UsersOf is Users for any block device: its number and the path of its node.
func UsersOf(dev uint64, path string) UserList { return node.Users(dev, path) }
