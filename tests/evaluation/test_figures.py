# SPDX-License-Identifier: Apache-2.0
"""Figures: what is drawn where, and that nothing of matplotlib's global state is touched."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from monai_deq.evaluation import MethodResult, plot_boxes, plot_lines

matplotlib = pytest.importorskip("matplotlib")

NAN = float("nan")
PAIRS = pd.MultiIndex.from_tuples([("a", "b"), ("b", "c"), ("c", "d"), ("d", "a")], names=["fixed", "moving"])
RESULTS = [
    MethodResult("start", "Affine", pd.DataFrame({"dice": [0.5, 0.6, 0.7, 0.8]}, PAIRS), ranked=False),
    MethodResult("bad", "RIIR", failure="no memory"),
    MethodResult(
        "deq", "DEQReg", pd.DataFrame({"dice": [0.7, 0.8, NAN, 0.9], "folded_percent": [0.0, 0.1, 0.2, 0.7]}, PAIRS)
    ),
]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are saved."""
    from matplotlib.figure import Figure

    figures: list[Any] = []
    save = Figure.savefig

    def keep(figure: Figure, *args: Any, **kwargs: Any) -> None:
        figures.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def test_boxes_means_and_words(tmp_path: Path, drawn: list[Any]) -> None:
    path = tmp_path / "new" / "boxes.png"
    plot_boxes(RESULTS, ["dice", "folded_percent"], path)
    dice, folds = drawn[0].axes
    assert (dice.get_title(), folds.get_title()) == ("Dice (%) ↑", "Folded (%) ↓")
    assert [t.get_text() for t in dice.get_yticklabels()] == ["Affine", "RIIR", "DEQReg"]
    top, bottom = dice.get_ylim()
    assert top > bottom  # the first method on top
    assert [(t.get_text(), t.get_position()[1]) for t in dice.texts] == [("failed", 1)]
    assert [(t.get_text(), t.get_position()[1]) for t in folds.texts] == [("no score", 0), ("failed", 1)]

    def means(axis: Any) -> list[tuple[float, float]]:
        dots = [line for line in axis.lines if line.get_markerfacecolor() == "white"]
        return [(line.get_xdata()[0], line.get_ydata()[0]) for line in dots]

    assert means(dice) == [pytest.approx((65.0, 0)), pytest.approx((80.0, 2))]
    assert means(folds) == [pytest.approx((0.25, 2))]
    # the box itself: quartiles of 0, 0.1, 0.2, 0.7 by linear interpolation are 0.075 and 0.325
    corners = folds.patches[0].get_path().vertices[:, 0]
    assert (corners.min(), corners.max()) == pytest.approx((0.075, 0.325))
    colours = [patch.get_facecolor()[:3] for patch in dice.patches]
    assert len(set(colours[0])) == 1 and len(set(colours[1])) == 3  # the starting point is grey

    from matplotlib.image import imread

    pixels = imread(path)
    assert pixels.shape[:2] == tuple(int(side * 150) for side in drawn[0].get_size_inches()[::-1])
    assert (pixels[..., :3].min(axis=2) < 0.9).mean() > 0.01
    assert [p.name for p in path.parent.iterdir()] == ["boxes.png"]


@pytest.mark.parametrize("count", [1, 4, 5, 7])
def test_no_empty_panel_is_left(tmp_path: Path, drawn: list[Any], count: int) -> None:
    metrics = ["dice", "hd", "hd95", "folded_percent", "std_log_jacobian", "sdlogj_learn2reg", "ndv_percent"][:count]
    plot_boxes(RESULTS, metrics, tmp_path / "boxes.pdf")
    assert len(drawn[0].axes) == count
    assert (tmp_path / "boxes.pdf").read_bytes().startswith(b"%PDF")


def test_words_do_not_run_out_of_the_picture(tmp_path: Path, drawn: list[Any]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    plot_boxes(RESULTS, ["dice"], tmp_path / "boxes.png")
    figure = drawn[0]
    box = figure._supxlabel.get_window_extent(FigureCanvasAgg(figure).get_renderer())
    assert box.x0 >= 0 and box.x1 <= figure.bbox.x1


def test_pyplot_and_the_settings_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = dict(matplotlib.rcParams)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # an import of it fails from now on
    plot_boxes(RESULTS, ["dice"], tmp_path / "boxes.svg")
    assert dict(matplotlib.rcParams) == before


def test_existing_pictures_bad_names_and_other_pairs(tmp_path: Path) -> None:
    path = tmp_path / "boxes.png"
    path.write_text("mine")
    with pytest.raises(FileExistsError, match="boxes.png exists already"):
        plot_boxes(RESULTS, ["dice"], path)
    assert path.read_text() == "mine"
    plot_boxes(RESULTS, ["dice"], path, overwrite=True)
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="expected a name that ends in .png"):
        plot_boxes(RESULTS, ["dice"], tmp_path / "boxes.txt")
    other = MethodResult("other", "Other", pd.DataFrame({"dice": [0.5]}, PAIRS[:1]))
    with pytest.raises(ValueError, match="method 'other': expected the 4 pairs"):
        plot_boxes([*RESULTS, other], ["dice"], tmp_path / "more.png")
    assert [p.name for p in tmp_path.iterdir()] == ["boxes.png"]


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "monai_deq\[figures\]"'):
        plot_boxes(RESULTS, ["dice"], tmp_path / "boxes.png")
    assert not list(tmp_path.iterdir())


def test_lines_of_systems(tmp_path: Path, drawn: list[Any]) -> None:
    lines = {
        "one step": pd.Series([3.0], [1]),
        "failed": pd.Series([NAN], [4]),
        "many": pd.Series([2.0, NAN, 8.0], [1, 2, 4]),
    }
    plot_lines(lines, "Memory (MB)", tmp_path / "lines.png")
    (axis,) = drawn[0].axes
    across, many = axis.lines
    # a system of one step alone goes across the figure
    assert list(across.get_ydata()) == [3, 3] and [*many.get_xdata(), *many.get_ydata()] == [1, 4, 2, 8]
    assert (axis.get_xscale(), axis.get_yscale(), axis.get_title()) == ("log", "log", "Memory (MB)")
    with pytest.raises(FileExistsError, match="overwrite"):
        plot_lines({}, "", tmp_path / "lines.png")
