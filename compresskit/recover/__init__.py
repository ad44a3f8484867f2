"""Recovery: choose the instruction data that repairs a compressed model, and fine-tune on it."""
