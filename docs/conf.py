"""How the documentation is built: `make docs`."""

from __future__ import annotations

import sys
from pathlib import Path

import dtkit

sys.path.insert(0, str(Path(__file__).parent / "_extensions"))

project = "dtkit"
author = copyright = "The dtkit developers"  # noqa: A001  Sphinx's name for it
version = release = dtkit.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "generated_pages",
]
exclude_patterns = ["_extensions"]
smartquotes_action = "qe"  # two dashes begin an option
default_role = "code"  # docstrings write names in single backticks
myst_enable_extensions = ["attrs_inline", "colon_fence"]
myst_heading_anchors = 3
# A transcript's prompt and output are not what a reader wants to paste.
copybutton_exclude = ".linenos, .gp, .go"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

# Types of other packages: their inventories would have to come from the net.
nitpicky = True
nitpick_ignore_regex = [("py:class", r".*"), ("py:exc", r"(?!dtkit).*")]

html_theme = "furo"
html_title = "dtkit"
html_show_sphinx = False
html_show_copyright = False
# The tutorials with their outputs, where `make docs` has run them.
_TUTORIALS = Path(__file__).parents[1] / "build" / "with_tutorials"
html_extra_path = [str(_TUTORIALS)] if _TUTORIALS.exists() else []
