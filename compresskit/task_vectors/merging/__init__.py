"""Merging methods for task vectors, one file per method."""
