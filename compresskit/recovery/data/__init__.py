"""Instruction data: read, encode, remove duplicates, hold back."""
