"""The walk: a model's blocks in order, one in memory, and the statistics that are collected on the way."""
