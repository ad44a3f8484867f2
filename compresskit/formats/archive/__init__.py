"""The file of a packed folder: its files in sections, each without loss in fewer bytes."""
