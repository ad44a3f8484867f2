"""Task vectors: compress, expand and merge what fine-tuning added."""
