# SPDX-License-Identifier: Apache-2.0
"""Figures of a registration: what is drawn where, and that nothing is cut."""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from monai_deq.visualize import RegisteredPair, figure_png, plot_checkerboard, plot_registration, plot_traces
from monai_deq.visualize.pairs import oriented

matplotlib = pytest.importorskip("matplotlib")

NAN = float("nan")
LIA = np.array([[-1.0, 0, 0, 80], [0, 0, 1, -112], [0, -1, 0, 96], [0, 0, 0, 1]])


def ball(size: tuple[int, ...], middle: float = 0.5) -> np.ndarray:
    """A bright ball, its middle at a share of each axis."""
    places = np.meshgrid(*(np.linspace(0, 1, n) - middle for n in size), indexing="ij")
    return np.asarray(sum(p**2 for p in places) < 0.1, dtype=np.float32)


def make_pair(size: tuple[int, ...] = (21, 24, 27), affine: np.ndarray = LIA, **kwargs: Any) -> RegisteredPair:
    images = {"fixed": ball(size), "moving": ball(size, 0.45), "warped": ball(size, 0.49)}
    ddf = np.zeros((len(size), *size), dtype=np.float32)
    return RegisteredPair(**{**images, "ddf": ddf, "affine": affine, **kwargs})


def images(axis: Any) -> list[Any]:
    return [image for image in axis.get_images() if image.get_gid() is None]


@pytest.mark.parametrize("size", [(20, 22), (20, 22, 24)])
def test_a_planted_fold_is_marked(size: tuple[int, ...]) -> None:
    voxel = (9, 12, 11)[: len(size)]
    ddf = np.zeros((len(size), *size), dtype=np.float32)
    # the map turns back along axis 0: its central difference is 1 - 3 / 2 at this voxel, positive elsewhere
    ddf[(0, voxel[0] - 1, *voxel[1:])], ddf[(0, voxel[0] + 1, *voxel[1:])] = 1.5, -1.5
    pair = make_pair(size, np.diag([2.0, 3.0, 4.0, 1.0]), ddf=ddf)
    assert np.argwhere(pair.jacobian <= 0).tolist() == [list(voxel)]
    figure = plot_registration(pair, position=voxel)
    shown = oriented(pair, voxel)
    marked = [image for axis in figure.axes for image in axis.get_images() if image.get_gid() == "folds"]
    assert len(marked) == len(shown.planes)
    for image, plane in zip(marked, shown.planes, strict=True):
        alpha = image.get_array()[..., 3]
        assert alpha.sum() == 1
        # RAS is turned about: a voxel counts from the other end, and the box cuts what is empty
        row, column = np.argwhere(alpha)[0]
        across, down = shown.in_plane(plane)
        assert column == size[across] - 1 - voxel[across] - shown.box[across].start
        assert row == size[down] - 1 - voxel[down] - shown.box[down].start
        red, green, blue = image.get_array()[row, column, :3]
        assert red > 0.9 and green > 0.8 and blue < 0.4  # yellow, which the map of colours has nowhere
    text = " ".join(t.get_text() for t in figure.texts)
    assert f"1 of {math.prod(size)} voxels" in text.replace("\n", " ")
    if len(size) == 3:
        elsewhere = plot_registration(pair, position=(2, 2, 2))
        assert not [i for axis in elsewhere.axes for i in axis.get_images() if i.get_gid() == "folds"]


def test_both_differences_share_one_scale() -> None:
    size = (21, 24, 27)
    pair = make_pair(size, warped=0.8 * ball(size))  # a fifth of the difference is left
    figure = plot_registration(pair)
    axes = figure.axes[:21]
    limits = {
        image.get_clim() for row in range(3) for axis in axes[7 * row + 3 : 7 * row + 5] for image in images(axis)
    }
    assert limits == {(-1.0, 1.0)}  # balls of brightness 1
    windows = {image.get_clim() for row in range(3) for axis in axes[7 * row : 7 * row + 3] for image in images(axis)}
    assert windows == {(0.0, 1.0)}
    before, after = (float(np.abs(images(axes[i])[0].get_array()).sum()) for i in (3, 4))
    assert before > after > 0
    # |J| about 1: as far below as above
    low, high = images(axes[6])[0].get_clim()
    assert low * high == pytest.approx(1) and low < 1


def test_contours_are_where_the_labels_are() -> None:
    size = (40, 44)
    labels = np.zeros(size, dtype=np.int64)
    labels[10:20, 12:30] = 2**60 + 1
    moved = np.zeros_like(labels)
    moved[15:25, 12:30] = 2**60 + 1
    pair = make_pair(size, np.eye(4), fixed_label=labels, moving_label=moved, warped_label=labels)
    figure = plot_registration(pair)
    shown = oriented(pair)

    def boxes(axis: Any) -> list[tuple[float, ...]]:
        found = []
        for lines in axis.collections:
            vertices = np.concatenate([path.vertices for path in lines.get_paths()])
            found.append((*vertices.min(axis=0), *vertices.max(axis=0)))
        return found

    x0, y0 = shown.box[0].start, shown.box[1].start
    # turned about, columns 40 - 20 to 40 - 10 and rows 44 - 30 to 44 - 12, in mm of voxel edges
    fixed = pytest.approx((20 - x0, 14 - y0, 30 - x0, 32 - y0))
    assert boxes(figure.axes[0]) == []
    assert boxes(figure.axes[1]) == [fixed, pytest.approx((15 - x0, 14 - y0, 25 - x0, 32 - y0))]
    assert boxes(figure.axes[2]) == [fixed, fixed]
    styles = [lines.get_linestyle()[0][1] for lines in figure.axes[2].collections]
    assert styles[0] is None and styles[1] is not None  # solid, dashed


def test_the_grid_moves_with_the_field() -> None:
    ddf = np.zeros((2, 40, 40), dtype=np.float32)
    ddf[0] = 2.0
    affine = np.diag([-1.0, -3.0, 1.0, 1.0])  # LPS: as it is drawn
    still, moved = (
        plot_registration(make_pair((40, 40), affine, ddf=d)).axes[5].collections[0] for d in (np.zeros_like(ddf), ddf)
    )
    for before, after in zip(still.get_segments(), moved.get_segments(), strict=True):
        np.testing.assert_allclose(after - before, np.broadcast_to([2.0, 0.0], after.shape), atol=1e-5)


@pytest.mark.parametrize(
    ("size", "spacing"),
    [
        ((16, 16, 16), (1, 1, 1)),
        ((161, 33, 17), (0.5, 0.5, 5)),
        ((64, 64, 5), (0.5, 0.5, 5)),
        ((17, 90), (1, 1, 1)),
        ((8, 240), (1, 1, 1)),
        ((240, 8), (1, 1, 1)),
    ],
)
def test_nothing_is_cut_or_overlaps(size: tuple[int, ...], spacing: tuple[float, ...]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    affine = np.diag([*spacing, 1.0])
    name = "a scan with a very long name " * 4
    labels = ball(size).astype(np.uint8)
    pair = make_pair(
        size, affine, names=(name, name), fixed_label=labels, warped_label=labels, moving=1000 * ball(size)
    )
    for figure in (plot_registration(pair), plot_checkerboard(pair)):
        renderer = FigureCanvasAgg(figure).get_renderer()
        figure.draw(renderer)
        cells = [axis.get_tightbbox(renderer) for axis in figure.axes]
        words = [text.get_window_extent(renderer) for text in figure.texts]
        assert all(b.x0 >= 0 and b.y0 >= 0 and b.x1 <= figure.bbox.x1 and b.y1 <= figure.bbox.y1 for b in cells + words)
        for i, box in enumerate(cells):
            assert not any(box.shrunk(0.98, 0.98).overlaps(other) for other in cells[i + 1 :] + words)
        for axis in figure.axes:
            if axis.get_images():
                left, right = axis.get_xlim()
                bottom, top = axis.get_ylim()
                shape = axis.get_window_extent(renderer)
                assert shape.width / shape.height == pytest.approx((right - left) / (bottom - top), rel=0.02)


def test_long_names_keep_both_ends() -> None:
    figure = plot_registration(make_pair((20, 22), names=("scan_a_" + "x" * 90 + "_0001", "b")))
    text = figure.texts[-1].get_text().replace("\n", " ")
    assert "Moving: scan_a_xx" in text and "x_0001. Fixed: b." in text


def test_a_checkerboard_is_of_both() -> None:
    size = (48, 48)
    pair = make_pair(size, np.eye(4), fixed=np.ones(size) + ball(size), moving=np.ones(size), warped=np.ones(size))
    upper, _ = (images(axis)[0].get_array() for axis in plot_checkerboard(pair).axes)
    assert set(np.unique(upper)) == {1.0, 2.0}
    shown = oriented(pair)
    fixed = shown.cut("fixed", "axial")
    inside = fixed == 2
    share = (upper[inside] == 2).mean()
    assert 0.4 < share < 0.6 and (upper[~inside] == 1).all()
    # a square is of one image
    changes = (np.diff(upper[inside.shape[0] // 2]) != 0).sum()
    assert 2 <= changes <= 8


@pytest.mark.parametrize("energy", [True, False])
def test_traces(energy: bool, tmp_path: Path) -> None:
    record: dict[str, Any] = {"residual_trace": [1.0, 0.1, None], "finish": {"residual_trace": [0.05, 0.01]}}
    if energy:
        record["energy_trace"], record["finish"]["energy_trace"] = [-1.0, -2.0, -2.5], [-3.0, -4.0]
    figure = plot_traces(record, tmp_path / "traces.png", tolerance=1e-3)
    assert (tmp_path / "traces.png").read_bytes().startswith(b"\x89PNG")
    assert len(figure.axes) == 1 + energy
    residual = figure.axes[0]
    assert residual.get_yscale() == "log"
    solve, finish, tolerance = residual.lines
    assert list(solve.get_xdata()) == [1, 2, 3] and list(finish.get_xdata()) == [4, 5]
    assert set(tolerance.get_ydata()) == {1e-3}
    if energy:
        assert [list(line.get_ydata()) for line in figure.axes[1].lines] == [[-1, -2, -2.5], [-3, -4]]
    # as data loaders have them: tensors that are padded to the step limit
    for run in (record, record["finish"]):
        run.update(
            {k: torch.tensor([*(x or NAN for x in v), NAN, NAN]) for k, v in run.items() if k.endswith("_trace")}
        )
        run["steps"] = len(run["residual_trace"]) - 2
    padded = plot_traces(record)
    assert [list(line.get_xdata()) for line in padded.axes[0].lines] == [[1, 2, 3], [4, 5]]
    alone = plot_traces({"residual_trace": [1.0, 0.5], "finish": None})
    assert alone.axes[0].get_legend() is None
    with pytest.raises(ValueError, match="record: expected a residual_trace"):
        plot_traces({"residual_trace": [None], "steps": 0})


def test_a_whole_brain_takes_seconds() -> None:
    pair = make_pair((160, 192, 224))
    start = time.process_time()
    png = figure_png(plot_registration(pair))
    # a bound far above what it takes, that a loop over voxels would break
    assert time.process_time() - start < 60 and len(png) < 2_000_000


def test_files_and_pyplot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = dict(matplotlib.rcParams)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # an import of it fails from now on
    path = tmp_path / "pair.png"
    plot_registration(make_pair((20, 22)), path)
    with pytest.raises(FileExistsError, match=r"pair\.png exists already"):
        plot_registration(make_pair((20, 22)), path)
    assert dict(matplotlib.rcParams) == before and [p.name for p in tmp_path.iterdir()] == ["pair.png"]
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "monai_deq\[figures\]"'):
        plot_checkerboard(make_pair((20, 22)))
