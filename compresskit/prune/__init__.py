"""Structured pruning of feed-forward channels: one file a method, plus what all of them share."""
