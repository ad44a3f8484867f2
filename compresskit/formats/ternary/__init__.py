"""The ternary file: thresholds, codings, sections with checksums, the container."""
