# SPDX-License-Identifier: Apache-2.0
"""Figures, all in one style: boxes of scores, curves over steps, lines of memory or time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from monai_deq.evaluation.scores import MethodResult, MetricColumn, common_pairs, finite_scores, metric_columns
from monai_deq.visualize import COLOURS, figure_file, style_axis

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["PANELS", "plot_boxes", "plot_lines", "plot_steps"]

#: the palette without black, lightened by 40 % so that a median shows
_LIGHT = ("#66AAD1", "#F0C566", "#66C5AB", "#E0AFCA", "#E69E66", "#9AD2F2", "#F6EF8E")
_UNRANKED = "#CCCCCC"
#: an iteration that diverges goes on to 1e30 voxels, and nothing would be seen of the others; below lies rounding
_LARGEST, _SMALLEST = 100.0, 1e-6

#: scores that are drawn over the steps: title, factor, whether the axis is logarithmic
PANELS: dict[str, tuple[str, float, bool]] = {
    "dice": ("Dice (%)", 100.0, False),
    "folded_percent": ("folded voxels (%)", 1.0, False),
    "similarity": ("local cross-correlation", 1.0, False),
    "residual": ("residual (voxel)", 1.0, True),
    "start_distance": ("distance from a random start's (voxel)", 1.0, True),
}
_BOX: dict[str, Any] = {
    "orientation": "horizontal",
    "widths": 0.62,
    "patch_artist": True,
    "showmeans": True,
    "manage_ticks": False,
    "medianprops": {"color": "black", "linewidth": 1.2},
    "whiskerprops": {"linewidth": 0.7},
    "capprops": {"linewidth": 0.7},
    "meanprops": {"marker": "o", "markersize": 3.5, "markerfacecolor": "white", "markeredgecolor": "black"},
    "flierprops": {"marker": "o", "markersize": 2, "markerfacecolor": "#444444", "markeredgecolor": "none"},
}


def plot_boxes(
    results: Sequence[MethodResult],
    metrics: Sequence[str | MetricColumn],
    path: str | Path | None = None,
    overwrite: bool = False,
) -> Figure:
    """
    Draw the scores over the pairs: one panel a metric, one box a method (whiskers to the last score within 1.5 times
    the box, further ones as points) and its mean as a dot. A method that failed or lacks a metric says so in place of
    its box; methods that are not ranked are grey.

    Args:
        results: the methods from top to bottom.
        metrics: the panels: keys of :py:data:`monai_deq.evaluation.METRIC_COLUMNS`, or columns of your own.
        path: the picture, ``.png`` (150 dpi), ``.pdf`` or ``.svg``. Defaults to ``None``: none.
        overwrite: replace an existing file, which is ``FileExistsError`` else.

    Raises:
        ImportError: When matplotlib is not installed.
        ValueError: When the suffix is another, methods were scored on different pairs, or a name repeats or is unknown.
    """
    columns, pairs = metric_columns(metrics), common_pairs(results)
    across = min(len(columns), 4) if len(columns) != 5 else 3
    down = math.ceil(len(columns) / across)
    ranked = [result.name for result in results if result.ranked]
    colours = {name: _LIGHT[i % len(_LIGHT)] for i, name in enumerate(ranked)}
    with figure_file(path, 1.3 + 1.75 * across, (0.75 + 0.27 * len(results)) * down + 0.25, overwrite) as figure:
        axes = figure.subplots(down, across, squeeze=False, sharey=True).flatten().tolist()
        for axis, column in zip(axes, columns, strict=False):
            for row, result in enumerate(results):
                scores = finite_scores(result.scores.get(column.key, pd.Series(dtype=float)))
                if result.failure is not None or scores.empty:
                    # at the left edge, whatever the scale of the axis
                    place = {"transform": axis.get_yaxis_transform(), "va": "center"}
                    word = "no score" if result.failure is None else "failed"
                    axis.text(0.03, row, word, **place, fontsize=7, style="italic", color="#666666")
                    continue
                face = {"facecolor": colours.get(result.name, _UNRANKED), "edgecolor": "black", "linewidth": 0.7}
                axis.boxplot(column.scale * scores.to_numpy(), positions=[row], boxprops=face, **_BOX)
            style_axis(axis, column.title, 9, grid="x")
            axis.set_yticks(range(len(results)), [result.title for result in results])
            axis.set_ylim(len(results) - 0.4, -0.6)  # the first method on top
            axis.tick_params(axis="x", labelsize=7)
            axis.tick_params(axis="y", length=0)
            axis.locator_params(axis="x", nbins=5, steps=[1, 2, 5, 10])
        for axis in axes[len(columns) :]:
            axis.remove()
        count = f"Box: median and quartiles, n = {len(pairs)} pairs."
        words = (" " if across > 2 else "\n").join([count, "White dot: mean.", "Whiskers: within 1.5 box lengths."])
        figure.supxlabel(words, fontsize=7, color="#444444")
    return figure


def plot_steps(
    curves: Mapping[str, pd.DataFrame], trained_steps: Mapping[str, int], path: str | Path, overwrite: bool = False
) -> None:
    """
    Draw one panel a score: the mean over the pairs with a band of one standard error (of a residual or a distance the
    median, between 1e-6 and 100 voxels), on a logarithmic axis of steps; a dot at the steps trained with, a triangle at
    the best Dice. Scores that no method has, such as the distance from a random start, have no panel.

    Args:
        curves: by title of a method what :py:func:`monai_deq.evaluation.step_curves` gives.
        trained_steps: by title, the steps that the method was trained with.
        path, overwrite: see :py:func:`plot_boxes`.
    """
    panels = [name for name in PANELS if any(c[name, "mean"].notna().any() for c in curves.values())]
    columns = max(math.ceil(len(panels) / 2), 1)
    with figure_file(path, 4.7 * columns, 6.0, overwrite) as figure:
        axes: Sequence[Any] = figure.subplots(2, columns, squeeze=False).flatten().tolist()
        for axis in axes[len(panels) :]:
            axis.set_axis_off()
        for axis, key in zip(axes, panels, strict=False):
            title, scale, logarithmic = PANELS[key]
            for i, (method, of_method) in enumerate(curves.items()):
                curve, colour = scale * of_method[key], COLOURS[i % len(COLOURS)]
                # residuals lie on a logarithmic axis and far apart: their median
                drawn = curve["median" if logarithmic else "mean"]
                axis.plot(drawn.index, drawn, color=colour, linewidth=1.4, label=method)
                if not logarithmic:
                    low, high = drawn - curve["sem"], drawn + curve["sem"]
                    axis.fill_between(drawn.index, low, high, color=colour, alpha=0.15, linewidth=0)
                for step, marker in ((trained_steps.get(method), "o"), (best_step(of_method), "^")):
                    if step in drawn.index:
                        axis.plot(step, drawn[step], marker, markersize=6, color=colour, markeredgecolor="white")
            axis.set_xscale("log")
            if logarithmic:
                axis.set_yscale("log")
                bottom, top = axis.get_ylim()
                axis.set_ylim(max(bottom, _SMALLEST), min(top, _LARGEST))
            style_axis(axis, title)
            axis.set_xlabel("steps", fontsize=8)
        axes[0].legend(fontsize=7, frameon=False)
        words = "Mean over the pairs with a band of one standard error; on logarithmic axes the median. "
        figure.supxlabel(f"{words}Dot: steps of the training. Triangle: best Dice.", fontsize=7)


def best_step(curves: pd.DataFrame) -> int:
    """Steps of a method's best mean Dice, the first where there is none."""
    dice = curves["dice", "mean"]
    return int(dice.idxmax() if dice.notna().any() else dice.index[0])


def plot_lines(
    lines: Mapping[str, pd.Series], title: str, path: str | Path, overwrite: bool = False, x_label: str = "steps"
) -> None:
    """
    Draw a line for each system on logarithmic axes, and one across the figure for a system of one step alone.

    Args:
        lines: by title of a system its memory or time, indexed by steps or voxels; what is not finite is left out.
        title: of the figure, with the unit.
        path, overwrite: see :py:func:`plot_boxes`.
        x_label: of the horizontal axis.
    """
    with figure_file(path, 6.4, 4.2, overwrite) as figure:
        axis = figure.subplots()
        for i, (name, line) in enumerate(lines.items()):
            colour, finite = COLOURS[i % len(COLOURS)], finite_scores(line)
            if finite.index.to_list() == [1]:
                axis.axhline(finite.iloc[0], color=colour, linewidth=1.2, linestyle="--" if i else ":", label=name)
            elif len(finite):
                axis.plot(finite.index, finite, "o-", color=colour, linewidth=1.4, markersize=4, label=name)
        axis.set_xscale("log")
        axis.set_yscale("log")
        style_axis(axis, title)
        axis.set_xlabel(x_label, fontsize=8)
        if axis.lines:
            axis.legend(fontsize=7, frameon=False)
