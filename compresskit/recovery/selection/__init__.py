"""Which samples to train on, one file a method."""
