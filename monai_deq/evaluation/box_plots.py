# SPDX-License-Identifier: Apache-2.0
"""Box plots of the scores of several methods, one panel a metric."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from monai_deq.evaluation.method_results import MethodResult, MetricColumn, common_pairs, metric_columns
from monai_deq.utils import as_flag, refuse_existing, replace_file

__all__ = ["box_plots"]

# Okabe and Ito's palette, which readers with any common colour blindness tell apart; without black, and lightened by
# 40 % so that the median shows
_COLOURS = ("#66AAD1", "#F0C566", "#66C5AB", "#E0AFCA", "#E69E66", "#9AD2F2", "#F6EF8E")
_UNRANKED = "#CCCCCC"
_SUFFIXES = (".png", ".pdf", ".svg")


def box_plots(
    results: Sequence[MethodResult],
    metrics: Sequence[str | MetricColumn],
    path: str | Path,
    overwrite: bool = False,
) -> Path:
    """
    Draw the scores over the pairs: one panel a metric, one box a method (quartiles and median, whiskers to the last
    score within 1.5 times the box, further ones as points) and its mean as a dot. A method that failed or lacks a
    metric says so in place of its box; methods that are not ranked are grey.

    Args:
        results: the methods from top to bottom.
        metrics: the panels: keys of :py:data:`monai_deq.evaluation.method_results.METRIC_COLUMNS`, or columns of your
            own.
        path: the picture, ``.png`` (150 dpi), ``.pdf`` or ``.svg``.
        overwrite: replace an existing file. Defaults to ``False``.

    Returns:
        the picture's path.

    Raises:
        FileExistsError: When the file exists and ``overwrite`` is not set.
        ImportError: When matplotlib is not installed.
        ValueError: When the suffix is another, methods were scored on different pairs, or a name repeats or is unknown.
    """
    path = Path(path)
    if path.suffix.lower() not in _SUFFIXES:
        raise ValueError(f"path: expected a name that ends in {', '.join(_SUFFIXES)}, got {path}.")
    if not as_flag(overwrite, "overwrite"):
        refuse_existing([path], "Replace it with overwrite true, or name another path.")
    columns = metric_columns(metrics)
    pairs = common_pairs(results)
    try:
        # a figure of its own and never pyplot: a caller's backend and open figures stay as they are
        from matplotlib.figure import Figure
    except ImportError as e:
        raise ImportError('Box plots need matplotlib: pip install "monai_deq[figures]"') from e

    across = min(len(columns), 4) if len(columns) != 5 else 3
    down = math.ceil(len(columns) / across)
    figure = Figure(figsize=(1.3 + 1.75 * across, (0.75 + 0.27 * len(results)) * down + 0.25), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False, sharey=True).flatten().tolist()
    colours = {result.name: _UNRANKED for result in results if not result.ranked}
    ranked = [result.name for result in results if result.ranked]
    colours |= {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(ranked)}
    for axis, column in zip(axes, columns, strict=False):
        for row, result in enumerate(results):
            scores = [] if result.failure is not None else list(result.scores.get(column.key, {}).values())
            values = [column.scale * score for score in scores if math.isfinite(score)]
            if not values:
                word = "no score" if result.failure is None else "failed"
                # at the left edge, whatever the scale of the axis
                axis.text(
                    0.03,
                    row,
                    word,
                    transform=axis.get_yaxis_transform(),
                    va="center",
                    fontsize=7,
                    style="italic",
                    color="#666666",
                )
                continue
            axis.boxplot(
                values,
                positions=[row],
                orientation="horizontal",
                widths=0.62,
                patch_artist=True,
                showmeans=True,
                manage_ticks=False,
                boxprops={"facecolor": colours[result.name], "edgecolor": "black", "linewidth": 0.7},
                medianprops={"color": "black", "linewidth": 1.2},
                whiskerprops={"linewidth": 0.7},
                capprops={"linewidth": 0.7},
                meanprops={"marker": "o", "markersize": 3.5, "markerfacecolor": "white", "markeredgecolor": "black"},
                flierprops={"marker": "o", "markersize": 2, "markerfacecolor": "#444444", "markeredgecolor": "none"},
            )
        axis.set_title(column.title, fontsize=9)
        axis.set_yticks(range(len(results)), [result.title for result in results], fontsize=8)
        # the first method on top
        axis.set_ylim(len(results) - 0.4, -0.6)
        axis.tick_params(axis="x", labelsize=7)
        axis.tick_params(axis="y", length=0)
        axis.locator_params(axis="x", nbins=5, steps=[1, 2, 5, 10])
        axis.grid(axis="x", color="#DDDDDD", linewidth=0.6)
        axis.set_axisbelow(True)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    for axis in axes[len(columns) :]:
        axis.remove()
    words = [
        f"Box: median and quartiles, n = {len(pairs)} pairs.",
        "White dot: mean.",
        "Whiskers: within 1.5 box lengths.",
    ]
    figure.supxlabel((" " if across > 2 else "\n").join(words), fontsize=7, color="#444444")
    with replace_file(path) as temporary:
        figure.savefig(temporary, dpi=150)
    return path
