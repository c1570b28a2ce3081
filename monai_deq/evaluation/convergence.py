# SPDX-License-Identifier: Apache-2.0
"""Trained methods iterated far beyond their training: what becomes of them (paper, Table 2, Fig. 1 and Fig. 3)."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from monai.utils import optional_import

from monai_deq.evaluation import step_scores
from monai_deq.evaluation.method_evaluation import BundleMethod, refuse_unknown, root_cause
from monai_deq.evaluation.step_plots import step_plots
from monai_deq.evaluation.step_scores import default_steps, read_step_scores, score_steps, write_step_scores
from monai_deq.evaluation.step_table import StepCurve, step_curves, step_table
from monai_deq.utils import as_flag, refuse_existing, replace_file

__all__ = ["ITERATED_METHODS", "converge"]

#: the systems that are iterated: those of the paper in the order of its tables, and the bundle's own
ITERATED_METHODS = ("unrolling", "gradirn", "riir", "deqreg12", "deqreg", "deqreg_pool")


def converge(
    bundle_dir: str | Path,
    results_dir: str | Path,
    methods: Sequence[str] = ITERATED_METHODS,
    overlays: Sequence[str | Path] = (),
    max_steps: int = 96,
    split: str = "validation",
    random_start_rms: float = 3.0,
    table_steps: Sequence[int] = (),
    output_dir: str | Path | None = None,
    overwrite: bool = False,
    **overrides: Any,
) -> dict[str, dict[str, StepCurve]]:
    """
    Iterate methods of a bundle that were trained with ``--bundle_root <results_dir>/<method>`` for many steps, score
    them on the way, and write ``convergence.md`` (trained against best and last steps), ``convergence.png`` and, below
    each method's folder, the scores of every pair as CSV.

    What has been scored before with the same weights and settings is read again, not repeated. A method that fails is
    named below the table with the reason.

    Args:
        bundle_dir: folder of the bundle.
        results_dir: folder of the methods' folders.
        methods: names of overlays in the bundle's ``methods`` folder. Defaults to all that are iterated.
        overlays: configuration files of the data set, such as ``slices.json``. Defaults to none.
        max_steps: number of steps, of networks with levels on the finest. Defaults to 96 (paper, Fig. 3).
        split: part of the data set. Defaults to ``"validation"`` (paper, Table 2).
        random_start_rms: RMS length in voxels of the random smooth displacement from which each pair is iterated a
            second time, see :py:func:`score_steps`; 0 saves that half of the time. Defaults to 3.
        table_steps: steps for which the table has rows too, of those that are scored (see :py:func:`default_steps`).
            Defaults to none.
        output_dir: folder of table and figure. Defaults to ``results_dir``.
        overwrite: replace existing ones. Defaults to ``False``.
        overrides: entries of the bundle's configuration for all methods, such as ``dataset_dir``.

    Returns:
        by title of a method, by name of a score, its curve.

    Raises:
        FileExistsError: When there is a table already and ``overwrite`` is not set.
        ValueError: When an argument is out of its range.
    """
    logger = logging.getLogger("monai_deq")
    methods = [methods] if isinstance(methods, str) else list(methods)
    overlays = [overlays] if isinstance(overlays, (str, Path)) else list(overlays)
    steps = default_steps(max_steps)
    table_steps = [table_steps] if isinstance(table_steps, int) else list(table_steps)
    if not set(table_steps) <= set(steps):
        raise ValueError(f"table_steps must be among the steps that are scored, {steps}, got {table_steps}.")
    results_dir = Path(results_dir)
    output_dir = results_dir if output_dir is None else Path(output_dir)
    files = [output_dir / f"convergence.{s}" for s in ("md", "png")]
    if not as_flag(overwrite, "overwrite"):
        refuse_existing(files, "Replace it with --overwrite true, or name another --output_dir.")
    overrides["split"] = split
    entries = {m: BundleMethod(m, Path(bundle_dir), results_dir / m, overlays, overrides) for m in methods}
    refuse_unknown(entries.values(), overrides, "converge")
    # the fingerprint of a method leaves this folder's code out
    scoring = hashlib.sha256(Path(step_scores.__file__).read_bytes()).hexdigest()[:6]
    curves: dict[str, dict[str, StepCurve]] = {}
    trained_steps: dict[str, int] = {}
    failures: dict[str, str] = {}
    for overlay, method in entries.items():
        try:
            title = method.title
            method.check_trained()
            settings = method.trained_with()
            trained = int(settings.get("max_steps", settings.get("val_steps", 0)))
            marks = sorted({*steps, *([trained] if 0 < trained <= max_steps else [])})
            path = (
                method.root
                / "convergence"
                / method.fingerprint("evaluate")
                / f"steps_{max_steps}_from_{random_start_rms:g}_{scoring}.csv"
            )
            if path.is_file():
                logger.info(f"{title}: already scored, read from {path}")
            else:
                logger.info(f"{title}: {max_steps} steps")
                write_step_scores(score_steps(method, marks, random_start_rms), path)
            curves[title], trained_steps[title] = step_curves(read_step_scores(path)), trained
        except Exception as e:  # whatever it is, the other methods still have their curves
            logger.error(f"{overlay} failed", exc_info=e)
            failures[overlay] = root_cause(e)
    text = step_table(curves, trained_steps, table_steps) + "".join(
        f"\n{name} failed: {why}\n" for name, why in failures.items()
    )
    with replace_file(files[0]) as path:
        path.write_text(text)
    if not optional_import("matplotlib")[1]:
        logger.warning('no curves: they need matplotlib, pip install "monai_deq[figures]"')
    elif curves:
        step_plots(curves, trained_steps, files[1], overwrite=True)
    print(text)
    return curves
