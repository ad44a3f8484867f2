"""The ternary file format: thresholds, codings, checksummed sections, the container."""
