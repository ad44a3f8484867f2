"""The evaluate stage: perplexity, KL divergence, tasks, speed and gates."""
