"""Checkpoint folders: lazy reader, streaming atomic writer, demo model."""
