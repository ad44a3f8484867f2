"""ApiQ: rounding, clipping and a low-rank pair trained block by block."""
