"""Quantisation: a method a file, and the walk that they share."""
