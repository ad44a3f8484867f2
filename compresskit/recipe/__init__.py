"""Recipes: YAML <-> the same typed settings that the command line builds. Loads no torch."""
