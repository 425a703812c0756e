package api

import (
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
	"time"
)

// A Duration is a time.Duration that is written as a string: "90s", "36h", "7d", "2w".
type Duration time.Duration

// ParseDuration reads what time.ParseDuration does, and whole days and weeks ("7d", "2w").
func ParseDuration(s string) (time.Duration, error) {
	unit := time.Duration(0)
	switch {
	case strings.HasSuffix(s, "d"):
		unit = 24 * time.Hour
	case strings.HasSuffix(s, "w"):
		unit = 7 * 24 * time.Hour
	default:
		d, err := time.ParseDuration(s)
		if err != nil {
			return 0, fmt.Errorf("duration %q: want a number with a unit, such as 90s, 36h, 7d or 2w", s)
		}
		return d, nil
	}
	n, err := strconv.ParseInt(s[:len(s)-1], 10, 64)
	if err != nil || n > int64(1<<63-1)/int64(unit) || n < -int64(1<<63-1)/int64(unit) {
		return 0, fmt.Errorf("duration %q: want a whole number of days or weeks below 292 years", s)
	}
	return time.Duration(n) * unit, nil
}

func (d Duration) String() string { return time.Duration(d).String() }

// MarshalJSON writes the string.
func (d Duration) MarshalJSON() ([]byte, error) { return json.Marshal(time.Duration(d).String()) }

// UnmarshalJSON reads the string.
func (d *Duration) UnmarshalJSON(b []byte) error {
	var s string
	if err := json.Unmarshal(b, &s); err != nil {
		return fmt.Errorf("duration %s: want a string such as \"36h\"", b)
	}
	v, err := ParseDuration(s)
	*d = Duration(v)
	return err
}
