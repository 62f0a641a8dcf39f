"""Sphinx: the pages of this folder, and the reference that `generate.py` makes."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import generate  # noqa: E402

import fedsplit  # noqa: E402

project = "fedsplit"
author = "The fedsplit authors"
version = release = fedsplit.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]
highlight_language = "text"
# Docstrings write code in single backticks.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
maximum_signature_line_length = 100
add_module_names = False

html_theme = "furo"
html_title = "fedsplit"
html_static_path = ["_static"]
html_css_files = ["fedsplit.css"]
html_show_sphinx = False
html_copy_source = False
pygments_style = "default"
pygments_dark_style = "monokai"


def fill(app: Any, name: str, source: list[str]) -> None:
    """Put into a page what is made when the docs are built."""
    source[0] = generate.fill(source[0])


def drawn(app: Any, what: str, name: str, subject: Any, options: Any, lines: list[str]) -> None:
    """Indented pictures and tables of docstrings are literal blocks of reStructuredText."""
    out: list[str] = []
    for number, line in enumerate(lines):
        begins = line.startswith("    ") and (not number or not lines[number - 1].strip())
        if begins and not re.match(r" *(::|:\w)", line):
            out += ["::", ""] if not any(text.strip() == "::" for text in out[-2:]) else []
        out.append(line)
    lines[:] = out


def unsigned(app: Any, what: str, name: str, subject: Any, options: Any, signature: str, returned: str) -> Any:
    """A protocol is not called, and has no signature."""
    return ("", returned) if signature == "(*args, **kwargs)" else None


def setup(app: Any) -> None:
    """Sphinx calls this."""
    app.connect("source-read", fill)
    app.connect("autodoc-process-signature", unsigned)
    app.connect("autodoc-process-docstring", drawn, priority=400)
