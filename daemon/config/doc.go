// Package config reads the daemon's configuration: one TOML file, every key optional, unknown
// keys are errors that show the line. The reference for people (docs/configuration.md) is made
// from the field tags here.
package config
