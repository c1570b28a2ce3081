# SPDX-License-Identifier: Apache-2.0
"""Trained methods iterated far beyond their training: what becomes of them (paper, Table 2, Fig. 1 and Fig. 3)."""

from __future__ import annotations

import hashlib
import inspect
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from monai.losses import DiffusionLoss, LocalNormalizedCrossCorrelationLoss

from monai_deq.certificates import starting_point
from monai_deq.engines import PreparePairBatch
from monai_deq.evaluation import methods as bundle
from monai_deq.evaluation.figures import best_step, plot_steps
from monai_deq.evaluation.tables import markdown_table
from monai_deq.metrics import compute_folded_voxels, compute_label_dice
from monai_deq.networks import load_weights
from monai_deq.networks.blocks import warp_by_ddf
from monai_deq.networks.nets import IteratedNet
from monai_deq.solvers import random_smooth_ddf
from monai_deq.utils import as_flag, replace_file
from monai_deq.visualize import figures_available

__all__ = ["ITERATED_METHODS", "converge", "default_steps", "score_steps", "step_curves", "step_table"]

logger = logging.getLogger("monai_deq")

#: the systems that are iterated: those of the paper in the order of its tables, and the bundle's own
ITERATED_METHODS = ("unrolling", "gradirn", "riir", "deqreg12", "deqreg", "deqreg_pool")
#: what counts as standing still, and as the same solution, in voxels
LIMITS: dict[str, float] = {"residual": 0.005, "start_distance": 0.05}

_PLACE = ["fixed", "moving", "step"]
_SCORES = ["dice", "folded_percent", "similarity", "smoothness", "residual", "relative_residual", "start_distance"]
#: what the table has of a number of steps: score, statistic, factor, format
_CELLS = (
    ("dice", "mean", 100, ".2f"),
    ("folded_percent", "mean", 1, ".3f"),
    ("similarity", "mean", 1, ".4f"),
    ("residual", "median", 1, ".2g"),
    ("residual", "within", 100, ".0f"),
    ("relative_residual", "median", 1, ".2g"),
    ("start_distance", "median", 1, ".2g"),
    ("start_distance", "within", 100, ".0f"),
)


def default_steps(max_steps: int) -> list[int]:
    """Steps at which to score: all up to 16, every fourth up to 96, from there about 1.4 times apart, and the last."""
    bundle.check_count(max_steps, "max_steps")
    steps = [*range(1, 17), *range(20, 97, 4), *(round(96 * 2 ** (k / 2)) for k in range(1, 40))]
    return [s for s in steps if s < max_steps] + [int(max_steps)]


def _rms(ddf: torch.Tensor) -> float:
    """RMS over voxels of a displacement's length, of a batch of one."""
    return float(ddf.double().square().sum(dim=1).mean().sqrt())


def _check_start(random_start_rms: float) -> None:
    if not random_start_rms >= 0:  # nor NaN
        raise ValueError(f"random_start_rms must not be negative, got {random_start_rms}.")


def score_steps(method: bundle.BundleMethod, steps: Sequence[int], random_start_rms: float = 0.0) -> pd.DataFrame:
    """
    Iterate a trained method's map on each pair of the bundle's ``evaluate.json``, by plain iteration without a
    tolerance, batch size 1 and no amp, and score it on the way.

    Args:
        method: the method.
        steps: numbers of steps at which to score; of a network with levels those on the finest.
        random_start_rms: RMS length in voxels of a random smooth displacement, of each pair its own, from which the
            iteration is made a second time. Defaults to 0: it is not.

    Returns:
        a row for each pair and number of steps: ``fixed`` and ``moving`` (names), ``step``; ``dice`` (mean over the
        labels), ``folded_percent``, ``similarity`` (mean local cross-correlation, window 5, higher is better),
        ``smoothness`` (diffusion loss; the training's loss is ``-similarity + smoothness_weight * smoothness``),
        ``residual`` (RMS over voxels of what the next step would change, in voxels), ``relative_residual`` (over the
        displacement after that step) and ``start_distance`` (RMS distance in voxels to where the random start is after
        as many steps). A displacement that is not finite has NaN for scores, and its pair ends there.

    Raises:
        TypeError: When the method is not iterated.
    """
    config = method.parser("evaluate")
    device = torch.device(config.get_parsed_content("device"))
    labels = list(config.get_parsed_content("labels"))
    network = config.get_parsed_content("network").eval()
    checkpoint = method.checkpoint
    if not isinstance(network, IteratedNet):
        raise TypeError(f"{method.title} is not iterated: there is no map whose steps could be scored.")
    if checkpoint is not None:
        load_weights(network, checkpoint)
    if config.get_parsed_content("batch_size") != 1 or as_flag(config.get_parsed_content("amp"), "amp"):
        raise ValueError("steps are scored with batch_size 1 and amp false.")
    _check_start(random_start_rms)

    def begin(initial_ddf: torch.Tensor | None = None) -> tuple[Callable[..., torch.Tensor], torch.Tensor, bool]:
        """The map, the state after the levels before the finest and its first step, and whether that was taken."""
        start, center = starting_point(network, moving, fixed, initial_ddf)
        first = {"name": "plain", "max_steps": 1, "tolerance": 0.0}
        state, record = network.solve_state(moving, fixed, start, **center, **first)
        return network.fixed_point_map(moving, fixed, **center), state, int(record.steps[0]) == 1

    rows: list[tuple[Any, ...]] = []
    for index, batch in enumerate(config.get_parsed_content("dataloader")):
        moving, _, (fixed,), _ = PreparePairBatch()(batch, device)
        moving_label, fixed_label = (torch.as_tensor(batch[key]).to(device) for key in ("moving_label", "fixed_label"))
        ndim = fixed.ndim - 2
        similarity = LocalNormalizedCrossCorrelationLoss(spatial_dims=ndim, kernel_size=5)
        with torch.no_grad():
            g, state, taken = begin()
            other = None
            if random_start_rms:
                shape = (1, ndim, *fixed.shape[2:])
                g_other, other, _ = begin(random_smooth_ddf(shape, random_start_rms, seed=index, device=device))
            for step in range(1, max(steps) + 1):
                ddf, state = state[:, :ndim], g(state)
                place = (str(batch["fixed_subject"][0]), str(batch["moving_subject"][0]), step)
                # a first step that is not finite is not taken by the solver
                if not taken or not bool(torch.isfinite(ddf).all()):
                    rows.append((*place, *[math.nan] * len(_SCORES)))
                    break
                if step in steps:
                    warped_label = warp_by_ddf(moving_label, ddf, mode="nearest")
                    residual = _rms(state[:, :ndim] - ddf)
                    scores = (
                        float(compute_label_dice(warped_label, fixed_label, labels, moving_label).nanmean()),
                        float(compute_folded_voxels(ddf)),
                        -float(similarity(warp_by_ddf(moving, ddf).float(), fixed.float())),
                        float(DiffusionLoss()(ddf)),
                        residual,
                        residual and residual / _rms(state[:, :ndim]),
                        math.nan if other is None else _rms(other[:, :ndim] - ddf),
                    )
                    rows.append((*place, *scores))
                if other is not None:
                    other = g_other(other)
    return pd.DataFrame(rows, columns=[*_PLACE, *_SCORES])


def write_step_scores(scores: pd.DataFrame, path: str | Path) -> None:
    """Write what :py:func:`score_steps` gives as CSV."""
    with replace_file(path) as temporary:
        scores.to_csv(temporary, index=False, na_rep="nan", lineterminator="\n")


def read_step_scores(path: str | Path) -> pd.DataFrame:
    """Read what :py:func:`write_step_scores` wrote; ``ValueError`` when the columns are others."""
    scores = pd.read_csv(path, dtype=str, keep_default_na=False)
    expected = [*_PLACE, *_SCORES]
    if list(scores) != expected:
        raise ValueError(f"{path}: expected the columns {', '.join(expected)}, got {', '.join(scores)}.")
    return scores.astype({"step": int, **dict.fromkeys(_SCORES, float)})


def step_curves(scores: pd.DataFrame) -> pd.DataFrame:
    """
    Curves of all scores of one method.

    Args:
        scores: see :py:func:`score_steps`, of one pair at least, else ``ValueError``. A statistic is NaN wherever a
            pair has no score, and not one over the pairs that are left.

    Returns:
        a row for each number of steps, columns ``(score, statistic)``: ``mean`` and ``median`` over the pairs, ``sem``
        (standard error of the mean) and ``within``, the share of the pairs at or below the score's limit in ``LIMITS``.
    """
    if scores.empty:
        raise ValueError("scores: expected those of at least one pair, got none.")
    scored = scores[scores["dice"].notna()]
    steps = sorted(set((scores if scored.empty else scored)["step"]))
    values = scores.set_index(_PLACE).unstack("step")
    curves = {}
    for name in _SCORES:
        of_pairs = values[name][steps]
        mean, median = of_pairs.mean(skipna=False), of_pairs.median(skipna=False)
        within = (of_pairs <= LIMITS.get(name, -math.inf)).mean()
        curves[name] = pd.DataFrame(
            {"mean": mean, "sem": of_pairs.sem(skipna=False), "median": median, "within": within}
        )
    return pd.concat(curves, axis=1)


def step_table(curves: Mapping[str, pd.DataFrame], trained_steps: Mapping[str, int], steps: Sequence[int] = ()) -> str:
    """
    The paper's Table 2 as Markdown: each method at the steps of its training, at its best Dice and at the last step.
    Residual and start distance are medians over the pairs, with the share of them within ``LIMITS``, the others means.

    Args:
        curves: by title of a method what :py:func:`step_curves` gives.
        trained_steps: by title, the steps that the method was trained with, 0 where nothing was trained.
        steps: further steps.
    """
    residual, distance = (f"<= {LIMITS[k]:g} (% of pairs)" for k in ("residual", "start_distance"))
    names = ["Dice %", "folded %", "similarity", "residual", residual, "relative residual", "start distance", distance]
    rows = []
    for title, of_method in curves.items():
        words: dict[int, list[str]] = {trained_steps[title]: ["trained"]} if trained_steps[title] else {}
        words.setdefault(best_step(of_method), []).append("best Dice")
        words.setdefault(int(of_method.index[-1]), []).append("last")
        for step in sorted({*words, *steps}):
            cells = ["-"] * len(names)
            if step in of_method.index:
                at = of_method.loc[step]
                cells = [f"{factor * at[score, statistic]:{form}}" for score, statistic, factor, form in _CELLS]
                if not math.isfinite(at["start_distance", "median"]):  # no random starts, or a pair that was lost
                    cells[-2:] = ["-", "-"]
            rows.append([title, str(step), ", ".join(words.get(step, [])), *cells])
    return markdown_table(["method", "steps", "", *names], rows, left=(0, 2)) + "\n"


def converge(
    bundle_dir: str | Path,
    results_dir: str | Path,
    methods: Sequence[str] = ITERATED_METHODS,
    overlays: Sequence[str | Path] = (),
    overrides: Mapping[str, Any] | None = None,
    max_steps: int = 96,
    random_start_rms: float = 3.0,
    table_steps: Sequence[int] = (),
    output_dir: str | Path | None = None,
    overwrite: bool = False,
) -> dict[str, pd.DataFrame]:
    """
    Iterate methods of a bundle that were trained with ``--bundle_root <results_dir>/<method>`` for many steps, score
    them on the way, and write ``convergence.md`` (trained against best and last steps), ``convergence.png`` and, below
    each method's folder, the scores of every pair as CSV, which are read again with the same weights and settings. A
    method that fails is named below the table with the reason.

    Args:
        bundle_dir, results_dir, methods, overlays: see :py:func:`monai_deq.evaluation.compare`.
        overrides: entries of the bundle's configuration; ``split`` is ``"validation"`` unless given (paper, Table 2).
        max_steps: number of steps, of networks with levels on the finest. Defaults to 96 (paper, Fig. 3).
        random_start_rms: see :py:func:`score_steps`; 0 saves half of the time.
        table_steps: steps for which the table has rows too, of those that are scored.
        output_dir: folder of table and figure. Defaults to ``results_dir``.
        overwrite: replace existing ones, which is ``FileExistsError`` else.

    Returns:
        by title of a method its curves, see :py:func:`step_curves`.
    """
    steps, table_steps = default_steps(max_steps), bundle.as_list(table_steps)
    if not set(table_steps) <= set(steps):
        raise ValueError(f"table_steps must be among the steps that are scored, {steps}, got {table_steps}.")
    _check_start(random_start_rms)
    overrides = {"split": "validation", **(overrides or {})}
    entries = bundle.bundle_methods(methods, bundle_dir, results_dir, overlays, overrides)
    output_dir = Path(results_dir if output_dir is None else output_dir)
    table, picture = bundle.new_files(output_dir, ["convergence.md", "convergence.png"], overwrite)
    # the fingerprint of a method leaves this folder's code out
    scoring = hashlib.sha256(inspect.getsource(score_steps).encode()).hexdigest()[:6]
    curves, trained_steps, failures = dict[str, pd.DataFrame](), dict[str, int](), dict[str, str]()
    for name, method in entries.items():
        with bundle.noted_failure(name, failures, name):
            title = method.title
            method.check_trained()
            trained = method.trained_steps
            folder = method.root / "convergence" / method.fingerprint("evaluate")
            path = folder / f"steps_{max_steps}_from_{random_start_rms:g}_{scoring}.csv"
            if not bundle.already_there(title, path):
                logger.info(f"{title}: {max_steps} steps")
                marks = sorted({*steps, *([trained] if 0 < trained <= max_steps else [])})
                write_step_scores(score_steps(method, marks, random_start_rms), path)
            curves[title], trained_steps[title] = step_curves(read_step_scores(path)), trained
    text = step_table(curves, trained_steps, table_steps)
    text += "".join(f"\n{name} failed: {why}\n" for name, why in failures.items())
    with replace_file(table) as path:
        path.write_text(text, encoding="utf-8")
    if curves and figures_available():
        plot_steps(curves, trained_steps, picture, overwrite=True)
    print(text)
    return curves
