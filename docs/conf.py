# SPDX-License-Identifier: Apache-2.0
"""Sphinx configuration: ``sphinx-build -W --keep-going -b html docs <folder>``."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import monai_deq

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent

project = "monai_deq"
author = "The monai_deq developers"
copyright = "The monai_deq developers, Apache-2.0"
version = release = monai_deq.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
html_theme = "furo"
html_title = f"monai_deq {release}"

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
python_use_unqualified_type_names = True

#: pages that are a file from elsewhere in the repository, by that file
_PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "bundles/oasis/docs/README.md": "bundles/oasis.md",
    "bundles/nlst/docs/README.md": "bundles/nlst.md",
}
_LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<path>[^)#\s:]+)(?P<anchor>#[^)\s]*)?\)")


def _as_page(file: Path, text: str) -> str:
    """
    The text with links for these pages instead of for the repository, where the same file is read too.

    A link to a file that is a page here becomes one to that page; one to a folder, or to a file outside ``docs`` that
    is no page, has no target here and becomes its path in the repository.
    """

    def page(link: re.Match[str]) -> str:
        target = Path(os.path.normpath(file.parent / link["path"]))
        if link["path"].startswith("/") or not target.is_relative_to(ROOT) or not target.exists():
            return link[0]  # of a dead one Sphinx warns
        path = target.relative_to(ROOT).as_posix()
        if path in _PAGES:
            path = _PAGES[path]
        elif target.is_relative_to(DOCS) and not target.is_dir():
            path = target.relative_to(DOCS).as_posix()
        else:
            return f"`{path}`"
        return f"{link['image']}[{link['text']}](/{path}{link['anchor'] or ''})"

    return _LINK.sub(page, text)


def _source_read(app: Any, docname: str, content: list[str]) -> None:
    file = Path(app.env.doc2path(docname))
    content[0] = _as_page(file, content[0])
    if not content[0].startswith(("# ", "```")):  # what a command has written may have no heading
        content[0] = f"# {docname}\n\n{content[0]}"


def _include_read(app: Any, path: Path, docname: str, content: list[str]) -> None:
    file = Path(os.path.normpath(DOCS / path))
    content[0] = _as_page(file, content[0])


def setup(app: Any) -> None:
    app.connect("source-read", _source_read)
    app.connect("include-read", _include_read)
