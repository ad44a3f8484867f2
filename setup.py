"""The packages: those of the source tree, and the folder of recipes beside it, which becomes `compresskit/recipes`."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["compresskit*"]), "compresskit.recipes"],
    package_dir={"compresskit.recipes": "recipes"},
    package_data={"compresskit.recipes": ["*.yaml", "*.json", "*.jsonl"], "compresskit.report": ["*.css"]},
)
