"""Settings of the documentation site: `sphinx-build docs docs/_build` writes it."""

from __future__ import annotations

import sys
from pathlib import Path

from pygments.lexers.shell import BashLexer
from sphinx.application import Sphinx

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

project = "compresskit"
author = "the compresskit authors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "reference_tables"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_copy_source = False
myst_heading_anchors = 3
default_role = "code"  # docstrings write names between single backticks
autodoc_preserve_defaults = True
smartquotes = False  # quotes and dashes of commands stay what they are
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!compresskit\.).*")]  # names of other projects, whose pages are not looked up


def setup(app: Sphinx) -> None:
    """Colour commands that are shown without a prompt."""
    app.add_lexer("console", BashLexer)
