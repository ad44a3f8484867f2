"""The compensate stage: low-rank repair of a compressed model, one file per method."""
