"""Checkpoint folders: the lazy reader, the streaming atomic writer, the demo model."""
