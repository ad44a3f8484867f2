"""A run's folder -> one HTML page and a model card."""
