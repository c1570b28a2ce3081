# SPDX-License-Identifier: Apache-2.0
"""Scores of one method after each of a number of steps."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from monai.losses import DiffusionLoss, LocalNormalizedCrossCorrelationLoss

from monai_deq.engines import PreparePairBatch
from monai_deq.evaluation.method_evaluation import BundleMethod
from monai_deq.metrics import compute_folded_voxels, compute_label_dice
from monai_deq.networks import load_weights
from monai_deq.networks.blocks import warp_by_ddf
from monai_deq.solvers import random_smooth_ddf, residual_at, starting_point
from monai_deq.utils import as_flag, replace_file

__all__ = ["StepScore", "default_steps", "read_step_scores", "score_steps", "write_step_scores"]


class StepScore(NamedTuple):
    """
    Scores of one pair after one number of steps.

    Args:
        fixed: name of the fixed subject.
        moving: name of the moving subject.
        step: number of steps; of a network with levels those on the finest.
        dice: mean over the labels.
        folded_percent: folded voxels in percent.
        similarity: mean local cross-correlation (window 5) of the warped and the fixed image, higher is better.
        smoothness: MONAI's diffusion loss of the displacement; the training's loss is
            ``-similarity + smoothness_weight * smoothness``.
        residual: RMS over voxels of what the next step would change, in voxels.
        relative_residual: the same over the displacement after that step.
        start_distance: RMS distance in voxels to what the same number of steps make of a random smooth displacement;
            NaN where it was not asked for.
    """

    fixed: str
    moving: str
    step: int
    dice: float
    folded_percent: float
    similarity: float
    smoothness: float
    residual: float
    relative_residual: float
    start_distance: float


def default_steps(max_steps: int) -> list[int]:
    """
    Numbers of steps at which to score: all up to 16, every fourth up to 96, and from there about 1.4 times apart.

    Args:
        max_steps: the last one.

    Raises:
        ValueError: When it is below 1.
    """
    if int(max_steps) != max_steps or max_steps < 1:
        raise ValueError(f"max_steps must be a whole number of at least 1, got {max_steps}.")
    steps = [*range(1, 17), *range(20, 97, 4), *(round(96 * 2 ** (k / 2)) for k in range(1, 40))]
    return [s for s in steps if s < max_steps] + [int(max_steps)]


def _rms(ddf: torch.Tensor) -> torch.Tensor:
    return ddf.double().square().sum(dim=1).mean().sqrt()


def score_steps(
    method: BundleMethod, steps: Sequence[int], random_start_rms: float = 0.0, **overrides: Any
) -> Iterator[StepScore]:
    """
    Iterate a trained method's map on each pair of the bundle's ``evaluate.json`` and score it on the way. The
    iteration is the plain one and does not stop at a tolerance.

    Args:
        method: the method.
        steps: numbers of steps at which to score.
        random_start_rms: RMS length in voxels of a random smooth displacement, see
            :py:func:`monai_deq.solvers.random_smooth_ddf`, from which the iteration is made a second time, on the
            finest level (see :py:func:`monai_deq.solvers.starting_point`); each pair has its own. Defaults to 0: it is
            not.
        overrides: further entries of the configuration.

    Yields:
        The scores, pair by pair. A displacement that is not finite has NaN for scores, and its pair ends there.
    """
    config = method.parser("evaluate", **overrides)
    device = torch.device(config.get_parsed_content("device"))
    labels = list(config.get_parsed_content("labels"))
    network = config.get_parsed_content("network").eval()
    if method.checkpoint is None or not hasattr(network, "fixed_point_map"):
        raise TypeError(f"{method.title} is not iterated: there is no map whose steps could be scored.")
    load_weights(network, method.checkpoint)
    marks = set(steps)
    if config.get_parsed_content("batch_size") != 1 or as_flag(config.get_parsed_content("amp"), "amp"):
        raise ValueError("steps are scored with batch_size 1 and amp false.")
    if not random_start_rms >= 0:
        raise ValueError(f"random_start_rms must not be negative, got {random_start_rms}.")
    for index, batch in enumerate(config.get_parsed_content("dataloader")):
        moving, _, (fixed,), _ = PreparePairBatch()(batch, device)
        moving_label, fixed_label = (
            batch[key].as_tensor() if hasattr(batch[key], "as_tensor") else batch[key]
            for key in ("moving_label", "fixed_label")
        )
        similarity = LocalNormalizedCrossCorrelationLoss(spatial_dims=fixed.ndim - 2, kernel_size=5)
        with torch.no_grad():
            # the levels before the finest, and its first step
            first = {"max_steps": 1, "tolerance": 0.0, "solver": "plain"}
            start, center = starting_point(network, moving, fixed)
            g = g_other = network.fixed_point_map(moving, fixed, **center)
            state, record = network.solve_state(moving, fixed, start, **center, **first)
            other = None
            if random_start_rms:
                shape = (1, fixed.ndim - 2, *fixed.shape[2:])
                start = random_smooth_ddf(shape, random_start_rms, seed=index, device=fixed.device)
                start, center = starting_point(network, moving, fixed, start)
                g_other = network.fixed_point_map(moving, fixed, **center)
                other, _ = network.solve_state(moving, fixed, start, **center, **first)
            for step in range(1, max(marks) + 1):
                ddf = state[:, : fixed.ndim - 2]
                # a first step that is not finite is not taken by the solver
                alive = int(record.steps[0]) == 1 and bool(torch.isfinite(ddf).all())
                after = g(state)
                if step in marks or not alive:
                    values = [math.nan] * 7
                    if alive:
                        # called at once, so the loop's variable is the right one
                        residual, relative = residual_at(lambda _: after, state, fixed.ndim - 2)  # noqa: B023
                        warped_label = warp_by_ddf(moving_label.to(device), ddf, mode="nearest")
                        dice = compute_label_dice(warped_label, fixed_label.to(device), labels, moving_label.to(device))
                        values = [
                            float(dice.nanmean()),
                            float(compute_folded_voxels(ddf)),
                            -float(similarity(warp_by_ddf(moving, ddf).float(), fixed.float())),
                            float(DiffusionLoss()(ddf)),
                            float(residual),
                            float(relative),
                            math.nan if other is None else float(_rms(other[:, : fixed.ndim - 2] - ddf)),
                        ]
                    yield StepScore(str(batch["fixed_subject"][0]), str(batch["moving_subject"][0]), step, *values)
                if not alive:
                    break
                state = after
                if other is not None:
                    other = g_other(other)


def write_step_scores(scores: Iterable[StepScore], path: str | Path) -> None:
    """
    Write scores as CSV, whole or not at all.

    Args:
        scores: the scores.
        path: the file.
    """
    with replace_file(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(StepScore._fields)
        writer.writerows(scores)


def read_step_scores(path: str | Path) -> list[StepScore]:
    """
    Read what :py:func:`write_step_scores` wrote.

    Args:
        path: the file.

    Raises:
        ValueError: When the columns are others.
    """
    with Path(path).open(newline="") as file:
        header, *rows = csv.reader(file)
    if tuple(header) != StepScore._fields:
        raise ValueError(f"{path}: expected the columns {', '.join(StepScore._fields)}, got {', '.join(header)}.")
    return [StepScore(f, m, int(s), *map(float, values)) for f, m, s, *values in rows]
