# SPDX-License-Identifier: Apache-2.0
"""Memory, or time, over the number of steps (paper, Fig. 2c) or of voxels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from monai_deq.evaluation.step_plots import COLOURS
from monai_deq.utils import as_flag, refuse_existing, replace_file

__all__ = ["memory_plot"]


def memory_plot(
    points: Mapping[str, Sequence[tuple[int, float]]],
    title: str,
    path: str | Path,
    overwrite: bool = False,
    x_label: str = "steps",
) -> Path:
    """
    Draw a line for each system, and one across the figure for a system of one step.

    Args:
        points: by title of a system, its steps with the memory, or what else is drawn over what else; one that is not
            finite is left out.
        title: of the figure, with the unit.
        path: the picture, ``.png`` (150 dpi), ``.pdf`` or ``.svg``.
        overwrite: replace an existing file. Defaults to ``False``.
        x_label: of the horizontal axis. Defaults to ``"steps"``.

    Returns:
        the picture's path.

    Raises:
        FileExistsError: When the file exists and ``overwrite`` is not set.
        ImportError: When matplotlib is not installed.
    """
    path = Path(path)
    if not as_flag(overwrite, "overwrite"):
        refuse_existing([path], "Replace it with overwrite true, or name another path.")
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise ImportError('The figure needs matplotlib: pip install "monai_deq[figures]"') from e
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axis = figure.subplots()
    for i, (name, values) in enumerate(points.items()):
        colour = COLOURS[i % len(COLOURS)]
        finite = [(n, v) for n, v in values if math.isfinite(v)]
        if len(finite) == 1 and finite[0][0] == 1:
            axis.axhline(finite[0][1], color=colour, linewidth=1.2, linestyle="--" if i else ":", label=name)
        elif finite:
            axis.plot(*zip(*finite, strict=True), color=colour, linewidth=1.4, marker="o", markersize=4, label=name)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_title(title, fontsize=10)
    axis.set_xlabel(x_label, fontsize=8)
    axis.tick_params(labelsize=8)
    axis.grid(color="#DDDDDD", linewidth=0.6)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    if points:
        axis.legend(fontsize=7, frameon=False)
    with replace_file(path) as temporary:
        figure.savefig(temporary, dpi=150)
    return path
