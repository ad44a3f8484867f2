"""Ways to merge task vectors, one file a method."""
