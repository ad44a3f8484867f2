"""Pure mathematics of tensors: quantization grids, packed codes, low-rank factors."""
