"""Image files: sequences of zstd frames with an index; see docs/format.md."""
