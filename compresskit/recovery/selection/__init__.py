"""Selection of training samples, one file per method."""
