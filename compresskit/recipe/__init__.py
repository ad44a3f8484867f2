"""Recipes: YAML with the same typed settings as the command line."""
