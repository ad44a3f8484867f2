"""Pruning in depth: whole blocks removed, and what they added folded into the block before them."""
