"""The quantize stage: weights in 2 to 8 bits, one file per method."""
