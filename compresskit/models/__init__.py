"""Models: the table of families, the opened checkpoint, the network without weights, ragged widths, pairs of models."""
