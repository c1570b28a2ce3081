# SPDX-License-Identifier: Apache-2.0
"""The one style of all figures: colours, axes, files."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from monai.utils import optional_import

from monai_deq.utils import refuse_existing, replace_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["COLOURS", "figure_file", "figure_png", "figures_available", "new_figure", "style_axis"]

#: Okabe and Ito's palette, which readers with any common colour blindness tell apart, and a grey
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000", "#999999")
_NEEDED = 'figures need matplotlib: pip install "monai_deq[figures]"'
_DPI = 150


def figures_available(warn: bool = True) -> bool:
    """Whether matplotlib is installed; unless ``warn`` is false it is logged as a warning where it is not."""
    there = optional_import("matplotlib")[1]
    if warn and not there:
        logging.getLogger("monai_deq").warning(f"no figure: {_NEEDED}")
    return there


def new_figure(width: float, height: float, constrained: bool = True) -> Figure:
    """An empty figure, of a size in inches; ``ImportError`` without matplotlib."""
    try:
        # a figure of its own and never pyplot: a caller's backend and open figures stay as they are
        from matplotlib.figure import Figure
    except ImportError as e:
        raise ImportError(_NEEDED) from e
    return Figure(figsize=(width, height), layout="constrained" if constrained else None)


@contextmanager
def figure_file(
    path: str | Path | None,
    width: float,
    height: float,
    overwrite: bool = False,
    constrained: bool = True,
) -> Iterator[Figure]:
    """A figure that is written when the block ends without an exception.

    Args:
        path: the picture, ``.png`` (150 dpi), ``.pdf`` or ``.svg``; ``None``: it is not written.
        width, height: in inches.
        overwrite: replace an existing file, which is ``FileExistsError`` else.
        constrained: let matplotlib keep the parts apart; without, the caller places them.

    Raises:
        ImportError: When matplotlib is not installed.
        ValueError: When the suffix is another.
    """
    if path is None:
        yield new_figure(width, height, constrained)
        return
    path = Path(path)
    if path.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise ValueError(f"path: expected a name that ends in .png, .pdf, .svg, got {path}.")
    if not overwrite:
        refuse_existing([path], "Replace it with overwrite, or name another path.")
    figure = new_figure(width, height, constrained)
    yield figure
    with replace_file(path) as temporary:
        figure.savefig(temporary, dpi=_DPI)


def figure_png(figure: Figure, dpi: float = _DPI) -> bytes:
    """The figure as a PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def style_axis(axis: Any, title: str, size: int = 10, grid: str = "both") -> None:
    """Title, grid and ticks of a diagram."""
    axis.set_title(title, fontsize=size)
    axis.tick_params(labelsize=8)
    axis.grid(axis=grid, color="#DDDDDD", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
