"""Recipes: YAML with the same typed settings as the command line. Does not import torch."""
