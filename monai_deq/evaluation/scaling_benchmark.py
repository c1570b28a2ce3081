# SPDX-License-Identifier: Apache-2.0
"""Time and memory of a registration against the size of the images."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from monai.utils import optional_import

from monai_deq.evaluation.benchmark_cases import check_cases, check_count, plain_rows, with_time
from monai_deq.evaluation.memory import training_memory
from monai_deq.evaluation.memory_plot import memory_plot
from monai_deq.evaluation.method_evaluation import BundleMethod, refuse_unknown, root_cause
from monai_deq.evaluation.timing import time_side_by_side
from monai_deq.utils import as_flag, refuse_existing, replace_file

__all__ = ["SCALING_CASES", "ScalingRow", "measure_scaling", "scaling_table"]

#: what is measured by default: by title the overlay and further entries of the bundle's ``evaluate.json``
SCALING_CASES: dict[str, dict[str, Any]] = {
    "VoxelMorph": {"method": "voxelmorph"},
    "GraDIRN, 3 x 3 steps": {"method": "gradirn", "solver_steps": 3},
    "RIIR, 6 steps": {"method": "riir", "solver_steps": 6},
    "DEQReg, 6 evaluations": {"method": "deqreg_pool", "solver_steps": 6},
    "DEQReg, Anderson, 6 evaluations": {"method": "deqreg_pool", "solver_steps": 6, "solver": "anderson"},
}

SIZES = ((32, 32, 32), (64, 64, 64), (96, 96, 96), (128, 128, 128), (160, 192, 224))


@dataclass(frozen=True)
class ScalingRow:
    """
    One system at one size.

    Args:
        title: its name.
        spatial_size: of the images.
        peak_mb: peak of all that is allocated during a registration, in 10^6 bytes.
        seconds: median time of one.
        time_ratio: the same in terms of the first system's.
        failure: why it could not be measured, ``None`` where it could.
    """

    title: str
    spatial_size: tuple[int, ...]
    peak_mb: float = float("nan")
    seconds: float = float("nan")
    time_ratio: float = float("nan")
    failure: str | None = None


def _registration(
    case: Mapping[str, Any], size: Sequence[int], bundle_dir: Path, overrides: Mapping[str, Any]
) -> tuple[Callable[[], Any], list[torch.Tensor], torch.device]:
    """A registration of a random pair by an untrained network; its parameters; its device."""
    settings = {k: v for k, v in case.items() if k != "method"}
    parser = BundleMethod(case["method"], bundle_dir, Path("."), (), overrides).parser(
        "evaluate", spatial_dims=len(size), trained_with={}, tolerance=0.0, certificate=None, **settings
    )
    torch.manual_seed(0)
    network, inferer = parser.get_parsed_content("network").eval(), parser.get_parsed_content("inferer")
    device = torch.device(parser.get_parsed_content("device"))
    generator = torch.Generator().manual_seed(1)
    moving, fixed = torch.rand(2, 1, 1, *size, generator=generator).to(device)

    def register() -> None:
        with torch.no_grad():
            inferer(moving, network, fixed)

    return register, [*network.parameters(), *network.buffers()], device


def measure_scaling(
    bundle_dir: str | Path,
    output_dir: str | Path,
    sizes: Sequence[Sequence[int]] = SIZES,
    cases: Mapping[str, Mapping[str, Any]] | None = None,
    rounds: int = 3,
    overwrite: bool = False,
    **overrides: Any,
) -> list[ScalingRow]:
    """
    Measure time and peak memory of a registration by the systems of a bundle at several sizes, with networks as they
    are before training, random images and a fixed number of steps, and write ``scaling.json``, ``scaling.md``,
    ``scaling_time.png`` and ``scaling_memory.png``. On a CPU the memory is counted, not sampled, see
    :py:func:`monai_deq.evaluation.training_memory`; images and weights are not in it.

    Args:
        bundle_dir: folder of the bundle.
        output_dir: folder of what is written.
        sizes: sizes of the images, all 2-D or all 3-D. Defaults to 32^3 to 160 x 192 x 224.
        cases: by title a dictionary with the overlay's name under ``method`` and further entries of the bundle's
            ``evaluate.json``. Times are given in terms of the first. Defaults to the learned systems of the paper.
        rounds: number of times that each is timed, all in turns. Defaults to 3.
        overwrite: replace existing files. Defaults to ``False``.
        overrides: entries of the bundle's ``evaluate.json`` for all, such as ``device`` or ``autocast_dtype``.

    Returns:
        The measurements.

    Raises:
        FileExistsError: When a file is there already and ``overwrite`` is not set.
        ValueError: When an argument is out of its range.
    """
    logger = logging.getLogger("monai_deq")
    shapes = [tuple(int(n) for n in size) for size in sizes]
    if not shapes or len({len(s) for s in shapes}) > 1 or any(len(s) not in (2, 3) or min(s) < 1 for s in shapes):
        raise ValueError(f"sizes must be sizes of images, all of two or all of three numbers, got {shapes}.")
    cases = check_cases(SCALING_CASES if cases is None else cases)
    check_count(rounds, "rounds")
    output_dir = Path(output_dir)
    files = [output_dir / f"scaling{s}" for s in (".json", ".md", "_time.png", "_memory.png")]
    if not as_flag(overwrite, "overwrite"):
        refuse_existing(files, "Replace it with --overwrite true, or name another --output_dir.")

    methods = (BundleMethod(c["method"], Path(bundle_dir), Path(".")) for c in cases.values())
    refuse_unknown(methods, overrides, "scaling")
    rows: list[ScalingRow] = []
    for size in shapes:
        measured: dict[str, ScalingRow] = {}
        functions, device = {}, torch.device("cpu")
        for title, case in cases.items():
            logger.info(f"{title}, {' x '.join(map(str, size))}")
            try:
                register, parameters, device = _registration(case, size, Path(bundle_dir), overrides)
                register()  # makes what is made once and kept, such as sampling grids
                memory = training_memory(register, parameters, device)
                functions[title] = register
                measured[title] = ScalingRow(title, size, memory.peak_bytes / 1e6)
            except Exception as e:  # the others still have their rows
                logger.error(f"{title} could not be measured", exc_info=e)
                measured[title] = ScalingRow(title, size, failure=root_cause(e))
        timings = time_side_by_side(functions, rounds=rounds, device=device)
        reference = timings.get(next(iter(cases)))
        rows += [with_time(r, timings[t], reference) if t in timings else r for t, r in measured.items()]

    with replace_file(files[0]) as path:
        content = {"cases": cases, "settings": overrides, "rows": plain_rows(rows)}
        path.write_text(json.dumps(content, indent=2, default=str) + "\n")
    text = scaling_table(rows)
    with replace_file(files[1]) as path:
        path.write_text(text)
    if optional_import("matplotlib")[1]:
        for key, what, file in (("seconds", "Time (s)", files[2]), ("peak_mb", "Peak memory (MB)", files[3])):
            points = {t: [(prod(r.spatial_size), getattr(r, key)) for r in rows if r.title == t] for t in cases}
            memory_plot(points, f"{what} of a registration", file, overwrite=True, x_label="voxels")
    else:
        logger.warning('no figures: they need matplotlib, pip install "monai_deq[figures]"')
    print(text)
    return rows


def scaling_table(rows: Sequence[ScalingRow]) -> str:
    """
    The measurements as Markdown.

    Args:
        rows: the measurements; times are in terms of the first system's of each size.

    Raises:
        ValueError: When there are none.
    """
    if not rows:
        raise ValueError("rows must not be empty.")
    lines = [
        f"| size | system | time (s) | time / {rows[0].title} | peak memory (MB) |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for row in rows:
        cells = [f"{row.seconds:.3g}", f"{row.time_ratio:.2f}", f"{row.peak_mb:.1f}"]
        if row.failure is not None:
            cells = ["failed: " + row.failure.replace("|", "/"), "-", "-"]
        cells = ["-" if c == "nan" else c for c in cells]
        lines.append(f"| {' x '.join(map(str, row.spatial_size))} | {row.title} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
