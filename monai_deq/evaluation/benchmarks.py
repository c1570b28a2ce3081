# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of a bundle's systems: training memory against steps (paper, Fig. 2c), a registration's time and memory
against the size of the images, and accuracy against time of solvers and step limits."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pandas as pd
import torch
import torch.nn as nn

from monai_deq.evaluation.costs import gradient_step
from monai_deq.evaluation.figures import figures_available, plot_lines
from monai_deq.evaluation.measurements import Timing, time_side_by_side, training_memory
from monai_deq.evaluation.methods import (
    BundleMethod,
    FirstPair,
    as_list,
    check_count,
    evaluate_method,
    new_files,
    refuse_unknown,
    root_cause,
)
from monai_deq.evaluation.tables import cell_text, markdown_table
from monai_deq.inferers import FixedPointInferer
from monai_deq.utils import json_ready, replace_file, write_json

__all__ = ["MEMORY_CASES", "SCALING_CASES", "SPEED_CASES", "measure_memory", "measure_scaling", "measure_speed"]

logger = logging.getLogger("monai_deq")

Cases = Mapping[str, Mapping[str, Any]]

#: systems whose training memory is measured, the first is what the others are compared with: by title the overlay,
#: which of the measurement's lists of steps it has (``one``, ``equilibrium`` or ``unrolled``), and settings
MEMORY_CASES: dict[str, dict[str, Any]] = {
    "VoxelMorph": {"method": "voxelmorph", "steps": "one"},
    "one step of the U-Net": {"method": "deqreg", "steps": "one", "num_states": 0, "phantom_steps": 1},
    "Unrolling": {"method": "unrolling", "steps": "unrolled"},
    "GraDIRN": {"method": "gradirn", "steps": "unrolled"},
    "RIIR": {"method": "riir", "steps": "unrolled"},
    "DEQReg": {"method": "deqreg"},
    "DEQReg, recomputed": {"method": "deqreg", "checkpointed": True},
    "DEQReg, recomputed in parts": {"method": "deqreg", "checkpointed": True, "checkpoint_parts": 4},
}
#: systems whose registration is measured: by title the overlay, solver settings, and settings of ``train.json``
SCALING_CASES: dict[str, dict[str, Any]] = {
    "VoxelMorph": {"method": "voxelmorph"},
    "GraDIRN, 3 x 3 steps": {"method": "gradirn", "solver_steps": 3},
    "RIIR, 6 steps": {"method": "riir", "solver_steps": 6},
    "DEQReg, 6 evaluations": {"method": "deqreg_pool", "solver_steps": 6},
    "DEQReg, Anderson, 6 evaluations": {"method": "deqreg_pool", "solver_steps": 6, "solver": "anderson"},
}
_ANDERSON = {"method": "deqreg_pool", "solver": "anderson", "coarse_solver": "anderson"}
#: ways of solving that are compared: by title the method and settings of the bundle's ``evaluate.json``
SPEED_CASES: dict[str, dict[str, Any]] = {
    "RIIR": {"method": "riir"},
    "DEQReg, plain": {"method": "deqreg_pool"},
    "DEQReg, Anderson": _ANDERSON,
    "DEQReg, Anderson to 0.003 voxel": {**_ANDERSON, "tolerance": 0.003, "coarse_tolerance": 0.001},
    "DEQReg, Anderson to 0.004 voxel": {**_ANDERSON, "tolerance": 0.004, "coarse_tolerance": 0.002},
    "DEQReg, Anderson to 0.005 voxel": {**_ANDERSON, "tolerance": 0.005, "coarse_tolerance": 0.005},
}
SIZES = ((32, 32, 32), (64, 64, 64), (96, 96, 96), (128, 128, 128), (160, 192, 224))
#: what :py:func:`measure_scaling` gives the inferer; other settings of its cases are the network's
_SOLVING = {"solver_steps": "max_steps", "solver": "solver", "solver_options": "solver_options"}


def _checked(cases: Cases) -> dict[str, dict[str, Any]]:
    for title, case in cases.items():
        if not isinstance(case, Mapping) or not isinstance(case.get("method"), str):
            raise ValueError(f"cases: {title!r} must be a dictionary with the name of an overlay under 'method'.")
    if not cases:
        raise ValueError("cases must not be empty.")
    return {title: dict(json_ready(case)) for title, case in cases.items()}


def _refuse_unknown(cases: Cases, bundle_dir: str | Path, overrides: Mapping[str, Any]) -> None:
    refuse_unknown((BundleMethod(c["method"], Path(bundle_dir), Path(".")) for c in cases.values()), overrides)


def _size_text(size: Sequence[int]) -> str:
    return " x ".join(map(str, size))


def _table(rows: pd.DataFrame, names: Mapping[str, str], numbers: Mapping[str, tuple[str, str, float]]) -> str:
    """Measurements as Markdown: the headings of what is measured, then heading, format and factor of each number."""
    cells = []
    for _, row in rows.iterrows():
        cells.append([_size_text(row[k]) if isinstance(row[k], tuple) else str(row[k]) for k in names])
        if row["failure"] is not None:
            cells[-1] += [f"failed: {cell_text(row['failure'])}", *["-"] * (len(numbers) - 1)]
        else:
            shown = ((scale * row[k], form) for k, (_, form, scale) in numbers.items())
            cells[-1] += ["-" if math.isnan(value) else f"{value:{form}}" for value, form in shown]
    left = [i for i, name in enumerate(names) if name != "steps"]
    return markdown_table([*names.values(), *(heading for heading, _, _ in numbers.values())], cells, left) + "\n"


def _frame(rows: Sequence[Mapping[str, Any]], numbers: Sequence[str]) -> pd.DataFrame:
    """Rows as a table with all columns of numbers, NaN where one could not be measured, and with ``failure``."""
    whole = [{**row, **{k: row.get(k) for k in (*numbers, "failure")}} for row in rows]
    return pd.DataFrame(whole, dtype=object).astype(dict.fromkeys(numbers, float))


def _write(files: Sequence[Path], content: Mapping[str, Any], rows: pd.DataFrame, text: str) -> None:
    """JSON and Markdown of a benchmark."""
    write_json(files[0], {**content, "rows": rows.to_dict("records")})
    with replace_file(files[1]) as path:
        path.write_text(text, encoding="utf-8")
    print(text)


def _note_times(rows: Mapping[str, dict[str, Any]], timings: Mapping[str, Timing], reference: str) -> None:
    """Put times into the rows, in seconds and in terms of the reference, where that could be measured."""
    for title, timing in timings.items():
        if timing.failure is not None:
            rows[title]["failure"] = timing.failure
            continue
        ratio = timing.ratio_to(timings[reference]) if reference in timings else math.nan
        rows[title] |= {"seconds": timing.median, "time_ratio": ratio}


class _Untrained(NamedTuple):
    """A network as it is before training, its parameters and buffers, its loss, and a random pair on its device."""

    network: nn.Module
    tensors: list[torch.Tensor]
    loss: nn.Module
    moving: torch.Tensor
    fixed: torch.Tensor


def _untrained(
    name: str, bundle_dir: str | Path, size: Sequence[int], overrides: Mapping[str, Any], settings: Mapping[str, Any]
) -> _Untrained:
    method = BundleMethod(name, Path(bundle_dir), Path("."), (), overrides)
    parser = method.parser("train", spatial_dims=len(size), **settings)
    # no data set is looked for, and all steps are made: a network before training is at rest
    parser.update({"found": SimpleNamespace(is_sample=False), "solver#tolerance": 0.0})
    torch.manual_seed(0)
    network, loss = parser.get_parsed_content("network"), parser.get_parsed_content("loss")
    generator = torch.Generator().manual_seed(1)
    pair = torch.rand(2, 1, 1, *size, generator=generator).to(torch.device(parser.get_parsed_content("device")))
    return _Untrained(network, [*network.parameters(), *network.buffers()], loss, *pair)


def measure_memory(
    bundle_dir: str | Path,
    output_dir: str | Path,
    spatial_size: Sequence[int] = (64, 64, 64),
    steps: Sequence[int] = (6, 12, 24, 48, 96),
    unrolled_steps: Sequence[int] = (1, 3, 6, 12),
    cases: Cases | None = None,
    rounds: int = 0,
    overrides: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> pd.DataFrame:
    """
    Measure the memory of one training step (forward, loss, backward; one pair of random images) of the systems of a
    bundle, as they are before training, and write ``memory.json``, ``.md`` and ``.png``, see
    :py:func:`monai_deq.evaluation.training_memory`.

    Args:
        bundle_dir: folder of the bundle.
        output_dir: folder of what is written.
        spatial_size: size of the images, 2-D or 3-D. Defaults to 64 x 64 x 64.
        steps: steps T of the equilibrium systems. Defaults to 6 to 96.
        unrolled_steps: steps of the unrolled ones, of one with levels on each of them. Defaults to 1 to 12.
        cases: the systems, see :py:data:`MEMORY_CASES`, the default.
        rounds: number of times that each is timed too, all in turns, at its largest number of steps. Defaults to 0.
        overrides: entries of the bundle's ``train.json`` for all, such as ``device``. Defaults to none.
        overwrite: replace existing files. Defaults to ``False``.

    Returns:
        by system and number of steps: ``title``, ``steps``, ``kind`` (what the peak is), ``saved_mb`` (peak of what
        autograd keeps, 10^6 bytes), ``peak_mb`` (of all that is allocated), ``ratio`` (of the peak to the first row's),
        ``seconds`` (median, of the last row of a system) and ``failure``.

    Raises:
        FileExistsError: When a file is there already and ``overwrite`` is not set.
        ValueError: When an argument is out of its range.
    """
    size = [int(n) for n in spatial_size]
    if len(size) not in (2, 3) or min(size) < 1:
        raise ValueError(f"spatial_size must be two or three sizes, got {list(spatial_size)}.")
    lists = {"one": [1], "equilibrium": list(steps), "unrolled": list(unrolled_steps)}
    for name, values in (("steps", steps), ("unrolled_steps", unrolled_steps)):
        if not values or any(int(n) != n or n < 1 for n in values):
            raise ValueError(f"{name} must be whole numbers of at least 1, got {list(values)}.")
    check_count(rounds, "rounds", 0)
    cases, overrides = _checked(MEMORY_CASES if cases is None else cases), dict(overrides or {})
    files = new_files(output_dir, [f"memory.{s}" for s in ("json", "md", "png")], overwrite)
    _refuse_unknown(cases, bundle_dir, overrides)

    def prepared(case: Mapping[str, Any], n: int) -> tuple[_Untrained, Callable[[], None]]:
        settings = {k: v for k, v in case.items() if k not in ("method", "steps")}
        system = _untrained(case["method"], bundle_dir, size, overrides, {**settings, "max_steps": n})
        target = {"moving": system.moving, "fixed": system.fixed}
        return system, gradient_step(system.network.train(), system.loss, system.moving, target)

    rows: list[dict[str, Any]] = []
    for title, case in cases.items():
        for n in lists[case.get("steps", "equilibrium")]:
            logger.info(f"{title}, {n} steps")
            rows.append({"title": title, "steps": n, "kind": ""})
            try:
                system, step = prepared(case, n)
                step()  # makes what is made once and kept, such as sampling grids
                memory = training_memory(step, system.tensors, system.moving.device)
                rows[-1] |= {"kind": memory.kind, "saved_mb": memory.saved_bytes / 1e6}
                rows[-1]["peak_mb"] = memory.peak_bytes / 1e6
                rows[-1]["ratio"] = rows[-1]["peak_mb"] / rows[0].get("peak_mb", math.nan)
            except Exception as e:  # the others still have their rows
                logger.error(f"{title} could not be measured", exc_info=e)
                rows[-1]["failure"] = root_cause(e)
    last = {row["title"]: row for row in rows}
    timed = [title for title, row in last.items() if rounds and "failure" not in row]
    if timed:
        functions, device = {}, torch.device("cpu")
        for title in timed:
            system, functions[title] = prepared(cases[title], last[title]["steps"])
            device = system.moving.device
        logger.info("time of a training step, side by side")
        for title, timing in time_side_by_side(functions, rounds=rounds, device=device).items():
            last[title]["seconds"] = timing.median

    numbers = {
        "saved_mb": ("kept for backward (MB)", ".1f", 1.0),
        "peak_mb": ("peak (MB)", ".1f", 1.0),
        "ratio": (f"peak / {rows[0]['title']}", ".3f", 1.0),
        "seconds": ("time (s)", ".2f", 1.0),
    }
    frame = _frame(rows, list(numbers))
    if not rounds:
        del numbers["seconds"]
    table = _table(frame, {"title": "system", "steps": "steps"}, numbers)
    kind = next((row["kind"] for row in rows if row["kind"]), "not measured")
    text = f"One training step (forward, loss, backward) on one pair of {_size_text(size)}; peak: {kind}.\n\n"
    _write(files, {"spatial_size": size, "settings": overrides}, frame, text + table)
    if figures_available():
        lines = {title: part.set_index("steps")["peak_mb"] for title, part in frame.groupby("title", sort=False)}
        plot_lines(lines, f"Training memory, {_size_text(size)} (MB)", files[2], overwrite=True)
    return frame


def measure_scaling(
    bundle_dir: str | Path,
    output_dir: str | Path,
    sizes: Sequence[Sequence[int]] = SIZES,
    cases: Cases | None = None,
    rounds: int = 3,
    overrides: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> pd.DataFrame:
    """
    Measure time and peak memory (without images and weights) of a registration by the systems of a bundle at several
    sizes, with networks as they are before training, random images and a fixed number of steps, and write
    ``scaling.json``, ``scaling.md``, ``scaling_time.png`` and ``scaling_memory.png``.

    Args:
        bundle_dir: folder of the bundle.
        output_dir: folder of what is written.
        sizes: sizes of the images, all 2-D or all 3-D. Defaults to 32^3 to 160 x 192 x 224.
        cases: the systems, the first the one that times are given in terms of. Defaults to :py:data:`SCALING_CASES`.
        rounds: number of times that each is timed, all in turns. Defaults to 3.
        overrides: entries of the bundle's ``train.json`` for all, such as ``device``. Defaults to none.
        overwrite: replace existing files. Defaults to ``False``.

    Returns:
        by size and system: ``title``, ``spatial_size``, ``peak_mb`` (10^6 bytes), ``seconds`` (median), ``time_ratio``
        (to the first system's) and ``failure``.

    Raises:
        FileExistsError: When a file is there already and ``overwrite`` is not set.
        ValueError: When an argument is out of its range.
    """
    shapes = [tuple(int(n) for n in size) for size in sizes]
    if not shapes or len({len(s) for s in shapes}) > 1 or any(len(s) not in (2, 3) or min(s) < 1 for s in shapes):
        raise ValueError(f"sizes must be sizes of images, all of two or all of three numbers, got {shapes}.")
    cases, overrides = _checked(SCALING_CASES if cases is None else cases), dict(overrides or {})
    check_count(rounds, "rounds")
    files = new_files(output_dir, [f"scaling{s}" for s in (".json", ".md", "_time.png", "_memory.png")], overwrite)
    _refuse_unknown(cases, bundle_dir, overrides)

    def registration(system: _Untrained, inferer: FixedPointInferer) -> None:
        with torch.no_grad():
            inferer(system.moving, system.network, system.fixed)

    first, rows = next(iter(cases)), list[dict[str, Any]]()
    for size in shapes:
        measured: dict[str, dict[str, Any]] = {}
        functions, device = {}, torch.device("cpu")
        for title, case in cases.items():
            logger.info(f"{title}, {_size_text(size)}")
            measured[title] = {"title": title, "spatial_size": size}
            settings = {k: v for k, v in case.items() if k not in ("method", *_SOLVING)}
            solving = {ours: case[name] for name, ours in _SOLVING.items() if name in case}
            try:
                system = _untrained(case["method"], bundle_dir, size, overrides, settings)
                system.network.eval()
                register = partial(registration, system, FixedPointInferer(tolerance=0.0, **solving))
                register()  # makes what is made once and kept, such as sampling grids
                device = system.moving.device
                measured[title]["peak_mb"] = training_memory(register, system.tensors, device).peak_bytes / 1e6
                functions[title] = register
            except Exception as e:  # the others still have their rows
                logger.error(f"{title} could not be measured", exc_info=e)
                measured[title]["failure"] = root_cause(e)
        if functions:
            _note_times(measured, time_side_by_side(functions, rounds=rounds, device=device), first)
        rows += measured.values()

    numbers = {
        "seconds": ("time (s)", ".3g", 1.0),
        "time_ratio": (f"time / {first}", ".2f", 1.0),
        "peak_mb": ("peak memory (MB)", ".1f", 1.0),
    }
    frame = _frame(rows, list(numbers))
    table = _table(frame, {"spatial_size": "size", "title": "system"}, numbers)
    _write(files, {"cases": cases, "settings": overrides}, frame, table)
    if figures_available():
        voxels = frame.assign(voxels=frame["spatial_size"].map(prod)).set_index("voxels")
        for key, what, file in (("seconds", "Time (s)", files[2]), ("peak_mb", "Peak memory (MB)", files[3])):
            lines = {title: part[key] for title, part in voxels.groupby("title", sort=False)}
            plot_lines(lines, f"{what} of a registration", file, overwrite=True, x_label="voxels")
    return frame


def measure_speed(
    bundle_dir: str | Path,
    results_dir: str | Path,
    output_dir: str | Path,
    cases: Cases | None = None,
    overlays: Sequence[str | Path] = (),
    rounds: int = 5,
    overrides: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> pd.DataFrame:
    """
    Evaluate trained methods of a bundle with different solvers and step limits, once as
    :py:func:`monai_deq.evaluation.compare`, time them side by side on the first pair, and write ``speed.json`` and
    ``speed.md``.

    Args:
        bundle_dir: folder of the bundle.
        results_dir: folder of the methods' folders, of trainings with ``--bundle_root <results_dir>/<method>``.
        output_dir: folder of what is written.
        cases: the ways, the first the one that times are given in terms of. Defaults to :py:data:`SPEED_CASES`.
        overlays: configuration files of the data set, such as ``slices.json``. Defaults to none.
        rounds: number of times that each is timed, all in turns. Defaults to 5.
        overrides: entries of the bundle's configuration for all, such as ``dataset_dir``. Defaults to none.
        overwrite: replace existing files. Defaults to ``False``.

    Returns:
        by case: ``title``, means of ``dice``, ``folded_percent`` and ``evaluations`` of the network, ``converged``
        (share of the pairs that met the tolerance), ``seconds`` (median of the first pair, without loading and warping
        of labels), ``time_ratio`` (to the first case's) and ``failure``.

    Raises:
        FileExistsError: When a file is there already and ``overwrite`` is not set.
        ValueError: When an argument is out of its range.
    """
    cases, overrides = _checked(SPEED_CASES if cases is None else cases), dict(overrides or {})
    check_count(rounds, "rounds")
    files = new_files(output_dir, ["speed.json", "speed.md"], overwrite)
    methods: dict[str, BundleMethod] = {}
    for title, case in cases.items():
        name, settings = case["method"], {**overrides, **{k: v for k, v in case.items() if k != "method"}}
        methods[title] = BundleMethod(name, Path(bundle_dir), Path(results_dir) / name, as_list(overlays), settings)
        refuse_unknown([methods[title]], settings)
    rows: dict[str, dict[str, Any]] = {title: {"title": title} for title in cases}
    functions, device = {}, torch.device("cpu")
    for title, method in methods.items():
        result, summary = evaluate_method(method)
        if result.failure is not None:
            rows[title]["failure"] = result.failure
            continue
        try:
            first = FirstPair(method)
        except Exception as e:  # the others still have their rows
            logger.error(f"{title} could not be timed", exc_info=e)
            rows[title]["failure"] = root_cause(e)
            continue
        functions[title], device = first.register, first.device
        for key in ("dice", "folded_percent", "evaluations"):
            rows[title][key] = summary["summary"].get(key, {}).get("mean")
        rows[title]["converged"] = float(pd.DataFrame(summary["pairs"])["converged"].mean())
    if functions:
        logger.info("time of a registration, side by side")
        _note_times(rows, time_side_by_side(functions, rounds=rounds, device=device), next(iter(cases)))

    numbers = {
        "dice": ("Dice %", ".2f", 100.0),
        "folded_percent": ("folded %", ".3f", 1.0),
        "evaluations": ("evaluations", ".1f", 1.0),
        "converged": ("converged %", ".0f", 100.0),
        "seconds": ("time (s)", ".2f", 1.0),
        "time_ratio": (f"time / {next(iter(cases))}", ".2f", 1.0),
    }
    frame = _frame(list(rows.values()), list(numbers))
    settings = {k: v for k, v in overrides.items() if k != "dataset_dir"}
    _write(files, {"cases": cases, "settings": settings}, frame, _table(frame, {"title": "case"}, numbers))
    return frame
