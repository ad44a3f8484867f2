"""The recover stage: choose instruction data, fine-tune, write."""
