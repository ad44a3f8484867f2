"""The prune stage: structured removal of feed-forward channels, one file per method."""
