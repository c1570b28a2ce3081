# SPDX-License-Identifier: Apache-2.0
"""Results of an evaluation pair by pair, as CSV and JSON, and as a table on the screen."""

from __future__ import annotations

import csv
import json
import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from ignite.engine import Events
from monai.data import decollate_batch

from monai_deq.utils import as_flag, gather_items, mean_std, process_rank, refuse_existing, replace_file

if TYPE_CHECKING:
    from ignite.engine import Engine

__all__ = ["PairResultsSaver"]


def _json_number(value: float) -> float | None:
    """JSON knows no NaN or infinity."""
    return value if math.isfinite(value) else None


def _mean_std(values: Sequence[float]) -> dict[str, Any]:
    mean, std, pairs = mean_std(values)
    return {"mean": _json_number(mean), "std": _json_number(std), "pairs": pairs}


def _spread(values: Sequence[float]) -> dict[str, Any]:
    """What the solver says is far from normally distributed, and the worst pairs matter."""
    finite = [v for v in values if math.isfinite(v)]
    median, p95 = np.percentile(finite, [50, 95]).tolist() if finite else (None, None)
    return {**_mean_std(values), "median": median, "p95": p95}


class PairResultsSaver:
    """
    Collect the scores of each pair that the metric handlers of an engine keep (``save_details``) with what the solver
    said of it, and write ``<prefix>_pairs.csv`` (one row a pair) and ``<prefix>_summary.json`` (mean and sample
    standard deviation over the pairs) when the run is complete. Attach it after the metrics.

    A metric with one score for each label gives one column a label and its mean over the labels of the pair. A score
    that is not there is ``nan`` in the CSV and null in the JSON, and is left out of every mean; ``"pairs"`` beside a
    mean says over how many it was taken.

    Of several processes the first one writes the files, with the pairs of all in the order of the processes.

    Args:
        output_dir: folder of the files.
        metrics: names of the metrics to write, as the engine knows them.
        labels: number and name of each label scored.
        label_set: name of the label set, put into every output.
        prefix: start of the file names. Defaults to ``"evaluation"``.
        columns: further keys of ``engine.state.output`` to write, one scalar or text a pair.
        optional_columns: the same, where the output has them.
        info: what else the summary should state (data set, checkpoint, ...).
        overwrite: replace existing files. Defaults to ``False``.
        percentiles: percentile over the pairs by name of a metric, put beside its mean as ``"p<percentile>"``, e.g.
            ``{"tre": 70}`` for the error that 30 % of the pairs exceed. Defaults to none.

    Raises:
        TypeError: When ``info`` holds what JSON does not know.
        ValueError: When a percentile is not in 0 to 100 or of no metric.
    """

    def __init__(
        self,
        output_dir: str | Path,
        metrics: Sequence[str],
        labels: Mapping[int, str],
        label_set: str,
        prefix: str = "evaluation",
        columns: Sequence[str] = ("steps", "evaluations", "residual", "relative_residual", "converged", "reason"),
        optional_columns: Sequence[str] = ("verdict", "spectral_radius", "start_distance"),
        info: Mapping[str, Any] | None = None,
        overwrite: bool = False,
        percentiles: Mapping[str, float] | None = None,
    ) -> None:
        self.csv_path = Path(output_dir) / f"{prefix}_pairs.csv"
        self.json_path = Path(output_dir) / f"{prefix}_summary.json"
        self.metrics = tuple(metrics)
        self.labels = dict(labels)
        self.label_set = label_set
        self.percentiles = dict(percentiles or {})
        wrong = {k: v for k, v in self.percentiles.items() if k not in self.metrics or not 0 <= v <= 100}
        if wrong:
            raise ValueError(f"percentiles must be from 0 to 100, of the metrics {self.metrics}, got {wrong}.")
        self.columns = tuple(columns)
        self.optional_columns = tuple(optional_columns)
        self.info = dict(info or {})
        try:
            json.dumps(self.info, allow_nan=False)
        except (TypeError, ValueError) as e:
            raise TypeError(f"info must be plain values that JSON knows, got {self.info}.") from e
        self.overwrite = as_flag(overwrite, "overwrite")
        self.rows: list[dict[str, Any]] = []
        self.logger = logging.getLogger("monai_deq")

    def attach(self, engine: Engine) -> None:
        """
        Args:
            engine: the evaluator.
        """
        engine.add_event_handler(Events.STARTED, self.started)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.iteration_completed)
        engine.add_event_handler(Events.COMPLETED, self.completed)

    def started(self, engine: Engine) -> None:
        """Refuse to overwrite before any work is done."""
        self.rows = []
        if not self.overwrite and process_rank() == 0:
            refuse_existing(
                [self.csv_path, self.json_path], "Replace it with --overwrite true, or name another --output_dir."
            )

    def iteration_completed(self, engine: Engine) -> None:
        """Keep the names and the solver's words of this iteration's pairs."""
        output = engine.state.output
        items = output if isinstance(output, list) else decollate_batch(output)
        for item in items:
            row = {"fixed": str(item["fixed_subject"]), "moving": str(item["moving_subject"])}
            for key in (*self.columns, *(k for k in self.optional_columns if k in item)):
                value = item[key]
                row[key] = value.item() if hasattr(value, "item") else value
            self.rows.append(row)

    def completed(self, engine: Engine) -> None:
        """Write the files and print the table."""
        self.rows = gather_items(self.rows)
        if process_rank() > 0:
            return
        details = engine.state.metric_details  # type: ignore[attr-defined]
        summary: dict[str, Any] = {}
        per_label: dict[str, dict[str, Any]] = {}
        for name in self.metrics:
            if name not in details:
                raise RuntimeError(
                    f"no scores of a metric {name!r}: the engine keeps those of {sorted(details)}. Name these in "
                    "metrics, or attach the metric with save_details=True."
                )
            scores = np.asarray(details[name].cpu(), dtype=float)
            if len(scores) != len(self.rows):
                raise RuntimeError(f"metric {name!r} has {len(scores)} scores for {len(self.rows)} pairs.")
            if scores.shape[1] > 1 and scores.shape[1] != len(self.labels):
                raise RuntimeError(
                    f"metric {name!r} has {scores.shape[1]} scores a pair for {len(self.labels)} labels."
                )
            has_labels = scores.shape[1] > 1 or (len(self.labels) == 1 and name.startswith(("dice", "hd")))
            counts = (~np.isnan(scores)).sum(axis=1)
            means = np.where(counts > 0, np.nansum(scores, axis=1) / np.maximum(counts, 1), np.nan)
            for row, mean, values in zip(self.rows, means, scores, strict=True):
                row[name] = float(mean)
                if has_labels:
                    row.update({f"{name}_{n}": float(v) for n, v in zip(self.labels, values, strict=True)})
            summary[name] = _mean_std(means.tolist())
            if name in self.percentiles:
                percentile = self.percentiles[name]
                there = means[~np.isnan(means)]
                value = float(np.percentile(there, percentile)) if len(there) else math.nan
                summary[name][f"p{percentile:g}"] = _json_number(value)
            if has_labels:
                per_label[name] = {
                    str(n): {"name": label, **_mean_std(scores[:, i].tolist())}
                    for i, (n, label) in enumerate(self.labels.items())
                }
        columns = [*self.columns, *(k for k in self.optional_columns if self.rows and all(k in r for r in self.rows))]
        for key in columns:
            values = [row[key] for row in self.rows]
            if all(isinstance(v, (bool, int, float)) for v in values):
                summary[key] = _spread([float(v) for v in values])
        result = {
            **self.info,
            "label_set": self.label_set,
            "labels": {str(n): name for n, name in self.labels.items()},
            "num_pairs": len(self.rows),
            "summary": summary,
            **({"verdicts": dict(Counter(r["verdict"] for r in self.rows))} if "verdict" in columns else {}),
            "per_label": per_label,
            "pairs": [{k: _json_number(v) if isinstance(v, float) else v for k, v in row.items()} for row in self.rows],
        }
        order = ["fixed", "moving", *self.metrics, *columns]
        names = [*order, *(k for k in (self.rows[0] if self.rows else {}) if k not in order)]
        with replace_file(self.csv_path) as path, path.open("w", newline="") as f:
            writer = csv.DictWriter(f, names, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)
        with replace_file(self.json_path) as path:
            path.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")
        print(self.table(summary, len(self.rows)), flush=True)
        self.logger.info(f"wrote {self.csv_path} and {self.json_path}")

    def table(self, summary: Mapping[str, Mapping[str, Any]], num_pairs: int) -> str:
        """
        Args:
            summary: mean and standard deviation by name.
            num_pairs: number of pairs.

        Returns:
            The table in words.
        """
        lines = [f"{num_pairs} pairs, label set {self.label_set!r} ({len(self.labels)} labels)"]
        width = max(map(len, summary), default=0)
        for name, value in summary.items():
            if value["mean"] is None:
                lines.append(f"  {name:<{width}}  no score")
            else:
                key = f"p{self.percentiles[name]:g}" if name in self.percentiles else None
                said = {"std": value["std"], **({} if key is None else {key: value[key]})}
                more = ", ".join(f"{word} {number:.4f}" for word, number in said.items() if number is not None)
                lines.append(f"  {name:<{width}}  {value['mean']:10.4f}" + (f"  ({more})" if more else ""))
        return "\n".join(lines)
