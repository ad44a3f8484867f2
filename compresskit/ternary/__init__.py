"""Vectors of {-1, 0, +1}: the threshold that makes them, their codings, and the file that holds them. Loads no torch."""
