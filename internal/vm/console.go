package vm

import (
	"regexp"
	"strings"
)

var complaint = regexp.MustCompile(`\b(BUG:|WARNING:|Oops|Kernel panic|general protection fault|` +
	`unable to handle|INFO: task .* blocked|soft lockup|rcu_sched self-detected|Call Trace)`)

// Complaints returns the lines of a console in which the kernel reports a defect.
func Complaints(console string) []string {
	var bad []string
	for _, line := range strings.Split(console, "\n") {
		if complaint.MatchString(line) {
			bad = append(bad, line)
		}
	}
	return bad
}
