# SPDX-License-Identifier: Apache-2.0
"""Figures of one registration: its images and its field, a checkerboard, the steps of the solver."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from monai_deq.utils import json_ready
from monai_deq.visualize.pairs import PLANES, OrientedPair, RegisteredPair, oriented
from monai_deq.visualize.style import COLOURS, figure_file, style_axis

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_checkerboard", "plot_registration", "plot_traces"]

_FIXED, _OTHER, _GRID, _FOLD = "#56B4E9", "#E69F00", "#D55E00", "#F0E442"
#: symmetric about their middle, and told apart with any common colour blindness
_DIVERGING = "RdBu_r"
#: lines of a deformation grid, and squares of a checkerboard, along the shorter side
_LINES, _SQUARES = 20, 6
#: of a row or a column, inches: its letters find room
_SMALLEST = 0.55
#: of a row, inches
_LARGEST = 3.5


def plot_registration(
    pair: RegisteredPair,
    path: str | Path | None = None,
    overwrite: bool = False,
    position: Sequence[int] | None = None,
) -> Figure:
    """
    Draw the images, what is left of their difference, the field as a grid and its Jacobian determinant with every
    folded voxel (``|J| <= 0``) marked; three planes of a volume, a row each (paper, Fig. 4). Both differences share one
    scale. Over the moving and the warped image lie the contours of their labels and of the fixed ones.

    Args:
        pair: the pair.
        path, overwrite: see :py:func:`figure_file`; the figure is given back whether or not it is written.
        position: voxel of the fixed scan that the planes go through. Defaults to ``None``: where there is most to see.
    """
    shown = oriented(pair, position)
    sizes = [shown.extent(plane) for plane in shown.planes]
    column = 1.75 if len(sizes) > 1 else 2.2
    scale = min(column / max(width for width, _ in sizes), _LARGEST / max(height for _, height in sizes))
    column = max(scale * max(width for width, _ in sizes), 1.1)  # its title finds room
    heights = [max(height * scale, _SMALLEST) for _, height in sizes]
    arrays = {name: np.asarray(shown.arrays[name], dtype=np.float32) for name in ("fixed", "moving", "warped")}
    differences = [arrays["moving"] - arrays["fixed"], arrays["warped"] - arrays["fixed"]]
    shown.arrays.update(before=differences[0], after=differences[1])
    strongest = max(_strongest(d) for d in differences) or 1.0
    jacobian = shown.arrays["jacobian"]
    logs = np.abs(np.log(jacobian[jacobian > 0][:: max(1, jacobian.size // 400_000)]))
    span = math.exp(min(max(float(np.percentile(logs, 99.5)) if logs.size else 0.0, math.log(1.1)), math.log(10)))
    folds = int((jacobian <= 0).sum())

    lines = textwrap.wrap(_words(pair, shown, folds), int(7 * column * 15))
    below = 0.6 + 0.15 * len(lines)
    with _cells(path, overwrite, [column] * 7, heights, below) as (figure, axes):
        for row, plane in zip(axes, shown.planes, strict=True):
            for axis, name in zip(row[:3], ("fixed", "moving", "warped"), strict=True):
                _image(axis, shown, plane, shown.cut(name, plane), cmap="gray", limits=shown.window)
                if name != "fixed" and {"fixed_label", f"{name}_label"} <= set(shown.arrays):
                    _contours(axis, shown, plane, "fixed_label", _FIXED, "solid")
                    _contours(axis, shown, plane, f"{name}_label", _OTHER, "dashed")
            _letters(row[0], plane)
            row[0].set_ylabel(plane, fontsize=9)
            for axis, name in zip(row[3:5], ("before", "after"), strict=True):
                limits = (-strongest, strongest)
                difference = _image(axis, shown, plane, shown.cut(name, plane), cmap=_DIVERGING, limits=limits)
            _grid(row[5], shown, plane)
            determinant = _jacobian(row[6], shown, plane, span)
        titles = ("fixed", "moving", "warped", "moving − fixed", "warped − fixed", "deformation", "Jacobian |J|")
        for axis, title in zip(axes[0], titles, strict=True):
            axis.set_title(title, fontsize=9, pad=4)
        for image, first, last in ((difference, 3, 4), (determinant, 6, 6)):
            left, right = (axes[-1][i].get_position(original=True) for i in (first, last))
            inch = 1 / figure.get_figheight()
            place = (
                left.x0 + 0.05 * left.width,
                left.y0 - 0.2 * inch,
                right.x1 - left.x0 - 0.1 * left.width,
                0.08 * inch,
            )
            bar = figure.colorbar(image, cax=figure.add_axes(place), orientation="horizontal", extend="both")
            bar.ax.tick_params(labelsize=7)
        bar.set_ticks([1 / span, 1, span], labels=[f"{v:.2g}" for v in (1 / span, 1, span)])
        bar.minorticks_off()
        # a name may have a $
        words: dict[str, Any] = {
            "s": "\n".join(lines),
            "ha": "center",
            "va": "bottom",
            "fontsize": 8,
            "parse_math": False,
        }
        figure.text(0.5, 0.06 / figure.get_figheight(), **words)
    return figure


def plot_checkerboard(pair: RegisteredPair, path: str | Path | None = None, overwrite: bool = False) -> Figure:
    """
    Draw the fixed image and the other in turn on the squares of a board: edges that go on across them are aligned.

    Args:
        pair: the pair; before the registration above, after it below, one column a plane.
        path, overwrite: see :py:func:`plot_registration`.
    """
    shown = oriented(pair)
    sizes = [shown.extent(plane) for plane in shown.planes]
    scale = min(2.9 / max(width for width, _ in sizes), _LARGEST / max(height for _, height in sizes))
    height = max(max(height for _, height in sizes) * scale, _SMALLEST)
    widths = [max(width * scale, _SMALLEST) for width, _ in sizes]
    with _cells(path, overwrite, widths, [height, height], 0.1) as (figure, axes):
        for row, name, title in zip(axes, ("moving", "warped"), ("before", "after"), strict=True):
            for axis, plane in zip(row, shown.planes, strict=True):
                fixed, other = (shown.cut(key, plane).astype(np.float32) for key in ("fixed", name))
                board = np.where(_squares(shown, plane), fixed, other)
                _image(axis, shown, plane, board, cmap="gray", limits=shown.window)
                _letters(axis, plane)
            row[0].set_ylabel(title, fontsize=9)
        for axis, plane in zip(axes[0], shown.planes, strict=True):
            axis.set_title(plane, fontsize=9, pad=4)
    return figure


def plot_traces(
    record: Mapping[str, Any], path: str | Path | None = None, overwrite: bool = False, tolerance: float | None = None
) -> Figure:
    """
    Draw the residual of each step, and the energy where there is one; a finish goes on behind the solve.

    Args:
        record: what :py:meth:`monai_deq.solvers.SolverRecord.item` gives; ``ValueError`` when it has no residual.
        path, overwrite: see :py:func:`plot_registration`.
        tolerance: residual at which a pair is at rest, a line. Defaults to ``None``: none.
    """
    record = json_ready(record)
    runs = [record, *([record["finish"]] if record.get("finish") else [])]
    traces = {key: [_trace(run, key) for run in runs] for key in ("residual_trace", "energy_trace")}
    if not any(np.isfinite(trace).any() for trace in traces["residual_trace"]):
        raise ValueError("record: expected a residual_trace with numbers, as SolverRecord.item gives it; got none.")
    with_energy = any(np.isfinite(trace).any() for trace in traces["energy_trace"])
    with figure_file(path, 7.4 if with_energy else 4.2, 2.9, overwrite) as figure:
        axes = figure.subplots(1, 1 + with_energy, squeeze=False)[0]
        titles = ("residual_trace", "residual (voxel)"), ("energy_trace", "energy")
        for axis, (key, title) in zip(axes, titles, strict=False):
            start = 0
            for run, trace, colour, label in zip(runs, traces[key], COLOURS, ("solve", "finish"), strict=False):
                values = np.where(trace > 0, trace, np.nan) if key == "residual_trace" else trace
                style = "o-" if len(values) < 60 else "-"
                steps = start + np.arange(1, len(values) + 1)
                axis.plot(steps, values, style, color=colour, markersize=3, linewidth=1.4, label=label)
                start += len(_trace(run, "residual_trace"))
            style_axis(axis, title, 9)
            axis.set_xlabel("steps at full size", fontsize=8)
            axis.xaxis.get_major_locator().set_params(integer=True)
        axes[0].set_yscale("log")
        if tolerance is not None and tolerance > 0:
            axes[0].axhline(tolerance, color="#444444", linestyle="--", linewidth=1, label="tolerance")
        if axes[0].get_legend_handles_labels()[1] != ["solve"]:
            axes[0].legend(fontsize=7, frameon=False)
    return figure


@contextmanager
def _cells(
    path: str | Path | None, overwrite: bool, widths: Sequence[float], heights: Sequence[float], below: float
) -> Iterator[tuple[Figure, list[list[Any]]]]:
    """A figure with axes of these sizes in inches, row by row, and room for titles above and more below."""
    left, top, gap = 0.3, 0.3, 0.07
    width, height = left + sum(widths) + gap * len(widths), top + sum(heights) + gap * len(heights) + below
    with figure_file(path, width, height, overwrite, constrained=False) as figure:
        axes, y = [], height - top
        for h in heights:
            x, row = left, []
            for w in widths:
                row.append(figure.add_axes((x / width, (y - h) / height, w / width, h / height)))
                x += w + gap
            axes.append(row)
            y -= h + gap
        yield figure, axes


def _trace(run: Mapping[str, Any], key: str) -> np.ndarray:
    # to put records together, data loaders have traces as long as the step limit
    values = (run.get(key) or ())[: run.get("steps")]
    return np.array([np.nan if value is None else value for value in values], dtype=float)


def _strongest(difference: np.ndarray) -> float:
    """Of the differences that are there, a high percentile: a background has none."""
    size = np.abs(difference.ravel()[:: max(1, difference.size // 400_000)])
    size = size[size > 0]
    return float(np.percentile(size, 99)) if size.size else 0.0


def _words(pair: RegisteredPair, shown: OrientedPair, folds: int) -> str:
    moving, fixed = (name if len(name) <= 60 else f"{name[:29]}…{name[-30:]}" for name in pair.names)
    words = [f"Moving: {moving}. Fixed: {fixed}."]
    if len(shown.planes) > 1:
        words.append(f"Planes through voxel ({', '.join(map(str, shown.voxel))}) of the fixed scan.")
    if "fixed_label" in shown.arrays and {"moving_label", "warped_label"} & set(shown.arrays):
        words.append("Contours of labels: fixed blue, moving or warped orange and dashed.")
    if shown.own_windows:
        words.append("Moving and fixed image in other units: each scaled to its own window, 0 to 1.")
    total = pair.jacobian.size
    share = f"yellow with a black edge: {folds} of {total} voxels, {100 * folds / total:.3g} %" if folds else "none"
    words.append(f"Folded (|J| ≤ 0): {share}.")
    return " ".join(words)


def _image(axis: Any, shown: OrientedPair, plane: str, image: np.ndarray, **kwargs: Any) -> Any:
    """An image in mm, without ticks."""
    width, height = shown.extent(plane)
    if "limits" in kwargs:
        kwargs["vmin"], kwargs["vmax"] = kwargs.pop("limits")
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)
    return axis.imshow(image, extent=(0, width, height, 0), **kwargs)


def _letters(axis: Any, plane: str) -> None:
    """Where the patient's right, left, front, back, head and feet are."""
    from matplotlib.patheffects import withStroke

    sides = ((0.02, 0.5, "left", "center"), (0.98, 0.5, "right", "center"))
    places = (*sides, (0.5, 0.98, "center", "top"), (0.5, 0.02, "center", "bottom"))
    for letter, (x, y, across, up) in zip(PLANES[plane][1], places, strict=True):
        effects = [withStroke(linewidth=1.5, foreground="black")]
        place = {"transform": axis.transAxes, "ha": across, "va": up, "path_effects": effects}
        axis.text(x, y, letter, fontsize=7, color="white", **place)


def _centres(shown: OrientedPair, plane: str, rim: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Where the centres of a plane's voxels lie, and of a rim around them, across and down, mm."""
    counts = {a: shown.box[a].stop - shown.box[a].start for a in shown.in_plane(plane)}
    x, y = ((np.arange(-rim, n + rim) + 0.5) * shown.spacing[a] for a, n in counts.items())
    return x, y


def _contours(axis: Any, shown: OrientedPair, plane: str, name: str, colour: str, style: str) -> None:
    labels = np.pad(shown.cut(name, plane), 1)  # so that contours close at the border
    across, down = _centres(shown, plane, rim=1)
    for label in np.unique(labels[labels != 0]):
        inside = labels == label
        y, x = (slice(i.min() - 1, i.max() + 2) for i in np.nonzero(inside))
        part = inside[y, x].astype(np.float32)
        axis.contour(across[x], down[y], part, levels=[0.5], colors=colour, linewidths=0.7, linestyles=style)


def _grid(axis: Any, shown: OrientedPair, plane: str) -> None:
    """The lines of a regular grid, displaced, over a pale fixed image."""
    from matplotlib.collections import LineCollection

    low, high = shown.window
    _image(axis, shown, plane, shown.cut("fixed", plane), cmap="gray_r", limits=(low, low + 3 * (high - low)))
    across, down = shown.in_plane(plane)
    box: list[Any] = list(shown.box)
    box[PLANES[plane][0]] = shown.position[PLANES[plane][0]]
    moved = [shown.arrays["ddf"][(axis_, *box)].T * shown.spacing[axis_] for axis_ in (across, down)]
    x, y = np.meshgrid(*_centres(shown, plane))
    points = np.stack([x + moved[0], y + moved[1]], axis=-1)
    apart = min(shown.extent(plane)) / _LINES
    steps = [max(1, round(apart / shown.spacing[a])) for a in (across, down)]
    lines = [*points[:: steps[1]], *points[:, :: steps[0]].swapaxes(0, 1)]
    axis.add_collection(LineCollection(lines, colors=_GRID, linewidths=0.6), autolim=False)


def _jacobian(axis: Any, shown: OrientedPair, plane: str, span: float) -> Any:
    """The determinant about 1, and folded voxels in yellow with a black edge."""
    from matplotlib.colors import LogNorm, to_rgba

    jacobian = shown.cut("jacobian", plane)
    folded = jacobian <= 0
    image = _image(
        axis, shown, plane, np.ma.masked_where(folded, jacobian), cmap=_DIVERGING, norm=LogNorm(1 / span, span)
    )
    if folded.any():
        marks = np.zeros((*folded.shape, 4))
        marks[folded] = to_rgba(_FOLD)
        _image(axis, shown, plane, marks, interpolation="nearest").set_gid("folds")
        if min(folded.shape) > 1:
            edge = np.pad(folded, 1).astype(np.float32)
            x, y = _centres(shown, plane, rim=1)
            axis.contour(x, y, edge, levels=[0.5], colors="black", linewidths=0.6)
            width, height = shown.extent(plane)
            axis.set(xlim=(0, width), ylim=(height, 0))
    return image


def _squares(shown: OrientedPair, plane: str) -> np.ndarray:
    """Where a checkerboard shows the fixed image."""
    side = min(shown.extent(plane)) / _SQUARES
    # of thick slices a square has one at least
    x, y = (
        np.floor(c / max(side, shown.spacing[a])).astype(int)
        for c, a in zip(_centres(shown, plane), shown.in_plane(plane), strict=True)
    )
    return np.asarray((x[None] + y[:, None]) % 2 == 0)
