# SPDX-License-Identifier: Apache-2.0
"""Curves of scores over the number of steps (paper, Fig. 1 and Fig. 3)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from monai_deq.evaluation.step_table import PANELS, StepCurve, measured_panels
from monai_deq.utils import as_flag, refuse_existing, replace_file

__all__ = ["step_plots"]

#: an iteration that diverges goes on to 1e30 voxels, and nothing would be seen of the others
_LARGEST = 100.0
#: below lies the rounding of float32
_SMALLEST = 1e-6
#: Okabe and Ito's palette, and a grey
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000", "#999999")


def step_plots(
    curves: Mapping[str, Mapping[str, StepCurve]],
    trained_steps: Mapping[str, int],
    path: str | Path,
    overwrite: bool = False,
) -> Path:
    """
    Draw one panel a score: the mean over the pairs with a band of one standard error (of a residual or a distance the
    median, between 1e-6 and 100 voxels), on a logarithmic axis of steps; a dot at the steps trained with, a triangle at
    the best Dice.

    Args:
        curves: by title of a method, by name of a score, its curve.
        trained_steps: by title, the steps that the method was trained with.
        path: the picture, ``.png`` (150 dpi), ``.pdf`` or ``.svg``.
        overwrite: replace an existing file. Defaults to ``False``.

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
        # a figure of its own and never pyplot: a caller's backend and open figures stay as they are
        from matplotlib.figure import Figure
    except ImportError as e:
        raise ImportError('Curves need matplotlib: pip install "monai_deq[figures]"') from e

    panels = measured_panels(curves)
    columns = max(math.ceil(len(panels) / 2), 1)
    figure = Figure(figsize=(4.7 * columns, 6.0), layout="constrained")
    axes: Sequence = figure.subplots(2, columns, squeeze=False).flatten().tolist()
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    for axis, key in zip(axes, panels, strict=False):
        title, scale, logarithmic = PANELS[key]
        for i, (method, scores) in enumerate(curves.items()):
            curve, colour = scores[key], COLOURS[i % len(COLOURS)]
            # residuals lie on a logarithmic axis and far apart: their median
            steps, mean = np.asarray(curve.steps), scale * np.asarray(curve.median if logarithmic else curve.mean)
            error = scale * np.asarray(curve.std) / math.sqrt(max(curve.pairs, 1))
            axis.plot(steps, mean, color=colour, linewidth=1.4, label=method)
            if not logarithmic:
                axis.fill_between(steps, mean - error, mean + error, color=colour, alpha=0.15, linewidth=0)
            for step, marker in ((trained_steps.get(method), "o"), (scores["dice"].best, "^")):
                if step in curve.steps:
                    at = curve.steps.index(step)
                    axis.plot(steps[at], mean[at], marker=marker, markersize=6, color=colour, markeredgecolor="white")
        axis.set_xscale("log")
        if logarithmic:
            axis.set_yscale("log")
            bottom, top = axis.get_ylim()
            axis.set_ylim(max(bottom, _SMALLEST), min(top, _LARGEST))
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("steps", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(color="#DDDDDD", linewidth=0.6)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    axes[0].legend(fontsize=7, frameon=False)
    figure.supxlabel(
        "Mean over the pairs with a band of one standard error; on logarithmic axes the median. "
        "Dot: steps of the training. Triangle: best Dice.",
        fontsize=7,
    )
    with replace_file(path) as temporary:
        figure.savefig(temporary, dpi=150)
    return path
