"""Tensor mathematics: quantisation grids, packed codes, low-rank factors."""
