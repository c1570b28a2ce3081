# SPDX-License-Identifier: Apache-2.0
"""The convergence study: its scores against evaluations that stop there, its curves against NumPy, its files."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from monai_deq.evaluation import (
    BundleMethod,
    converge,
    evaluate_method,
    plot_steps,
    score_steps,
    step_curves,
    step_table,
)
from monai_deq.evaluation.convergence import default_steps, read_step_scores, write_step_scores
from monai_deq.networks import load_network
from monai_deq.solvers import random_smooth_ddf

Writer = Callable[..., Path]


@pytest.mark.parametrize(
    "name, spatial_dims, levels",
    [("deqreg", 3, 1), ("deqreg_pool", 2, 3), ("riir", 2, 1), ("gradirn", 2, 1), ("unrolling", 2, 1)],
)
def test_scores_are_those_of_an_evaluation_that_stops_there(
    name: str,
    spatial_dims: int,
    levels: int,
    overrides: dict[str, Any],
    write_checkpoint: Writer,
    oasis: Path,
    tmp_path: Path,
) -> None:
    write_checkpoint(name, tmp_path, spatial_dims, motion=0.3, levels=levels)
    overlays = ["slices.json"] if spatial_dims == 2 else []
    # a few labels: surface distances of 35 in a volume take as long as all else
    settings = {**overrides, "tolerance": 0.0, "labels": [1, 2, 3]}
    method = BundleMethod(name, oasis, tmp_path / name, overlays, settings)
    scores = score_steps(method, [1, 2, 4], 3.0)
    assert scores["step"].to_list() == [1, 2, 4] * 2
    result, summary = evaluate_method(method.with_overrides(solver_steps=4))
    assert result.failure is None, result.failure
    at_4 = scores[scores["step"] == 4].set_index(["fixed", "moving"])
    for pair in summary["pairs"]:
        score = at_4.loc[pair["fixed"], pair["moving"]]
        assert score["dice"] == pytest.approx(pair["dice"], rel=1e-5)
        assert score["folded_percent"] == pytest.approx(pair["folded_percent"], abs=1e-6)
        # both at the solution itself
        assert score["residual"] == pytest.approx(pair["residual"], rel=1e-3)
        assert score["relative_residual"] == pytest.approx(pair["relative_residual"], rel=1e-3)
    # without a start of its own the same, and nothing beside it
    plain = score_steps(method, [1, 2, 4])
    assert plain["start_distance"].isna().all()
    pd.testing.assert_frame_equal(plain.iloc[:, :-1], scores.iloc[:, :-1])
    first, _, last = (row for _, row in scores[:3].iterrows())
    assert first["residual"] > 0 and first["dice"] != last["dice"]
    assert -1 <= first["similarity"] <= 1 and 0 < first["smoothness"] < last["smoothness"]
    assert last["start_distance"] == pytest.approx(start_distance(method, 4), rel=1e-4)
    with pytest.raises(ValueError, match="random_start_rms must not be negative"):
        score_steps(method, [1], -1.0)


def start_distance(method: BundleMethod, steps: int) -> float:
    """Of the first pair, by two solves."""
    network = load_network(method.checkpoint)  # type: ignore[arg-type]
    batch = next(iter(method.parser("evaluate").get_parsed_content("dataloader")))
    moving, fixed = batch["moving"].as_tensor(), batch["fixed"].as_tensor()
    settings: dict[str, Any] = {"max_steps": steps, "tolerance": 0.0}
    first, _ = network.solve(moving, fixed, **settings)
    start = random_smooth_ddf((1, fixed.ndim - 2, *fixed.shape[2:]), 3.0, seed=0)
    assert float(start.square().sum(dim=1).mean().sqrt()) == pytest.approx(3, rel=1e-5)
    start, _ = network.coarse_start(moving, fixed, start)  # type: ignore[operator]
    second, _ = network.solve(moving, fixed, start, **settings)
    return float((first - second).square().sum(dim=1).mean().sqrt())


def test_steps_that_are_scored() -> None:
    assert default_steps(3) == [1, 2, 3]
    assert default_steps(96) == [*range(1, 17), *range(20, 97, 4)]
    assert default_steps(1000)[len(default_steps(96)) :] == [136, 192, 272, 384, 543, 768, 1000]
    assert default_steps(1000) == sorted(set(default_steps(1000)))
    for wrong in (0, 2.5):
        with pytest.raises(ValueError, match="max_steps must be a whole number of at least 1"):
            default_steps(wrong)  # type: ignore[arg-type]


def toy_scores() -> pd.DataFrame:
    nan = math.nan
    rows = [
        ("a", "b", 1, 0.5, 0.0, 0.1, 0.0, 1.0, 0.5, 2.0),
        ("a", "b", 2, 0.75, 1.0, 0.2, 0.0, 0.5, 0.25, 2.0),
        ("a", "b", 4, 0.625, 2.0, 0.3, 0.0, 0.25, 0.125, 2.0),
        ("b", "a", 1, 0.25, 0.5, 0.3, 0.0, 3.0, 0.5, nan),
        ("b", "a", 2, 0.5, 0.5, 0.4, 0.0, 1.5, 0.25, nan),
        ("b", "a", 3, *[nan] * 7),
    ]
    scores = ["dice", "folded_percent", "similarity", "smoothness", "residual", "relative_residual", "start_distance"]
    return pd.DataFrame(rows, columns=["fixed", "moving", "step", *scores])


def rows_of(table: str) -> list[str]:
    return table.splitlines()[2:]


def test_scores_are_read_as_they_were_written(tmp_path: Path) -> None:
    scores = toy_scores().assign(fixed=["NA", *"aabbb"], residual=[1 / 3, 0.1 + 0.2, 1e-17, 5e-324, 1e30, math.nan])
    write_step_scores(scores, tmp_path / "scores.csv")
    assert (tmp_path / "scores.csv").read_text().endswith("\nb,a,3,nan,nan,nan,nan,nan,nan,nan\n")
    pd.testing.assert_frame_equal(read_step_scores(tmp_path / "scores.csv"), scores, check_exact=True)
    (tmp_path / "other.csv").write_text("fixed,moving\n")
    with pytest.raises(ValueError, match="other.csv: expected the columns fixed, moving, step"):
        read_step_scores(tmp_path / "other.csv")


def test_curves() -> None:
    scores = toy_scores()
    curves = step_curves(scores)
    assert curves.index.to_list() == [1, 2, 4]
    # the pair that was lost leaves no mean of those that are left
    np.testing.assert_allclose(curves["dice", "mean"], [0.375, 0.625, math.nan])
    std = [np.std([0.5, 0.25], ddof=1), np.std([0.75, 0.5], ddof=1), math.nan]
    np.testing.assert_allclose(curves["dice", "sem"], np.divide(std, math.sqrt(2)))
    np.testing.assert_allclose(curves["residual", "median"], [2.0, 1.0, math.nan])
    # a pair that was lost stands still nowhere
    still = scores.assign(residual=0.005, start_distance=0.05)
    assert step_curves(still)["residual", "within"].to_list() == [1.0, 1.0, 0.5]
    other = still["fixed"] == "b"
    halves = step_curves(still.assign(residual=still["residual"] + 1e-4 * other, start_distance=0.05 + 0.01 * other))
    assert halves["residual", "within"].to_list() == halves["start_distance", "within"].to_list() == [0.5] * 3
    with pytest.raises(ValueError, match="at least one pair"):
        step_curves(scores[:0])


def test_table() -> None:
    curves = step_curves(toy_scores())
    table = step_table({"One": curves}, {"One": 1})
    assert table.count(" <= 0.005 (% of pairs) |") == table.count(" <= 0.05 (% of pairs) |") == 1
    assert rows_of(table) == [
        "| One | 1 | trained | 37.50 | 0.250 | 0.2000 | 2 | 0 | 0.5 | - | - |",
        "| One | 2 | best Dice | 62.50 | 0.750 | 0.3000 | 1 | 0 | 0.25 | - | - |",
        "| One | 4 | last | nan | nan | nan | nan | 0 | nan | - | - |",
    ]
    assert f"| One | 3 | trained |{' - |' * 8}" in step_table({"One": curves}, {"One": 3})
    assert "| One | 4 | trained, last | nan |" in step_table({"One": curves}, {"One": 4})
    alone = {"One": step_curves(toy_scores()[:3])}
    row = "75.00 | 1.000 | 0.2000 | 0.5 | 0 | 0.25 | 2 | 0 |"
    assert f"| One | 2 | trained, best Dice | {row}" in step_table(alone, {"One": 2})
    assert f"| One | 2 | best Dice | {row}" in (asked := step_table(alone, {"One": 4}, [2, 1]))
    words = [["1", ""], ["2", "best Dice"], ["4", "trained, last"]]
    assert [line.split(" | ")[1:3] for line in rows_of(asked)] == words


def test_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = toy_scores()[:3]
    alone = {"One": step_curves(scores)}
    without = {"Two": step_curves(scores.assign(start_distance=math.nan))}
    plot_steps({**alone, **without}, {"One": 2, "Two": 2}, tmp_path / "five.png")
    assert (tmp_path / "five.png").stat().st_size > 10000
    drawn: list[Any] = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: drawn.append(figure.axes))

    def panels(curves: dict[str, pd.DataFrame]) -> dict[str, Any]:
        with contextlib.suppress(FileNotFoundError):  # nothing was written
            plot_steps(curves, dict.fromkeys(curves, 2), tmp_path / "drawn.png", overwrite=True)
        return {axis.get_title(): axis for axis in drawn.pop() if axis.get_title()}

    # a panel for the random start only where there was one
    assert len(panels(alone)) == len(panels({**alone, **without})) == 5
    assert len(panels(without)) == 4 and not any("random start" in title for title in panels(without))
    huge = step_curves(scores.assign(residual=1e30, folded_percent=1e3))
    axes = panels({"Lost": huge, **without})
    bottom, top = axes["residual (voxel)"].get_ylim()
    assert bottom < 0.25 and top == 100 and axes["folded voxels (%)"].get_ylim()[1] > 1000
    # the means in %, a dot at the steps of the training and a triangle at the best Dice, both 2
    line, *marks = panels(alone)["Dice (%)"].lines
    assert list(line.get_ydata()) == [50, 75, 62.5]
    assert [(m.get_marker(), m.get_xdata()[0], m.get_ydata()[0]) for m in marks] == [("o", 2, 75), ("^", 2, 75)]


def test_study(
    overrides: dict[str, Any], write_checkpoint: Writer, oasis: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("gradirn", "deqreg"):
        write_checkpoint(name, tmp_path, motion=0.3)
    scored = []

    def counted(method: BundleMethod, *args: Any) -> pd.DataFrame:
        scored.append(method.name)
        return score_steps(method, *args)

    monkeypatch.setattr("monai_deq.evaluation.convergence.score_steps", counted)
    given: dict[str, Any] = {"overlays": "slices.json", "overrides": {**overrides, "split": "test"}, "max_steps": 5}
    methods = ["affine", "gradirn", "riir", "deqreg"]
    curves = converge(oasis, tmp_path, methods, **given)
    assert list(curves) == ["GraDIRN", "DEQReg"] and scored == ["affine", "gradirn", "deqreg"]
    assert curves["DEQReg"].index.to_list() == [1, 2, 3, 4, 5]
    text = (tmp_path / "convergence.md").read_text()
    assert "affine failed: TypeError" in text and "riir failed: FileNotFoundError" in text
    assert text.count("\n| DEQReg | 2 | trained") == 1
    assert (tmp_path / "convergence.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"table_steps must be among the steps that are scored, .*, got \[6\]"):
        converge(oasis, tmp_path, methods, table_steps=[6], output_dir=tmp_path / "other", **given)
    with pytest.raises(FileExistsError, match="convergence.md"):
        converge(oasis, tmp_path, methods, **given)
    with pytest.raises(ValueError, match=r"overrides: \['max_step'\] is no setting .* \(is it max_steps\?\)"):
        converge(oasis, tmp_path, methods, overrides={"max_step": 9})
    scored.clear()
    again = converge(oasis, tmp_path, ["deqreg"], overwrite=True, **given)
    assert scored == []
    pd.testing.assert_frame_equal(again["DEQReg"], curves["DEQReg"])


def test_a_displacement_that_is_lost_ends_its_pair(
    overrides: dict[str, Any], write_checkpoint: Writer, oasis: Path, tmp_path: Path
) -> None:
    path = write_checkpoint("deqreg", tmp_path, motion=0.3)
    weights = {k: v * 1e30 if k.endswith("weight") else v for k, v in torch.load(path, weights_only=True).items()}
    torch.save(weights, path)
    scores = score_steps(BundleMethod("deqreg", oasis, tmp_path / "deqreg", ["slices.json"], overrides), [1, 2, 3])
    assert scores["step"].to_list() == [1, 1] and scores["dice"].isna().all()


def test_amp_is_refused(overrides: dict[str, Any], write_checkpoint: Writer, oasis: Path, tmp_path: Path) -> None:
    write_checkpoint("deqreg", tmp_path)
    # as it arrives from the command line
    options = {**overrides, "amp": "true"}
    with pytest.raises(ValueError, match="amp false"):
        score_steps(BundleMethod("deqreg", oasis, tmp_path / "deqreg", ["slices.json"], options), [1])
