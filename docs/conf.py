"""Sphinx configuration: MyST pages and the API from the docstrings."""

project = "bs-attention"
copyright = "2026, the bs-attention authors"
author = "the bs-attention authors"
release = "0.1.0"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.intersphinx"]
exclude_patterns = ["_build"]
source_suffix = {".md": "markdown"}
myst_enable_extensions = ["colon_fence", "dollarmath", "deflist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # dataclass fields are objects of their own already
# "Source:" closes a docstring with the paper or the derivation; "Shape legend" opens some.
napoleon_custom_sections = [("Source", "notes_style")]
# Nothing is fetched while building; cross-package links stay inside these pages.
intersphinx_mapping = {}

html_theme = "furo"
html_title = "bs-attention"
