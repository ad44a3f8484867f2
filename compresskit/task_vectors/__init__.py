"""Task vectors: compress, expand and merge the changes made by fine-tuning."""
