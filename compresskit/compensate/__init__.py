"""Training-free low-rank repair of a compressed model: one file a method, one walk that they share."""
