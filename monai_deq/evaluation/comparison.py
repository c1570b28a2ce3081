# SPDX-License-Identifier: Apache-2.0
"""The methods of a bundle compared on one data set: scores, tests, costs, one table (paper, Table 1)."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from monai_deq.evaluation.costs import kept_costs
from monai_deq.evaluation.figures import plot_boxes
from monai_deq.evaluation.methods import BundleMethod, as_list, bundle_methods, check_count, evaluate_method, new_files
from monai_deq.evaluation.scores import MethodResult, metric_columns
from monai_deq.evaluation.tables import ComparisonTable
from monai_deq.visualize import figures_available

__all__ = ["METHODS", "METRICS", "compare"]

logger = logging.getLogger("monai_deq")

#: the systems of the paper, in the order of its tables, and the bundle's own
METHODS = ("affine", "elastix", "voxelmorph", "unrolling", "gradirn", "riir", "deqreg12", "deqreg", "deqreg_pool")
#: metrics of the table
METRICS = ("dice", "hd", "hd95", "folded_percent", "std_log_jacobian", "sdlogj_learn2reg", "ndv_percent")
#: methods that cannot be best: a zero displacement has no folds
_UNRANKED = ("affine",)
_STATED = ("data_set", "split", "label_set", "spatial_size", "jacobian")


def compare(
    bundle_dir: str | Path,
    results_dir: str | Path,
    methods: Sequence[str] = METHODS,
    overlays: Sequence[str | Path] = (),
    overrides: Mapping[str, Any] | None = None,
    reference: str = "deqreg",
    metrics: Sequence[str] = METRICS,
    cost_rounds: int = 5,
    output_dir: str | Path | None = None,
    overwrite: bool = False,
) -> ComparisonTable:
    """
    Compare methods of a bundle that were trained with ``--bundle_root <results_dir>/<method>``, and those that need no
    training, and write ``comparison.md``, ``.csv``, ``.json`` and ``.png``. What has been evaluated or measured before
    with the same weights and settings is read again. A method that fails is a row with the reason. Methods without
    training work on the grid of the reference; one trained on another is a failure, unless ``spatial_size`` is given.

    Args:
        bundle_dir, results_dir: folders of the bundle and of the methods' folders.
        methods: names of overlays in the bundle's ``methods`` folder or of folders in ``results_dir``, row by row.
        overlays: configuration files of the data set, such as ``slices.json``.
        overrides: entries of the bundle's configuration for all methods, such as ``dataset_dir``.
        reference: the method that the others are tested against.
        metrics: metrics of the table, as the evaluation names them.
        cost_rounds: how often training steps and inferences are timed, side by side; 0: no costs.
        output_dir: folder of the table. Defaults to ``results_dir``.
        overwrite: replace an existing table (else ``FileExistsError``), not the evaluations under ``results_dir``.
    """
    methods, metrics = as_list(methods), as_list(metrics)
    if methods and reference not in methods:
        raise ValueError(f"reference must be one of the methods {methods}, got {reference!r}.")
    metric_columns(metrics)
    check_count(cost_rounds, "cost_rounds", 0)
    entries = bundle_methods(methods, bundle_dir, results_dir, overlays, overrides)
    output_dir = Path(results_dir if output_dir is None else output_dir)
    *_, picture = new_files(output_dir, [f"comparison.{s}" for s in ("md", "csv", "json", "png")], overwrite)

    if "spatial_size" not in (overrides or {}):
        size = _trained_size(entries, reference)
        entries = {n: m if m.is_trained else m.with_overrides(**size) for n, m in entries.items()}
    evaluated = {n: evaluate_method(method, ranked=n not in _UNRANKED) for n, method in entries.items()}
    results = {name: result for name, (result, _) in evaluated.items()}
    summaries = {name: summary for name, (_, summary) in evaluated.items()}
    _fail_other_grids(results, summaries, reference)

    usable = {name: entries[name] for name, result in results.items() if result.failure is None}
    costs = kept_costs(Path(results_dir) / "costs", usable, int(cost_rounds)) if cost_rounds else {}
    for name, method in usable.items():
        cost = dict(costs.get(name, {}))
        if method.is_trained:
            training = method.record.training
            cost |= {key: training.get(key) for key in ("training_pairs", "smoothness_weight")}
            cost["steps"] = summaries[name]["summary"].get("steps", {}).get("mean")
        results[name] = replace(results[name], cost=cost)

    described = next((s for s in (summaries[reference], *summaries.values()) if s), {})
    info: dict[str, Any] = {k: described[k] for k in _STATED if k in described}
    table = ComparisonTable(list(results.values()), metrics, reference, info)
    files = table.write(output_dir, overwrite=overwrite)
    if usable and figures_available():
        plot_boxes(list(results.values()), metrics, picture, overwrite=overwrite)
        files.append(picture)
    print(table.to_markdown())
    logger.info(f"wrote {', '.join(map(str, files))}")
    return table


def _trained_size(entries: Mapping[str, BundleMethod], reference: str) -> dict[str, Any]:
    """Grid that the reference was trained on, or else the first method that has a record."""
    for method in (entries[name] for name in (reference, *entries) if entries[name].is_trained):
        with suppress(Exception):  # its evaluation will say what is wrong
            return {"spatial_size": method.record.spatial_size}
    return {}


def _fail_other_grids(results: dict[str, MethodResult], summaries: dict[str, dict[str, Any]], reference: str) -> None:
    """Folded voxels and distances on different grids do not compare."""
    reference = next((n for n in (reference, *reversed(summaries)) if summaries[n]), reference)
    expected = summaries[reference].get("spatial_size")
    for name, summary in summaries.items():
        if summary and (size := summary.get("spatial_size")) != expected:
            reason = f"evaluated at the size {size}, {reference} at {expected}: train at one size, or give spatial_size"
            results[name] = replace(results[name], scores=pd.DataFrame(), failure=reason)
