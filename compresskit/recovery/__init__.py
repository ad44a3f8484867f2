"""The recover stage: select instruction data, fine-tune, write the result."""
