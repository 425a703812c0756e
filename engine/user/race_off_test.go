//go:build !race

package user

const slow = 1
