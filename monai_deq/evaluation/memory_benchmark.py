# SPDX-License-Identifier: Apache-2.0
"""Training memory of the systems of a bundle against their number of steps (paper, Fig. 2c)."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from monai.utils import optional_import

from monai_deq.evaluation.memory import training_memory
from monai_deq.evaluation.memory_plot import memory_plot
from monai_deq.evaluation.method_evaluation import BundleMethod, refuse_unknown, root_cause
from monai_deq.evaluation.timing import time_side_by_side
from monai_deq.utils import as_flag, refuse_existing, replace_file

__all__ = ["MEMORY_CASES", "MemoryCase", "MemoryRow", "measure_memory", "memory_table"]


@dataclass(frozen=True)
class MemoryCase:
    """
    A system in a certain setting.

    Args:
        title: its name in tables.
        method: name of the overlay in the bundle's ``methods`` folder.
        settings: entries of the bundle's ``train.json`` in place of its own.
        steps_key: which of the measurement's lists of steps it is measured with: ``"one"``, ``"equilibrium"`` or
            ``"unrolled"``.
    """

    title: str
    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    steps_key: str = "equilibrium"


#: what is measured by default; the first is what the others are compared with
MEMORY_CASES = (
    MemoryCase("VoxelMorph", "voxelmorph", steps_key="one"),
    MemoryCase("one step of the U-Net", "deqreg", {"num_states": 0, "phantom_steps": 1}, "one"),
    MemoryCase("Unrolling", "unrolling", steps_key="unrolled"),
    MemoryCase("GraDIRN", "gradirn", steps_key="unrolled"),
    MemoryCase("RIIR", "riir", steps_key="unrolled"),
    MemoryCase("DEQReg", "deqreg"),
    MemoryCase("DEQReg, recomputed", "deqreg", {"use_checkpoint": True}),
    MemoryCase("DEQReg, recomputed in parts", "deqreg", {"use_checkpoint": True, "checkpoint_parts": 4}),
)


@dataclass(frozen=True)
class MemoryRow:
    """
    One measurement.

    Args:
        title: name of the system.
        steps: steps of its schedule, of one with levels on each of them.
        saved_mb: peak of what autograd keeps, in 10^6 bytes.
        peak_mb: peak of all that is allocated, in 10^6 bytes.
        ratio: the latter in terms of the first case's.
        kind: what ``peak_mb`` is.
        seconds: median time of forward, loss and backward, ``None`` where it was not measured.
        failure: why it could not be measured, ``None`` where it could.
    """

    title: str
    steps: int
    saved_mb: float = float("nan")
    peak_mb: float = float("nan")
    ratio: float = float("nan")
    kind: str = ""
    seconds: float | None = None
    failure: str | None = None


def _training_step(
    case: MemoryCase, steps: int, bundle_dir: Path, size: Sequence[int], overrides: Mapping[str, Any]
) -> tuple[Callable[[], Any], list[torch.Tensor], torch.device]:
    """Forward, loss and backward of a system, untrained, on a random pair; its parameters; its device."""
    parser = BundleMethod(case.method, bundle_dir, Path("."), (), overrides).parser(
        "train", spatial_dims=len(size), is_sample=False, tolerance=0.0, **{**case.settings, "max_steps": steps}
    )
    torch.manual_seed(0)
    network, loss = parser.get_parsed_content("network"), parser.get_parsed_content("loss")
    device = torch.device(parser.get_parsed_content("device"))
    generator = torch.Generator().manual_seed(1)
    moving, fixed = torch.rand(2, 1, 1, *size, generator=generator).to(device)
    target = {"moving": moving, "fixed": fixed}
    network.train()

    def step() -> None:
        network.zero_grad(set_to_none=True)
        loss(network(moving, fixed), target).backward()

    return step, [*network.parameters(), *network.buffers()], device


def measure_memory(
    bundle_dir: str | Path,
    output_dir: str | Path,
    spatial_size: Sequence[int] = (64, 64, 64),
    steps: Sequence[int] = (6, 12, 24, 48, 96),
    unrolled_steps: Sequence[int] = (1, 3, 6, 12),
    cases: Sequence[MemoryCase] = MEMORY_CASES,
    rounds: int = 0,
    overwrite: bool = False,
    **overrides: Any,
) -> list[MemoryRow]:
    """
    Measure the memory of one training step (forward, loss, backward; one pair of random images) of the systems of a
    bundle, as they are before training, and write ``memory.json``, ``memory.md`` and ``memory.png``. On a CPU the
    memory is counted, not sampled, see :py:func:`monai_deq.evaluation.training_memory`.

    Args:
        bundle_dir: folder of the bundle.
        output_dir: folder of what is written.
        spatial_size: size of the images, 2-D or 3-D. Defaults to 64 x 64 x 64.
        steps: steps T of the equilibrium systems. Defaults to 6 to 96.
        unrolled_steps: steps of the unrolled ones, of one with levels on each of them. Defaults to 1 to 12.
        cases: the systems. Defaults to those of the paper's figure, and DEQReg with recomputation.
        rounds: number of times that each is timed too, all in turns, at its largest number of steps. Defaults to 0.
        overwrite: replace existing files. Defaults to ``False``.
        overrides: entries of the bundle's ``train.json`` for all, such as ``device`` or ``autocast_dtype``.

    Returns:
        The measurements.

    Raises:
        FileExistsError: When a file is there already and ``overwrite`` is not set.
        ValueError: When an argument is out of its range.
    """
    logger = logging.getLogger("monai_deq")
    size = [int(n) for n in spatial_size]
    if len(size) not in (2, 3) or min(size) < 1:
        raise ValueError(f"spatial_size must be two or three sizes, got {list(spatial_size)}.")
    lists = {"one": [1], "equilibrium": list(steps), "unrolled": list(unrolled_steps)}
    for name, values in (("steps", steps), ("unrolled_steps", unrolled_steps)):
        if not values or any(int(n) != n or n < 1 for n in values):
            raise ValueError(f"{name} must be whole numbers of at least 1, got {list(values)}.")
    if int(rounds) != rounds or rounds < 0:
        raise ValueError(f"rounds must be a whole number, not negative, got {rounds}.")
    if not cases:
        raise ValueError("cases must not be empty.")
    output_dir = Path(output_dir)
    files = [output_dir / f"memory.{s}" for s in ("json", "md", "png")]
    if not as_flag(overwrite, "overwrite"):
        refuse_existing(files, "Replace it with --overwrite true, or name another --output_dir.")

    refuse_unknown((BundleMethod(c.method, Path(bundle_dir), Path(".")) for c in cases), overrides, "memory")
    rows: list[MemoryRow] = []
    for case in cases:
        for n in lists[case.steps_key]:
            logger.info(f"{case.title}, {n} steps")
            try:
                step, parameters, device = _training_step(case, n, Path(bundle_dir), size, overrides)
                step()  # makes what is made once and kept, such as sampling grids
                memory = training_memory(step, parameters, device)
                peak = memory.peak_bytes / 1e6
                reference = rows[0].peak_mb if rows else peak
                rows.append(MemoryRow(case.title, n, memory.saved_bytes / 1e6, peak, peak / reference, memory.kind))
            except Exception as e:  # the others still have their rows
                logger.error(f"{case.title} could not be measured", exc_info=e)
                rows.append(MemoryRow(case.title, n, failure=root_cause(e)))
    if rounds:
        functions, device = {}, torch.device("cpu")
        for case in cases:
            try:
                step, _, device = _training_step(case, lists[case.steps_key][-1], Path(bundle_dir), size, overrides)
                functions[case.title] = step
            except Exception as e:
                logger.error(f"{case.title} could not be timed", exc_info=e)
        logger.info("time of a training step, side by side")
        timings = time_side_by_side(functions, rounds=rounds, device=device)
        last = {row.title: i for i, row in enumerate(rows)}
        for title, timing in timings.items():
            if timing.failure is None:
                rows[last[title]] = MemoryRow(**{**asdict(rows[last[title]]), "seconds": timing.median})

    with replace_file(files[0]) as path:
        path.write_text(
            json.dumps({"spatial_size": size, "settings": overrides, "rows": [asdict(r) for r in rows]}, indent=2)
            + "\n"
        )
    text = memory_table(rows, size)
    with replace_file(files[1]) as path:
        path.write_text(text)
    if optional_import("matplotlib")[1]:
        points = {c.title: [(r.steps, r.peak_mb) for r in rows if r.title == c.title] for c in cases}
        memory_plot(points, f"Training memory, {' x '.join(map(str, size))} (MB)", files[2], overwrite=True)
    else:
        logger.warning('no figure: it needs matplotlib, pip install "monai_deq[figures]"')
    print(text)
    return rows


def memory_table(rows: Sequence[MemoryRow], spatial_size: Sequence[int]) -> str:
    """
    The measurements as Markdown.

    Args:
        rows: the measurements; the first is what the others are compared with.
        spatial_size: size of the images.

    Raises:
        ValueError: When there are none.
    """
    if not rows:
        raise ValueError("rows must not be empty.")
    timed = any(row.seconds is not None for row in rows)
    kind = next((row.kind for row in rows if row.kind), "not measured")
    size = " x ".join(map(str, spatial_size))
    names = ["kept for backward (MB)", "peak (MB)", f"peak / {rows[0].title}", *(["time (s)"] if timed else [])]
    lines = [
        f"One training step (forward, loss, backward) on one pair of {size}; peak: {kind}.",
        "",
        f"| system | steps | {' | '.join(names)} |",
        f"| --- | ---: |{' ---: |' * len(names)}",
    ]
    for row in rows:
        cells = [f"{row.saved_mb:.1f}", f"{row.peak_mb:.1f}", f"{row.ratio:.3f}"]
        if row.failure is not None:
            cells = ["failed: " + row.failure.replace("|", "/"), "-", "-"]
        if timed:
            cells.append("" if row.seconds is None else f"{row.seconds:.2f}")
        lines.append(f"| {row.title} | {row.steps} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
