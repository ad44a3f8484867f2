"""Models: the table of families, opened checkpoints, networks without weights, ragged widths and model pairs."""
