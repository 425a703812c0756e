// Package image reads container images from files and streams and brings them into a layer
// store: OCI image layouts (directories), OCI archives (the same in a tar) and docker save
// archives (both the old form with manifest.json and the new one, an OCI layout with a
// manifest.json beside it), with layers that are plain, gzip or zstd.
//
// Nothing that an archive says is believed before it was checked: every index, manifest and
// config against the digest that names it, every layer twice, as stored (blob digest) and as
// uncompressed (diff id of the config). Sizes are bounded before memory is taken.
package image
