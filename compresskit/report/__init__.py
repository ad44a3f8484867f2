"""Turn a run's folder into an HTML page and a model card."""
