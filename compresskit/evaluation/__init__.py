"""The evaluate stage: perplexity, KL divergence, tasks, speed, gates."""
