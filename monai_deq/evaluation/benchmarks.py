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
from typing import Any

import pandas as pd
import torch
import torch.nn as nn

from monai_deq.evaluation.costs import gradient_step
from monai_deq.evaluation.figures import plot_lines
from monai_deq.evaluation.measurements import Timing, time_side_by_side, training_memory
from monai_deq.evaluation.methods import (
    BundleMethod,
    FirstPair,
    as_list,
    check_bundle,
    check_count,
    evaluate_method,
    new_files,
    noted_failure,
    refuse_unknown,
)
from monai_deq.evaluation.tables import cell_text, markdown_table
from monai_deq.inferers import FixedPointInferer
from monai_deq.utils import json_ready, replace_file, write_json
from monai_deq.visualize import figures_available

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


def _checked(
    cases: Cases, bundle_dir: str | Path, overrides: Mapping[str, Any] | None
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Cases and overrides, which a configuration of the cases' methods has."""
    for title, case in cases.items():
        if not isinstance(case, Mapping) or not isinstance(case.get("method"), str):
            raise ValueError(f"cases: {title!r} must be a dictionary with the name of an overlay under 'method'.")
    if not cases:
        raise ValueError("cases must not be empty.")
    check_bundle(bundle_dir)
    refuse_unknown((BundleMethod(c["method"], Path(bundle_dir), Path(".")) for c in cases.values()), overrides or {})
    return {title: dict(json_ready(case)) for title, case in cases.items()}, dict(overrides or {})


def _size_text(size: Sequence[int]) -> str:
    return " x ".join(map(str, size))


def _write(
    files: Sequence[Path],
    content: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    names: Mapping[str, str],
    numbers: Mapping[str, tuple[str, str, float]],
    text: str = "",
    not_shown: Sequence[str] = (),
) -> pd.DataFrame:
    """
    Write a benchmark as JSON and Markdown, print it, and return its rows, NaN where a number could not be measured:
    the headings of what is measured, heading, format and factor of each number, and numbers that are not shown.
    """
    keys = [*numbers, *not_shown]
    frame = pd.DataFrame([{**row, **{k: row.get(k) for k in (*keys, "failure")}} for row in rows], dtype=object)
    frame = frame.astype(dict.fromkeys(keys, float))
    write_json(files[0], {**content, "rows": frame.to_dict("records")})
    cells = []
    for _, row in frame.iterrows():
        cells.append([_size_text(row[k]) if isinstance(row[k], tuple) else str(row[k]) for k in names])
        if row["failure"] is not None:
            cells[-1] += [f"failed: {cell_text(row['failure'])}", *["-"] * (len(numbers) - 1)]
        else:
            shown = ((scale * row[k], form) for k, (_, form, scale) in numbers.items())
            cells[-1] += ["-" if math.isnan(value) else f"{value:{form}}" for value, form in shown]
    left = [i for i, name in enumerate(names) if name != "steps"]
    text += markdown_table([*names.values(), *(heading for heading, _, _ in numbers.values())], cells, left) + "\n"
    with replace_file(files[1]) as path:
        path.write_text(text, encoding="utf-8")
    print(text)
    return frame


def _note_times(rows: Mapping[str, dict[str, Any]], timings: Mapping[str, Timing], reference: str) -> None:
    """Put times into the rows, in seconds and in terms of the reference, where that could be measured."""
    for title, timing in timings.items():
        if timing.failure is not None:
            rows[title]["failure"] = timing.failure
            continue
        ratio = timing.ratio_to(timings[reference]) if reference in timings else math.nan
        rows[title] |= {"seconds": timing.median, "time_ratio": ratio}


def _untrained(
    case: Mapping[str, Any], bundle_dir: str | Path, size: Sequence[int], overrides: Mapping[str, Any], **settings: Any
) -> tuple[nn.Module, nn.Module, torch.Tensor, torch.Tensor]:
    """A network as it is before training, its loss, and a random pair on its device."""
    settings = {**{k: v for k, v in case.items() if k not in ("method", "steps", *_SOLVING)}, **settings}
    method = BundleMethod(case["method"], Path(bundle_dir), Path("."), (), overrides)
    parser = method.parser("train", spatial_dims=len(size), **settings)
    # no data set is looked for, and all steps are made: a network before training is at rest
    parser.update({"found": SimpleNamespace(is_sample=False), "solver#tolerance": 0.0})
    torch.manual_seed(0)
    network, loss = parser.get_parsed_content("network"), parser.get_parsed_content("loss")
    moving, fixed = torch.rand(2, 1, 1, *size, generator=torch.Generator().manual_seed(1)).to(
        torch.device(parser.get_parsed_content("device"))
    )
    return network, loss, moving, fixed


def _tensors(network: nn.Module) -> list[torch.Tensor]:
    return [*network.parameters(), *network.buffers()]


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
    bundle, as they are before training, see :py:func:`training_memory`; write ``memory.json``, ``.md`` and ``.png``.

    Args:
        bundle_dir, output_dir: folders of the bundle and of what is written.
        spatial_size: size of the images, 2-D or 3-D.
        steps, unrolled_steps: steps of the equilibrium systems, and of the unrolled ones on each of their levels.
        cases: the systems. Defaults to :py:data:`MEMORY_CASES`.
        rounds: number of times that each is timed too, all in turns, at its largest number of steps. Defaults to 0.
        overrides: entries of the bundle's ``train.json`` for all, such as ``device``.
        overwrite: replace existing files, which is ``FileExistsError`` else.

    Returns:
        by system and number of steps: ``title``, ``steps``, ``kind`` (what the peak is), ``saved_mb`` (peak of what
        autograd keeps, 10^6 bytes), ``peak_mb`` (of all that is allocated), ``ratio`` (of the peak to the first row's),
        ``seconds`` (median, of the last row of a system) and ``failure``.
    """
    size = [int(n) for n in spatial_size]
    if len(size) not in (2, 3) or min(size) < 1:
        raise ValueError(f"spatial_size must be two or three sizes, got {list(spatial_size)}.")
    for name, values in (("steps", steps), ("unrolled_steps", unrolled_steps)):
        if not values or any(int(n) != n or n < 1 for n in values):
            raise ValueError(f"{name} must be whole numbers of at least 1, got {list(values)}.")
    check_count(rounds, "rounds", 0)
    cases, overrides = _checked(MEMORY_CASES if cases is None else cases, bundle_dir, overrides)
    files = new_files(output_dir, [f"memory.{s}" for s in ("json", "md", "png")], overwrite)
    lists = {"one": [1], "equilibrium": list(steps), "unrolled": list(unrolled_steps)}

    def prepared(title: str, n: int) -> tuple[nn.Module, torch.device, Callable[[], None]]:
        network, loss, moving, fixed = _untrained(cases[title], bundle_dir, size, overrides, max_steps=n)
        step = gradient_step(network.train(), loss, moving, {"moving": moving, "fixed": fixed})
        return network, moving.device, step

    rows: list[dict[str, Any]] = []
    for title, case in cases.items():
        for n in lists[case.get("steps", "equilibrium")]:
            logger.info(f"{title}, {n} steps")
            row: dict[str, Any] = {"title": title, "steps": n, "kind": ""}
            rows.append(row)
            with noted_failure(title, row):
                network, device, step = prepared(title, n)
                step()  # makes what is made once and kept, such as sampling grids
                memory = training_memory(step, _tensors(network), device)
                row |= {"kind": memory.kind, "saved_mb": memory.saved_bytes / 1e6, "peak_mb": memory.peak_bytes / 1e6}
                row["ratio"] = row["peak_mb"] / rows[0].get("peak_mb", math.nan)
    last = {row["title"]: row for row in rows}
    timed = [title for title, row in last.items() if rounds and "failure" not in row]
    if timed:
        logger.info("time of a training step, side by side")
        functions = {title: prepared(title, last[title]["steps"])[2] for title in timed}
        for title, timing in time_side_by_side(functions, rounds=rounds, device=device).items():
            last[title]["seconds"] = timing.median

    numbers = {
        "saved_mb": ("kept for backward (MB)", ".1f", 1.0),
        "peak_mb": ("peak (MB)", ".1f", 1.0),
        "ratio": (f"peak / {rows[0]['title']}", ".3f", 1.0),
        **({"seconds": ("time (s)", ".2f", 1.0)} if rounds else {}),
    }
    kind = next((row["kind"] for row in rows if row["kind"]), "not measured")
    text = f"One training step (forward, loss, backward) on one pair of {_size_text(size)}; peak: {kind}.\n\n"
    names, content = {"title": "system", "steps": "steps"}, {"spatial_size": size, "settings": overrides}
    frame = _write(files, content, rows, names, numbers, text, () if rounds else ("seconds",))
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
        bundle_dir, output_dir, overrides, overwrite: see :py:func:`measure_memory`.
        sizes: sizes of the images, all 2-D or all 3-D. Defaults to 32^3 to 160 x 192 x 224.
        cases: the systems, the first the one that times are given in terms of. Defaults to :py:data:`SCALING_CASES`.
        rounds: number of times that each is timed, all in turns.

    Returns:
        by size and system: ``title``, ``spatial_size``, ``peak_mb`` (10^6 bytes), ``seconds`` (median), ``time_ratio``
        (to the first system's) and ``failure``.
    """
    shapes = [tuple(int(n) for n in size) for size in sizes]
    if not shapes or len({len(s) for s in shapes}) > 1 or any(len(s) not in (2, 3) or min(s) < 1 for s in shapes):
        raise ValueError(f"sizes must be sizes of images, all of two or all of three numbers, got {shapes}.")
    cases, overrides = _checked(SCALING_CASES if cases is None else cases, bundle_dir, overrides)
    check_count(rounds, "rounds")
    files = new_files(output_dir, [f"scaling{s}" for s in (".json", ".md", "_time.png", "_memory.png")], overwrite)

    first, rows = next(iter(cases)), list[dict[str, Any]]()
    for size in shapes:
        measured: dict[str, dict[str, Any]] = {}
        functions, device = {}, torch.device("cpu")
        for title, case in cases.items():
            logger.info(f"{title}, {_size_text(size)}")
            measured[title] = {"title": title, "spatial_size": size}
            solving = {ours: case[name] for name, ours in _SOLVING.items() if name in case}
            with noted_failure(title, measured[title]):
                network, _, moving, fixed = _untrained(case, bundle_dir, size, overrides)
                inferer, device = FixedPointInferer(tolerance=0.0, **solving), moving.device
                register = torch.no_grad()(partial(inferer, moving, network.eval(), fixed))
                register()  # makes what is made once and kept, such as sampling grids
                peak = training_memory(register, _tensors(network), device).peak_bytes
                measured[title]["peak_mb"], functions[title] = peak / 1e6, register
        if functions:
            _note_times(measured, time_side_by_side(functions, rounds=rounds, device=device), first)
        rows += measured.values()

    numbers = {
        "seconds": ("time (s)", ".3g", 1.0),
        "time_ratio": (f"time / {first}", ".2f", 1.0),
        "peak_mb": ("peak memory (MB)", ".1f", 1.0),
    }
    names = {"spatial_size": "size", "title": "system"}
    frame = _write(files, {"cases": cases, "settings": overrides}, rows, names, numbers)
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
    Evaluate trained methods of a bundle with different solvers and step limits, once as :py:func:`compare`, time them
    side by side on the first pair, and write ``speed.json`` and ``speed.md``.

    Args:
        bundle_dir, output_dir, overwrite: see :py:func:`measure_memory`.
        results_dir: folder of the methods' folders, of trainings with ``--bundle_root <results_dir>/<method>``.
        cases: the ways, the first the one that times are given in terms of. Defaults to :py:data:`SPEED_CASES`.
        overlays: configuration files of the data set, such as ``slices.json``.
        rounds: number of times that each is timed, all in turns.
        overrides: entries of the bundle's configuration for all, such as ``dataset_dir``.

    Returns:
        by case: ``title``, means of ``dice``, ``folded_percent`` and ``evaluations`` of the network, ``converged``
        (share of the pairs that met the tolerance), ``seconds`` (median of the first pair, without loading and warping
        of labels), ``time_ratio`` (to the first case's) and ``failure``.
    """
    cases, overrides = _checked(SPEED_CASES if cases is None else cases, bundle_dir, overrides)
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
        with noted_failure(title, rows[title]):
            first = FirstPair(method)
            functions[title], device = first.register, first.device
            means = {k: summary["summary"].get(k, {}).get("mean") for k in ("dice", "folded_percent", "evaluations")}
            rows[title] |= {**means, "converged": float(pd.DataFrame(summary["pairs"])["converged"].mean())}
    reference = next(iter(cases))
    if functions:
        logger.info("time of a registration, side by side")
        _note_times(rows, time_side_by_side(functions, rounds=rounds, device=device), reference)

    numbers = {
        "dice": ("Dice %", ".2f", 100.0),
        "folded_percent": ("folded %", ".3f", 1.0),
        "evaluations": ("evaluations", ".1f", 1.0),
        "converged": ("converged %", ".0f", 100.0),
        "seconds": ("time (s)", ".2f", 1.0),
        "time_ratio": (f"time / {reference}", ".2f", 1.0),
    }
    settings = {k: v for k, v in overrides.items() if k != "dataset_dir"}
    return _write(files, {"cases": cases, "settings": settings}, list(rows.values()), {"title": "case"}, numbers)
