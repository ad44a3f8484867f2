"""Where and how precisely to compute, memory, progress."""
