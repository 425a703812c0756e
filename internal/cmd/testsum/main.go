// Command testsum reads the output of `go test -json` on standard input and prints what a person
// wants to know: one line per package, every failure in full, the skipped tests by reason, and at
// the end one line of the form "12 passed, 0 failed, 3 skipped". The exit status is 1 if anything
// failed or no test ran.
//
// A test with subtests is not counted itself, its subtests are, unless it failed although none
// of them did. A package that fails outside its tests (it does not build, it panics, it runs into
// the time limit) counts as one failure.
package main

import (
	"bufio"
	"fmt"
	"os"
)

func main() {
	s := newSummary(os.Stdout)
	in := bufio.NewReaderSize(os.Stdin, 1<<20)
	for {
		line, err := in.ReadBytes('\n')
		if len(line) > 0 {
			s.line(line)
		}
		if err != nil {
			break
		}
	}
	if !s.finish() {
		os.Exit(1)
	}
}

// plural is "1 test", "2 tests".
func plural(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}
