# SPDX-License-Identifier: Apache-2.0
"""Pages of HTML in one file: style and script inline, images as data URIs, nothing from a network."""

from __future__ import annotations

import base64
import io
import platform
from collections.abc import Mapping, Sequence
from datetime import datetime
from html import escape
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from monai_deq import __version__
from monai_deq.utils import refuse_existing, replace_file
from monai_deq.visualize.style import figure_png

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["HTMLPage", "html_picture", "html_table"]

_CSS = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { max-width: 1080px; margin: 0 auto; padding: 16px; font: 16px/1.45 system-ui, sans-serif; color: #1a1a1a; }
h1 { font-size: 1.5em; line-height: 1.2; } h2 { font-size: 1.15em; margin: 1.6em 0 .5em; } h3 { font-size: 1em; }
h1, td, th, p { overflow-wrap: anywhere; }
p { margin: .5em 0; } small { display: block; font-weight: normal; font-size: .8em; color: #555; }
.badge { padding: .5em .8em; border-left: 6px solid; border-radius: 4px; }
.good { background: #e2f4ec; border-color: #009e73; } .doubt { background: #fdf1d6; border-color: #e69f00; }
.scroll { overflow-x: auto; } .scroll + .scroll { margin-top: 1em; }
table { border-collapse: collapse; width: 100%; } caption { text-align: left; font-weight: 600; }
th, td { padding: .35em .6em; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top; }
th[scope=row] { min-width: 9em; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
img { max-width: 100%; height: auto; display: block; }
.viewer .screen { position: relative; width: 100%; max-width: 420px; background: #000; }
.viewer .screen img { width: 100%; }
.viewer .screen span { position: absolute; color: #fff; font-size: .8em; text-shadow: 0 0 3px #000; }
.viewer .screen .l { left: 4px; top: 45%; } .viewer .screen .r { right: 4px; top: 45%; }
.viewer .screen .t { left: 48%; top: 2px; } .viewer .screen .b { left: 48%; bottom: 2px; }
.viewer button { font: inherit; padding: .35em .8em; margin: 0 .2em .3em 0; border: 1px solid #888;
  border-radius: 4px; background: #fff; color: inherit; }
.viewer button[aria-pressed=true] { background: #0072b2; border-color: #0072b2; color: #fff; }
.viewer input { width: 100%; max-width: 420px; display: block; }
:focus-visible { outline: 3px solid #d55e00; outline-offset: 1px; }
@media print {
  body { max-width: none; padding: 0; font-size: 10pt; } .viewer { display: none; }
  .scroll { overflow: visible; } img { min-width: 0 !important; }
  h2, h3 { break-after: avoid; } tr, .whole { break-inside: avoid; }
  .badge, .good, .doubt { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""
#: what may be loaded: nothing but what is in the file
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
_PACKAGES = ("torch", "monai", "numpy", "nibabel", "itk", "itk-elastix")


class HTMLPage:
    """A page of a heading and sections, written as one file that needs nothing else.

    Args:
        title: the heading.
    """

    def __init__(self, title: str) -> None:
        self.title, self.parts = title, [f"<h1>{escape(title)}</h1>"]

    def add(self, heading: str, *parts: str, kind: str = "") -> None:
        """Add a section of parts in HTML, none without parts; ``kind``: its class."""
        if any(parts):
            inside = "\n".join(part for part in parts if part)
            opened = f'<section class="{kind}">' if kind else "<section>"
            self.parts.append(f"{opened}\n<h2>{escape(heading)}</h2>\n{inside}\n</section>")

    def add_versions(self) -> None:
        """Add with what the page was made."""
        found = {"monai_deq": __version__}
        for package in _PACKAGES:
            try:
                found[package] = version(package)
            except PackageNotFoundError:
                continue
        found |= {"Python": platform.python_version(), "platform": platform.platform(terse=True)}
        found["written"] = datetime.now().astimezone().isoformat(sep=" ", timespec="minutes")
        self.add("Versions", html_table((), list(found.items())))

    def write(self, path: str | Path, overwrite: bool = False) -> None:
        """Write the page; ``FileExistsError`` for an existing file unless ``overwrite``."""
        self.check(path, overwrite)
        head = (
            '<meta charset="utf-8">\n<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
            f"<title>{escape(self.title)}</title>\n<style>{_CSS}</style>"
        )
        body = "\n".join(self.parts)
        page = f'<!DOCTYPE html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{body}\n</body>\n</html>\n'
        with replace_file(path) as temporary:
            temporary.write_text(page, encoding="utf-8")

    @staticmethod
    def check(path: str | Path, overwrite: bool = False) -> None:
        """Refuse a page that could not be written, before any work."""
        if Path(path).suffix.lower() not in (".html", ".htm"):
            raise ValueError(f"path: expected a name that ends in .html, got {path}.")
        if not overwrite:
            refuse_existing([path], "Replace it with overwrite, or name another path.")


def html_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table; cells are texts, or numbers, which are aligned to the right and are dashes where there is none. A first
    cell may be a tuple of a name and of words about it. Without rows it is empty."""
    if not rows:
        return ""
    head = "".join(f'<th scope="col"{_number(i > 0)}>{escape(text)}</th>' for i, text in enumerate(header))
    lines = [f"<thead><tr>{head}</tr></thead>"] if header else []
    for first, *cells in rows:
        name, words = first if isinstance(first, tuple) else (first, "")
        about = f"<small>{escape(words)}</small>" if words else ""
        line = f'<th scope="row">{escape(str(name))}{about}</th>'
        for cell in cells:
            text = "–" if cell is None else _shown(cell) if isinstance(cell, (int, float)) else str(cell)
            line += f"<td{_number(bool(header) and not isinstance(cell, tuple))}>{escape(text)}</td>"
        lines.append(f"<tr>{line}</tr>")
    return '<div class="scroll"><table>\n' + "\n".join(lines) + "\n</table></div>"


def _number(right: bool) -> str:
    return ' class="number"' if right else ""


def _shown(value: float) -> str:
    """A number in four digits or, before the point, all; no digits behind that of a count."""
    if isinstance(value, (bool, np.bool_)):
        return "yes" if value else "no"
    if value != value:
        return "–"
    if isinstance(value, int) or value == 0 or abs(value) == float("inf"):
        return f"{value:g}" if isinstance(value, float) else str(value)
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:#.4g}"


def html_picture(picture: Figure | str | Path, words: str, least_width: int = 0) -> str:
    """A figure, or the file of a picture, as an image.

    Args:
        picture: the figure, or the path of a PNG or a JPEG.
        words: what is to be seen, for those who do not.
        least_width: pixels; a narrower screen moves along it instead of making it smaller.
    """
    data = Path(picture).read_bytes() if isinstance(picture, (str, Path)) else _compressed(figure_png(picture))
    width, words = f"min-width: {least_width}px", escape(words)
    image = f'<img src="{data_uri(data)}" alt="{words}" style="{width}">'
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{words}">{image}</div>'


def _compressed(png: bytes) -> bytes:
    """The picture as a PNG or as a JPEG, what is smaller."""
    from PIL import Image  # comes with matplotlib

    buffer = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").save(buffer, "JPEG", quality=90, subsampling=0, optimize=True)
    return min(png, buffer.getvalue(), key=len)


def data_uri(data: bytes) -> str:
    """A PNG or a JPEG as an address that holds it; ``ValueError`` for another."""
    for start, kind in ((b"\x89PNG", "png"), (b"\xff\xd8\xff", "jpeg")):
        if data.startswith(start):
            return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
    raise ValueError(f"picture: expected a PNG or a JPEG, got a file that begins with {data[:4]!r}.")


def gray_jpeg(image: np.ndarray, window: tuple[float, float], size: tuple[int, int]) -> bytes:
    """An image ``(rows, columns)`` between black and white as a JPEG of a size (width, height) in pixels."""
    from PIL import Image  # comes with matplotlib

    low, high = window
    values = np.clip((image.astype(np.float32) - low) * (255 / (high - low)), 0, 255).round().astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(values).resize(size, Image.Resampling.BILINEAR).save(buffer, "JPEG", quality=75, optimize=True)
    return buffer.getvalue()


def flattened(settings: Mapping[Any, Any], prefix: str = "") -> dict[str, str]:
    """Settings inside settings by names with points between."""
    flat: dict[str, str] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            flat |= flattened(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = str(value)
    return flat
