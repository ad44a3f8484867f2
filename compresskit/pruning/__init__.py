"""The prune stage: structured removal of feed-forward channels, one file a method."""
