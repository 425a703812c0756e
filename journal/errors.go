package journal

import "errors"

// Conditions that callers branch on.
var (
	// ErrFull: the open generation has no slot left; a commit opens another.
	ErrFull = errors.New("the journal is full")
	// ErrNoPlace: there is no tmpfs that could hold a journal.
	ErrNoPlace = errors.New("no place for a journal")
	// ErrVersion: a journal was left by a build that this one does not understand.
	ErrVersion = errors.New("journal of another version")
	// ErrDamaged: what lies in the place of a journal is none.
	ErrDamaged = errors.New("journal is damaged")
)
