# SPDX-License-Identifier: Apache-2.0
"""Accuracy against time and evaluations of the network: solvers and step limits of trained methods, side by side."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from monai_deq.evaluation.benchmark_cases import check_cases, check_count, plain_rows, with_time
from monai_deq.evaluation.method_costs import FirstPair
from monai_deq.evaluation.method_evaluation import BundleMethod, evaluate_method, refuse_unknown, root_cause
from monai_deq.evaluation.timing import time_side_by_side
from monai_deq.utils import as_flag, refuse_existing, replace_file

__all__ = ["SPEED_CASES", "SpeedRow", "measure_speed", "speed_table"]

_ANDERSON = {"method": "deqreg_pool", "solver": "anderson", "coarse_solver": "anderson"}

#: what is measured by default: by title the overlay and further entries of the bundle's ``evaluate.json``
SPEED_CASES: dict[str, dict[str, Any]] = {
    "RIIR": {"method": "riir"},
    "DEQReg, plain": {"method": "deqreg_pool"},
    "DEQReg, Anderson": _ANDERSON,
    "DEQReg, Anderson to 0.003 voxel": {**_ANDERSON, "tolerance": 0.003, "coarse_tolerance": 0.001},
    "DEQReg, Anderson to 0.004 voxel": {**_ANDERSON, "tolerance": 0.004, "coarse_tolerance": 0.002},
    "DEQReg, Anderson to 0.005 voxel": {**_ANDERSON, "tolerance": 0.005, "coarse_tolerance": 0.005},
}


@dataclass(frozen=True)
class SpeedRow:
    """
    One case.

    Args:
        title: its name.
        dice: mean Dice over the pairs.
        folded_percent: mean share of folded voxels.
        evaluations: mean number of evaluations of the network, see
            :py:meth:`monai_deq.solvers.SolverRecord.evaluations`.
        converged: share of the pairs that met the tolerance.
        seconds: median time of the first pair, without loading and warping of labels.
        time_ratio: the same in terms of the first case's.
        failure: why it could not be measured, ``None`` where it could.
    """

    title: str
    dice: float = float("nan")
    folded_percent: float = float("nan")
    evaluations: float = float("nan")
    converged: float = float("nan")
    seconds: float = float("nan")
    time_ratio: float = float("nan")
    failure: str | None = None


def measure_speed(
    bundle_dir: str | Path,
    results_dir: str | Path,
    output_dir: str | Path,
    cases: Mapping[str, Mapping[str, Any]] | None = None,
    overlays: Sequence[str | Path] = (),
    rounds: int = 5,
    overwrite: bool = False,
    **overrides: Any,
) -> list[SpeedRow]:
    """
    Evaluate trained methods of a bundle with different solvers and step limits, time them side by side on the first
    pair, and write ``speed.json`` and ``speed.md``. Evaluations with the same weights and settings are kept below the
    methods' folders, as those of :py:func:`monai_deq.evaluation.compare`.

    Args:
        bundle_dir: folder of the bundle.
        results_dir: folder of the methods' folders, of trainings with ``--bundle_root <results_dir>/<method>``.
        output_dir: folder of what is written.
        cases: by title a dictionary with the overlay's name under ``method`` and further entries of the bundle's
            ``evaluate.json``. Times are given in terms of the first. Defaults to RIIR and the bundle's own method with
            several solvers.
        overlays: configuration files of the data set, such as ``slices.json``. Defaults to none.
        rounds: number of times that each is timed, all in turns. Defaults to 5.
        overwrite: replace existing files. Defaults to ``False``.
        overrides: entries of the bundle's configuration for all, such as ``dataset_dir``.

    Returns:
        The rows.

    Raises:
        FileExistsError: When a file is there already and ``overwrite`` is not set.
        ValueError: When an argument is out of its range.
    """
    logger = logging.getLogger("monai_deq")
    overlays = [overlays] if isinstance(overlays, (str, Path)) else list(overlays)
    cases = check_cases(SPEED_CASES if cases is None else cases)
    check_count(rounds, "rounds")
    output_dir = Path(output_dir)
    files = [output_dir / f"speed.{s}" for s in ("json", "md")]
    if not as_flag(overwrite, "overwrite"):
        refuse_existing(files, "Replace it with --overwrite true, or name another --output_dir.")

    methods: dict[str, BundleMethod] = {}
    for title, case in cases.items():
        settings = {**overrides, **{k: v for k, v in case.items() if k != "method"}}
        name = case["method"]
        methods[title] = BundleMethod(name, Path(bundle_dir), Path(results_dir) / name, overlays, settings)
        refuse_unknown([methods[title]], settings, "speed")
    rows: dict[str, SpeedRow] = {}
    functions, device = {}, torch.device("cpu")
    for title, method in methods.items():
        result, summary = evaluate_method(method)
        if result.failure is not None:
            rows[title] = SpeedRow(title, failure=result.failure)
            continue
        try:
            first = FirstPair(method)
        except Exception as e:  # the others still have their rows
            logger.error(f"{title} could not be timed", exc_info=e)
            rows[title] = SpeedRow(title, failure=root_cause(e))
            continue
        functions[title], device = first.register, first.device
        dice, folded, evaluations = (
            float(summary["summary"].get(key, {}).get("mean", "nan"))
            for key in ("dice", "folded_percent", "evaluations")
        )
        stopped = [bool(pair["converged"]) for pair in summary["pairs"]]
        rows[title] = SpeedRow(title, dice, folded, evaluations, sum(stopped) / len(stopped))
    logger.info("time of a registration, side by side")
    timings = time_side_by_side(functions, rounds=rounds, device=device)
    reference = timings.get(next(iter(cases)))
    for title, timing in timings.items():
        rows[title] = with_time(rows[title], timing, reference)

    ordered = [rows[title] for title in cases]
    content = {
        "cases": cases,
        "settings": {k: v for k, v in overrides.items() if k != "dataset_dir"},
        "rows": plain_rows(ordered),
    }
    with replace_file(files[0]) as path:
        path.write_text(json.dumps(content, indent=2, default=str) + "\n")
    text = speed_table(ordered)
    with replace_file(files[1]) as path:
        path.write_text(text)
    print(text)
    return ordered


def speed_table(rows: Sequence[SpeedRow]) -> str:
    """
    The rows as Markdown.

    Args:
        rows: the cases; times are in terms of the first.

    Raises:
        ValueError: When there are none.
    """
    if not rows:
        raise ValueError("rows must not be empty.")
    names = ["Dice %", "folded %", "evaluations", "converged %", "time (s)", f"time / {rows[0].title}"]
    lines = [f"| case | {' | '.join(names)} |", f"| --- |{' ---: |' * len(names)}"]
    for row in rows:
        cells = [
            f"{100 * row.dice:.2f}",
            f"{row.folded_percent:.3f}",
            f"{row.evaluations:.1f}",
            f"{100 * row.converged:.0f}",
            f"{row.seconds:.2f}",
            f"{row.time_ratio:.2f}",
        ]
        if row.failure is not None:
            cells = ["failed: " + row.failure.replace("|", "/"), *["-"] * (len(names) - 1)]
        lines.append(f"| {row.title} | {' | '.join('-' if c == 'nan' else c for c in cells)} |")
    return "\n".join(lines) + "\n"
