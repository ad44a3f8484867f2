"""Walk through a model block by block, with one block in memory, and collect statistics."""
