# SPDX-License-Identifier: Apache-2.0
"""The convergence study: its scores against evaluations that stop there, its curves against NumPy, its files."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser

from monai_deq.data import write_sample_cohort
from monai_deq.evaluation import BundleMethod, converge, evaluate_method
from monai_deq.evaluation.step_plots import step_plots
from monai_deq.evaluation.step_scores import (
    StepScore,
    default_steps,
    read_step_scores,
    score_steps,
    write_step_scores,
)
from monai_deq.evaluation.step_table import measured_panels, step_curves, step_table
from monai_deq.networks import load_weights
from monai_deq.solvers import random_smooth_ddf

BUNDLE = Path(__file__).resolve().parents[2] / "bundles" / "oasis"


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sample_cohort(
        tmp_path_factory.mktemp("data") / "cohort", 5, spatial_size_3d=(18, 16, 21), spatial_size_2d=(32, 37)
    )


def write_checkpoint(name: str, results: Path, spatial_dims: int, coarser_levels: int = 0) -> None:
    """Weights that move the images, without training."""
    overlays = ["slices.json"] if spatial_dims == 2 else []
    parser = ConfigParser()
    parser.read_config([str(BUNDLE / f) for f in ("train.json", *overlays, f"methods/{name}.json")])
    parser.update({"max_steps": 2, "num_states": 0, "unwarped_moving": False})
    torch.manual_seed(0)
    weights = parser.get_parsed_content("network_def").state_dict()
    for key, value in weights.items():
        if key.endswith("weight"):
            value.add_(max(0.3 * float(value.std()), 0.05) * torch.randn_like(value))
    for level in range(1, coarser_levels + 1):
        # smaller steps, which do not lead out of the image
        weights.update({"coarse." * level + k: 0.7 * v for k, v in weights.items() if k.startswith("update")})
    path = results / name / "models" / "model.pt"
    path.parent.mkdir(parents=True)
    torch.save(weights, path)
    settings = {"spatial_size": None, "val_steps": 2, "max_steps": 2, "coarser_levels": coarser_levels}
    path.with_suffix(".json").write_text(json.dumps({**settings, "coarse_steps": 3}))


@pytest.mark.parametrize(
    "name, spatial_dims, coarser_levels",
    [
        ("deqreg", 2, 0),
        ("deqreg", 3, 0),
        ("deqreg_pool", 2, 2),
        ("deqreg_pool", 3, 1),
        ("riir", 2, 0),
        ("gradirn", 2, 0),
        ("unrolling", 3, 0),
    ],
)
def test_scores_are_those_of_an_evaluation_that_stops_there(
    name: str, spatial_dims: int, coarser_levels: int, cohort: Path, tmp_path: Path
) -> None:
    write_checkpoint(name, tmp_path, spatial_dims, coarser_levels)
    overlays = ["slices.json"] if spatial_dims == 2 else []
    settings = {"dataset_dir": str(cohort), "split_sizes": [2, 1, 2], "tolerance": 0.0}
    method = BundleMethod(name, BUNDLE, tmp_path / name, overlays, settings)
    scores = list(score_steps(method, [1, 2, 4], 3.0))
    assert [s.step for s in scores] == [1, 2, 4] * 2
    for steps in (2, 4):
        result, summary = evaluate_method(method, solver_steps=steps)
        assert result.failure is None, result.failure
        for pair in summary["pairs"]:
            (score,) = [s for s in scores if (s.fixed, s.moving, s.step) == (pair["fixed"], pair["moving"], steps)]
            assert score.dice == pytest.approx(pair["dice"], rel=1e-5)
            assert score.folded_percent == pytest.approx(pair["folded_percent"], abs=1e-6)
            # both at the solution itself
            assert score.residual == pytest.approx(pair["residual"], rel=1e-3)
    # without a start of its own the same, and nothing beside it
    for score, plain in zip(scores, score_steps(method, [1, 2, 4]), strict=True):
        assert math.isnan(plain.start_distance) and score[:-1] == plain[:-1]
    by_step = {s.step: s for s in scores[:3]}
    assert by_step[1].residual > 0 and by_step[1].dice != by_step[4].dice
    assert -1 <= by_step[1].similarity <= 1 and 0 < by_step[1].smoothness < by_step[4].smoothness
    assert by_step[4].start_distance == pytest.approx(start_distance(method, 4), rel=1e-4)
    with pytest.raises(ValueError, match="random_start_rms must not be negative"):
        next(score_steps(method, [1], -1.0))


def start_distance(method: BundleMethod, steps: int) -> float:
    """Of the first pair, by two solves."""
    config = method.parser("evaluate")
    network = config.get_parsed_content("network").eval()
    load_weights(network, method.checkpoint)
    batch = next(iter(config.get_parsed_content("dataloader")))
    moving, fixed = batch["moving"].as_tensor(), batch["fixed"].as_tensor()
    ndim = fixed.ndim - 2
    settings = {"max_steps": steps, "tolerance": 0.0}
    first, _ = network.solve(moving, fixed, **settings)
    start = random_smooth_ddf((1, ndim, *fixed.shape[2:]), 3.0, seed=0)
    assert float(start.square().sum(dim=1).mean().sqrt()) == pytest.approx(3, rel=1e-5)
    if hasattr(network, "coarse_solution"):
        start = network.coarse_solution(moving, fixed, start)
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


def toy_scores() -> list[StepScore]:
    nan = math.nan
    return [
        StepScore("a", "b", 1, 0.5, 0.0, 0.1, 0.0, 1.0, 0.5, 2.0),
        StepScore("a", "b", 2, 0.75, 1.0, 0.2, 0.0, 0.5, 0.25, 2.0),
        StepScore("a", "b", 4, 0.625, 2.0, 0.3, 0.0, 0.25, 0.125, 2.0),
        StepScore("b", "a", 1, 0.25, 0.5, 0.3, 0.0, 3.0, 0.5, nan),
        StepScore("b", "a", 2, 0.5, 0.5, 0.4, 0.0, 1.5, 0.25, nan),
        StepScore("b", "a", 3, nan, nan, nan, nan, nan, nan, nan),
    ]


def test_curves_and_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = toy_scores()
    write_step_scores(scores, tmp_path / "scores.csv")
    again = read_step_scores(tmp_path / "scores.csv")
    assert str(again) == str(scores)
    curves = step_curves(again)
    dice = curves["dice"]
    assert dice.steps == [1, 2, 4] and dice.pairs == 2 and dice.best == 2
    # the pair that was lost leaves no mean of those that are left
    np.testing.assert_allclose(dice.mean, [0.375, 0.625, math.nan])
    np.testing.assert_allclose(dice.std, [np.std([0.5, 0.25], ddof=1), np.std([0.75, 0.5], ddof=1), math.nan])
    table = step_table({"One": curves}, {"One": 1}).splitlines()
    np.testing.assert_allclose(curves["residual"].median, [2.0, 1.0, math.nan])
    assert table[0].count(" <= 0.005 (% of pairs) |") == table[0].count(" <= 0.05 (% of pairs) |") == 1
    assert table[2:] == [
        "| One | 1 | trained | 37.50 | 0.250 | 0.2000 | 2 | 0 | 0.5 | - | - |",
        "| One | 2 | best Dice | 62.50 | 0.750 | 0.3000 | 1 | 0 | 0.25 | - | - |",
        "| One | 4 | last | nan | nan | nan | nan | 0 | nan | - | - |",
    ]
    assert f"| One | 3 | trained |{' - |' * 8}" in step_table({"One": curves}, {"One": 3})
    assert "| One | 4 | trained, last | nan |" in step_table({"One": curves}, {"One": 4})
    alone = {"One": step_curves(scores[:3])}
    row = "75.00 | 1.000 | 0.2000 | 0.5 | 0 | 0.25 | 2 | 0 |"
    assert f"| One | 2 | trained, best Dice | {row}" in step_table(alone, {"One": 2})
    assert f"| One | 2 | best Dice | {row}" in (asked := step_table(alone, {"One": 4}, [2, 1]))
    assert [line.split(" | ")[1:3] for line in asked.splitlines()[2:]] == [
        ["1", ""],
        ["2", "best Dice"],
        ["4", "trained, last"],
    ]
    # a pair that was lost stands still nowhere
    still = [s._replace(residual=0.005, start_distance=0.05) for s in scores]
    halves = step_curves([s if s.fixed == "a" else s._replace(residual=0.0051, start_distance=0.06) for s in still])
    assert halves["residual"].within == halves["start_distance"].within == [0.5] * 3
    assert step_curves(still)["residual"].within == [1.0, 1.0, 0.5]
    # a panel for the random start only where there was one
    without = {"Two": step_curves([s._replace(start_distance=math.nan) for s in scores[:3]])}
    assert measured_panels(alone) == ["dice", "folded_percent", "similarity", "residual", "start_distance"]
    assert measured_panels(without) == measured_panels(alone)[:-1]
    assert measured_panels({**alone, **without}) == measured_panels(alone)
    for name, drawn in (("five", alone), ("four", without)):
        assert step_plots(drawn, {"One": 2, "Two": 2}, tmp_path / f"{name}.png").stat().st_size > 10000
    drawn_axes: list[Any] = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: drawn_axes.extend(figure.axes))
    huge = {"Lost": step_curves([s._replace(residual=1e30, folded_percent=1e3) for s in scores[:3]]), **without}
    with contextlib.suppress(FileNotFoundError):  # nothing was written
        step_plots(huge, {"Lost": 2, "Two": 2}, tmp_path / "huge.png")
    limits = {axis.get_title(): axis.get_ylim() for axis in drawn_axes}
    assert limits["residual (voxel)"][0] < 0.25 and limits["residual (voxel)"][1] == 100
    assert limits["folded voxels (%)"][1] > 1000
    with pytest.raises(ValueError, match="at least one pair"):
        step_curves([])
    (tmp_path / "other.csv").write_text("fixed,moving\n")
    with pytest.raises(ValueError, match="other.csv: expected the columns fixed, moving, step"):
        read_step_scores(tmp_path / "other.csv")


def test_study(cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("gradirn", "deqreg"):
        write_checkpoint(name, tmp_path, 2)
    scored = []

    def counted(method: BundleMethod, *args: Any) -> Any:
        scored.append(method.name)
        return score_steps(method, *args)

    monkeypatch.setattr("monai_deq.evaluation.convergence.score_steps", counted)
    arguments: dict[str, Any] = {"overlays": "slices.json", "max_steps": 5, "split": "test", "dataset_dir": str(cohort)}
    arguments["split_sizes"] = [2, 1, 2]
    methods = ["affine", "gradirn", "riir", "deqreg"]
    curves = converge(BUNDLE, tmp_path, methods, **arguments)
    assert list(curves) == ["GraDIRN", "DEQReg"] and scored == ["affine", "gradirn", "deqreg"]
    assert curves["DEQReg"]["dice"].steps == [1, 2, 3, 4, 5] and curves["DEQReg"]["dice"].pairs == 2
    text = (tmp_path / "convergence.md").read_text()
    assert "affine failed: TypeError" in text and "riir failed: FileNotFoundError" in text
    assert text.count("\n| DEQReg | 2 | trained") == 1
    assert (tmp_path / "convergence.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"table_steps must be among the steps that are scored, .*, got \[6\]"):
        converge(BUNDLE, tmp_path, methods, table_steps=[6], output_dir=tmp_path / "other", **arguments)
    with pytest.raises(FileExistsError, match="convergence.md"):
        converge(BUNDLE, tmp_path, methods, **arguments)
    with pytest.raises(ValueError, match=r"\['max_step'\] is neither an argument of converge"):
        converge(BUNDLE, tmp_path, methods, overwrite=True, max_step=9, **arguments)
    scored.clear()
    again = converge(BUNDLE, tmp_path, ["deqreg"], overwrite=True, **arguments)
    assert scored == [] and again["DEQReg"] == curves["DEQReg"]


def test_a_displacement_that_is_lost_ends_its_pair(cohort: Path, tmp_path: Path) -> None:
    write_checkpoint("deqreg", tmp_path, 2)
    path = tmp_path / "deqreg" / "models" / "model.pt"
    weights = {k: v * 1e30 if k.endswith("weight") else v for k, v in torch.load(path, weights_only=True).items()}
    torch.save(weights, path)
    method = BundleMethod(
        "deqreg", BUNDLE, tmp_path / "deqreg", ["slices.json"], {"dataset_dir": str(cohort), "split_sizes": [2, 1, 2]}
    )
    scores = list(score_steps(method, [1, 2, 3]))
    assert [s.step for s in scores] == [1, 1] and all(math.isnan(s.dice) for s in scores)
