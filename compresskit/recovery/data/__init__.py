"""Instruction data: read, encode, drop duplicates, hold back."""
