package config

import (
	"fmt"
	"strconv"
	"strings"
	"time"

	units "github.com/docker/go-units"

	"mica/daemon/api"
)

// A Size is a number of bytes. In the file: an integer, or a string with K, M, G or T, which
// are powers of 1024.
type Size int64

// UnmarshalText reads "10G" and "4096".
func (s *Size) UnmarshalText(b []byte) error {
	n, err := units.RAMInBytes(string(b))
	if err != nil || n < 0 {
		return fmt.Errorf("%q is not a size: want a number of bytes, or a number with K, M, G or T", b)
	}
	*s = Size(n)
	return nil
}

// String is the shortest form that reads back as the same number.
func (s Size) String() string {
	n, unit := int64(s), 0
	for n != 0 && n%1024 == 0 && unit < 4 {
		n, unit = n/1024, unit+1
	}
	return strconv.FormatInt(n, 10) + []string{"", "K", "M", "G", "T"}[unit]
}

// A Duration is a time.Duration. In the file: a string such as "90s", "36h" or "7d".
type Duration time.Duration

// UnmarshalText reads "90s" and "7d".
func (d *Duration) UnmarshalText(b []byte) error {
	v, err := api.ParseDuration(string(b))
	if err == nil && v < 0 {
		err = fmt.Errorf("duration %q is negative", b)
	}
	*d = Duration(v)
	return err
}

// String leaves out the zero parts: "1h", not "1h0m0s".
func (d Duration) String() string {
	s := time.Duration(d).String()
	if strings.HasSuffix(s, "m0s") {
		s = s[:len(s)-2]
	}
	if strings.HasSuffix(s, "h0m") {
		s = s[:len(s)-2]
	}
	return s
}

// A Percent is a whole number from 0 to 100. In the file: 80 or "80%".
type Percent int

// UnmarshalText reads "80" and "80%".
func (p *Percent) UnmarshalText(b []byte) error {
	n, err := strconv.Atoi(strings.TrimSuffix(string(b), "%"))
	if err != nil || n < 0 || n > 100 {
		return fmt.Errorf("%q is not a percentage from 0 to 100", b)
	}
	*p = Percent(n)
	return nil
}

func (p Percent) String() string { return strconv.Itoa(int(p)) + "%" }
