"""The export stage: a model as one file for runtimes outside the world of safetensors."""
