"""Fine-tuning: batches, the original's predictions, the training loop."""
