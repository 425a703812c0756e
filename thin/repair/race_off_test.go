//go:build !race

package repair

const slow = 1
