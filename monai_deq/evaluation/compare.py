# SPDX-License-Identifier: Apache-2.0
"""The methods of a bundle compared on one data set: scores, tests, costs, one table (paper, Table 1)."""

from __future__ import annotations

import hashlib
import json
import logging
import platform
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from monai.utils import optional_import

from monai_deq.evaluation.box_plots import box_plots
from monai_deq.evaluation.comparison_table import ComparisonTable
from monai_deq.evaluation.method_costs import measure_costs
from monai_deq.evaluation.method_evaluation import BundleMethod, evaluate_method, refuse_unknown
from monai_deq.evaluation.method_results import MethodResult, metric_columns
from monai_deq.utils import as_flag, refuse_existing, replace_file

__all__ = ["METHODS", "METRICS", "compare"]

#: the systems of the paper, in the order of its tables, and the bundle's own
METHODS = ("affine", "elastix", "voxelmorph", "unrolling", "gradirn", "riir", "deqreg12", "deqreg", "deqreg_pool")
#: metrics of the table
METRICS = ("dice", "hd", "hd95", "folded_percent", "std_log_jacobian", "sdlogj_learn2reg", "ndv_percent")


def compare(
    bundle_dir: str | Path,
    results_dir: str | Path,
    methods: Sequence[str] = METHODS,
    overlays: Sequence[str | Path] = (),
    reference: str = "deqreg",
    unranked: Sequence[str] = ("affine",),
    metrics: Sequence[str] = METRICS,
    costs: bool = True,
    cost_rounds: int = 5,
    output_dir: str | Path | None = None,
    overwrite: bool = False,
    **overrides: Any,
) -> ComparisonTable:
    """
    Compare methods of a bundle that were trained with ``--bundle_root <results_dir>/<method>``, and those that need no
    training, and write ``comparison.md``, ``.csv``, ``.json`` and ``.png``.

    Each method is evaluated by the bundle's ``evaluate.json`` with its overlay. What has been evaluated or measured
    before with the same weights and settings is read again, not repeated. A method that fails is a row of the table
    with the reason. Methods without training work on the grid that the reference was trained on; one that was trained
    on another grid than the reference is a failure, unless ``spatial_size`` is given.

    Args:
        bundle_dir: folder of the bundle.
        results_dir: folder of the methods' folders.
        methods: names of overlays in the bundle's ``methods`` folder, in the order of the rows. Defaults to the
            systems of the paper and the bundle's own.
        overlays: configuration files of the data set, such as ``slices.json``. Defaults to none.
        reference: the method that the others are tested against. Defaults to ``"deqreg"``.
        unranked: methods that cannot be best. Defaults to ``("affine",)``: a zero displacement has no folds.
        metrics: metrics of the table, as the evaluation names them.
        costs: measure training memory and time and inference time, all methods side by side. Defaults to ``True``.
        cost_rounds: number of times that each is timed. Defaults to 5.
        output_dir: folder of the table. Defaults to ``results_dir``.
        overwrite: replace an existing table; the evaluations kept under ``results_dir`` are never replaced. Defaults
            to ``False``.
        overrides: entries of the bundle's configuration for all methods, such as ``dataset_dir``.

    Returns:
        The table.

    Raises:
        FileExistsError: When there is a table already and ``overwrite`` is not set.
        ValueError: When an argument is out of its range.
    """
    logger = logging.getLogger("monai_deq")
    methods, metrics, unranked = (_listed(v) for v in (methods, metrics, unranked))
    overlays = [overlays] if isinstance(overlays, (str, Path)) else list(overlays)
    if not methods or len(set(methods)) != len(methods):
        raise ValueError(f"methods must be names, each once, got {methods}.")
    if reference not in methods:
        raise ValueError(f"reference must be one of the methods {methods}, got {reference!r}.")
    metric_columns(metrics)
    if int(cost_rounds) != cost_rounds or cost_rounds < 1:
        raise ValueError(f"cost_rounds must be a whole number of at least 1, got {cost_rounds}.")
    available = sorted(p.stem for p in (Path(bundle_dir) / "methods").glob("*.json"))
    if unknown := [name for name in methods if name not in available]:
        raise ValueError(f"methods: no overlay for {unknown} in {Path(bundle_dir) / 'methods'}, there are {available}.")
    results_dir = Path(results_dir)
    output_dir = results_dir if output_dir is None else Path(output_dir)
    overwrite, costs = as_flag(overwrite, "overwrite"), as_flag(costs, "costs")
    if not overwrite:
        refuse_existing(
            [output_dir / f"comparison.{s}" for s in ("md", "csv", "json", "png")],
            "Replace it with --overwrite true, or name another --output_dir.",
        )
    entries = {name: BundleMethod(name, Path(bundle_dir), results_dir / name, overlays, overrides) for name in methods}
    refuse_unknown(entries.values(), overrides, "compare")
    # methods without training take the grid of the others
    shared: dict[str, Any] = {} if "spatial_size" in overrides else _trained_size(entries, reference)
    results, summaries = {}, {}
    for name, method in entries.items():
        own = shared if _untrained(method) else {}
        results[name], summaries[name] = evaluate_method(method, ranked=name not in unranked, **own)
    results = _on_one_grid(results, summaries, reference)

    for name, result in results.items():
        if result.failure is None and not _untrained(entries[name]):
            settings = entries[name].trained_with()
            entry = {k: settings.get(k) for k in ("training_pairs", "smoothness_weight")}
            steps = summaries[name]["summary"].get("steps", {}).get("mean")
            results[name] = replace(result, cost={**entry, "steps": steps})
    if costs:
        usable = {name: entries[name] for name, result in results.items() if result.failure is None}
        extra = {name: shared if _untrained(method) else {} for name, method in usable.items()}
        costs_of = _kept_costs(results_dir, usable, extra, cost_rounds)
        results = {n: replace(r, cost={**costs_of.get(n, {}), **(r.cost or {})}) for n, r in results.items()}

    described = next((s for s in (summaries[reference], *summaries.values()) if s), {})
    shown = ("data_set", "split", "label_set", "spatial_size", "jacobian")
    info: dict[str, Any] = {k: described[k] for k in shown if k in described}
    table = ComparisonTable(list(results.values()), metrics, reference, info)
    files = table.write(output_dir, overwrite=overwrite)
    if not optional_import("matplotlib")[1]:
        logger.warning('no box plots: they need matplotlib, pip install "monai_deq[figures]"')
    elif any(r.failure is None for r in results.values()):
        files.append(box_plots(list(results.values()), metrics, output_dir / "comparison.png", overwrite=overwrite))
    print(table.to_markdown())
    logger.info(f"wrote {', '.join(map(str, files))}")
    return table


def _listed(names: str | Sequence[str]) -> list[str]:
    """The command line gives one name as text."""
    return [names] if isinstance(names, str) else list(names)


def _trained_size(entries: Mapping[str, BundleMethod], reference: str) -> dict[str, Any]:
    """Grid that the reference was trained on, or else the first method that says so."""
    for name in (reference, *entries):
        try:
            settings = entries[name].trained_with()
        except Exception:  # its evaluation will say what is wrong
            continue
        if "spatial_size" in settings:
            return {"spatial_size": settings["spatial_size"]}
    return {}


def _untrained(method: BundleMethod) -> bool:
    try:
        return method.checkpoint is None
    except Exception:  # its evaluation will say what is wrong
        return False


def _on_one_grid(
    results: dict[str, MethodResult], summaries: dict[str, dict[str, Any]], reference: str
) -> dict[str, MethodResult]:
    """Folded voxels and distances on different grids do not compare."""
    reference = next((n for n in (reference, *reversed(summaries)) if summaries[n]), reference)
    expected = summaries[reference].get("spatial_size")
    out = dict(results)
    for name, summary in summaries.items():
        if summary and summary.get("spatial_size") != expected:
            reason = (
                f"evaluated at the size {summary.get('spatial_size')}, {reference} at {expected}: train at one size, "
                "or give --spatial_size"
            )
            out[name] = replace(results[name], scores={}, failure=reason)
    return out


def _kept_costs(
    results_dir: Path, methods: dict[str, BundleMethod], extra: dict[str, dict[str, Any]], rounds: int
) -> dict[str, dict[str, Any]]:
    """Costs measured side by side in one run, kept for this very set of methods, on this kind of machine."""
    if not methods:
        return {}
    key: list[Any] = [rounds, torch.__version__, torch.get_num_threads(), platform.processor(), platform.machine()]
    for name, method in methods.items():
        device = torch.device(method.parser("evaluate").get_parsed_content("device"))
        key += [name, method.fingerprint("evaluate", **extra[name]), method.fingerprint("train"), str(device)]
        key += [torch.cuda.get_device_name(device)] if device.type == "cuda" else []
    path = results_dir / "costs" / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12]}.json"
    if path.is_file():
        logging.getLogger("monai_deq").info(f"costs already measured, read from {path}")
        return json.loads(path.read_text())
    measured = measure_costs(methods, extra, rounds)
    # what failed for a passing reason, such as memory, is tried again
    if not any(str(v).startswith("failed") for cost in measured.values() for v in cost.values()):
        with replace_file(path) as temporary:
            temporary.write_text(json.dumps(measured, indent=2) + "\n")
    return measured
