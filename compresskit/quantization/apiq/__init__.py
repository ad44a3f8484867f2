"""ApiQ: train rounding, clipping and a low-rank pair block by block."""
