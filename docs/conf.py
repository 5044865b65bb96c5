"""Settings of Sphinx for this site: ``make docs`` builds it."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from lpcam.runtime.versions import __version__

project = "LPCAM"
author = "the LPCAM contributors"
version = release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "from_code", "llms"]
exclude_patterns = ["_build"]
highlight_language = "none"  # a block without a language holds commands or a tree of files

html_theme = "furo"
html_title = "LPCAM"
html_copy_source = False
html_show_sphinx = False

myst_heading_anchors = 3  # so that a page can link to a heading of another, as on a code host
myst_enable_extensions = ["colon_fence"]

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_inherit_docstrings = False
autodoc_preserve_defaults = True
napoleon_use_ivar = True
napoleon_use_rtype = False

# Links into the package must resolve; other people's classes have no address without a network.
nitpicky = True
# The text "LPCAM" in a type is one of two classes of the name; the first is meant.
suppress_warnings = ["ref.python"]
nitpick_ignore_regex = [(r"py:(class|exc|obj|data|attr)", r"(?!lpcam\.).*")]
