# SPDX-License-Identifier: Apache-2.0
"""Results of an engine: refused before any work where they cannot be written, and written pair by pair."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd
import torch
from ignite.engine import Engine, Events
from monai.data import decollate_batch

from monai_deq.certificates import OPTIONAL_RECORDS
from monai_deq.handlers.metrics import pair_means
from monai_deq.handlers.pictures import ExtremePairs
from monai_deq.utils import (
    check_writable,
    gather_items,
    process_rank,
    refuse_existing,
    replace_file,
    wait_for_all,
    write_json,
)

__all__ = ["OutputGuard", "PairResultsSaver"]


class _Saver(Protocol):
    output_dir: Path

    def refuse_existing(self, item: Any) -> None: ...


class OutputGuard:
    """
    When an engine starts, see that the folders of its results (``saver.output_dir``) can be written to, and let their
    writers (``saver.refuse_existing(item)``) refuse every item of ``data`` whose files are there already. Of several
    processes the first one sees to the items of all, before any writes.
    """

    def __init__(self, savers: Sequence[_Saver], data: Sequence[Mapping[Any, Any]]) -> None:
        self.savers, self.data = list(savers), data

    def attach(self, engine: Engine) -> None:
        """Attach to the engine that produces the results."""
        engine.add_event_handler(Events.STARTED, self)

    def __call__(self, engine: Engine) -> None:
        if process_rank() == 0:
            for saver in self.savers:
                check_writable(saver.output_dir)
                for item in self.data:
                    saver.refuse_existing(item)
        wait_for_all()


def _statistics(values: Any, percentile: float | None = None, solver: bool = False) -> dict[str, Any]:
    """Mean, sample standard deviation, number of scores; of what the solver says also the middle and the worst."""
    there = pd.Series(values, dtype=float).replace([np.inf, -np.inf], np.nan).dropna()
    result: dict[str, Any] = {"mean": there.mean(), "std": there.std(), "pairs": len(there)}
    if percentile is not None:
        result[f"p{percentile:g}"] = there.quantile(percentile / 100)
    if solver:
        result.update(median=there.median(), p95=there.quantile(0.95))
    return result


class PairResultsSaver:
    """
    Collect the scores of each pair that the metric handlers of an engine keep (``save_details``) with what the solver
    said of it, and write ``<prefix>_pairs.csv`` (one row a pair) and ``<prefix>_summary.json`` (mean and sample
    standard deviation over the pairs) when the run is complete. Attach it after the metrics.

    A metric with one score for each label gives one column a label and its mean over the labels of the pair. A score
    that is not there is ``nan`` in the CSV and null in the JSON, and is left out of every mean; ``"pairs"`` beside a
    mean says over how many it was taken. Of several processes the first one writes, in the order of the processes.

    Args:
        output_dir: folder of the files.
        labels: number and name of each label scored.
        label_set: name of the label set, put into every output.
        metrics: names of the metrics to write, as the engine knows them. Defaults to None: all that it keeps.
        prefix: start of the file names.
        columns: further keys of ``engine.state.output`` to write, one scalar or text a pair.
        info: what else the summary should state (data set, checkpoint, ...), in types of JSON, else ``TypeError``.
        overwrite: replace existing files.
        percentiles: percentile (0 to 100) over the pairs by name of a metric, put beside its mean as
            ``"p<percentile>"``, e.g. ``{"tre": 70}`` for the error that 30 % of the pairs exceed.
        pictures: number, at most 9, of best and of worst pairs, by the first of the metrics that is ``dice`` or
            ``tre``, of which ``<prefix>_best_1.png``, ..., ``<prefix>_worst_1.png``, ... are written, where matplotlib
            is installed; the summary says of which pairs they are. Defaults to 0.
    """

    def __init__(
        self,
        output_dir: str | Path,
        labels: Mapping[int, str],
        label_set: str,
        metrics: Sequence[str] | None = None,
        prefix: str = "evaluation",
        columns: Sequence[str] = ("steps", "evaluations", "residual", "relative_residual", "converged", "reason"),
        info: Mapping[str, Any] | None = None,
        overwrite: bool = False,
        percentiles: Mapping[str, float] | None = None,
        pictures: int = 0,
    ) -> None:
        self.csv_path = Path(output_dir) / f"{prefix}_pairs.csv"
        self.json_path = Path(output_dir) / f"{prefix}_summary.json"
        self.labels, self.label_set = dict(labels), label_set
        self.metrics = None if metrics is None else tuple(metrics)
        self.columns, self.percentiles = tuple(columns), dict(percentiles or {})
        known = self.percentiles if self.metrics is None else self.metrics
        wrong = {k: v for k, v in self.percentiles.items() if k not in known or not 0 <= v <= 100}
        if wrong:
            raise ValueError(f"percentiles must be from 0 to 100, of the metrics {self.metrics}, got {wrong}.")
        self.info = dict(info or {})
        try:
            json.dumps(self.info, allow_nan=False)
        except (TypeError, ValueError) as e:
            raise TypeError(f"info must be plain values that JSON knows, got {self.info}.") from e
        if not isinstance(overwrite, bool):
            raise ValueError(f"overwrite: expected True or False, got {overwrite!r}.")
        self.overwrite = overwrite
        if pictures not in range(10):
            raise ValueError(f"pictures: expected a whole number from 0 to 9, got {pictures!r}.")
        self.extremes = ExtremePairs(pictures, self.metrics)
        self.rows: list[dict[str, Any]] = []
        self.logger = logging.getLogger("monai_deq")

    def attach(self, engine: Engine) -> None:
        """Attach to the evaluator."""
        engine.add_event_handler(Events.STARTED, self.started)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.iteration_completed)
        engine.add_event_handler(Events.COMPLETED, self.completed)
        self.extremes.attach(engine)

    def _picture(self, kind: str, number: int) -> Path:
        return self.csv_path.with_name(f"{self.csv_path.name.removesuffix('pairs.csv')}{kind}_{number}.png")

    def _pictures(self) -> list[Path]:
        """Pictures of an evaluation of this name."""
        paths = [self._picture(kind, number) for kind in ("best", "worst") for number in range(1, 10)]
        return [path for path in paths if path.exists()]

    def started(self, engine: Engine) -> None:
        """Refuse to overwrite, and a folder that cannot be written to, before any work is done."""
        self.rows = []
        if process_rank() > 0:
            return
        check_writable(self.csv_path.parent)
        if not self.overwrite:
            advice = "Replace it with --overwrite true, or name another --output_dir."
            refuse_existing([self.csv_path, self.json_path, *self._pictures()], advice)

    def iteration_completed(self, engine: Engine) -> None:
        """Keep the names and the solver's words of this iteration's pairs."""
        output: Any = engine.state.output
        for item in output if isinstance(output, list) else decollate_batch(output):
            keys = (*self.columns, *(key for key in OPTIONAL_RECORDS if key in item))
            said = {key: item[key].item() if hasattr(item[key], "item") else item[key] for key in keys}
            self.rows.append({"fixed": str(item["fixed_subject"]), "moving": str(item["moving_subject"]), **said})

    def completed(self, engine: Engine) -> None:
        """Write the files and print the table."""
        rows, extremes = gather_items(self.rows), self.extremes.gather()
        if process_rank() > 0:
            return
        columns = [*self.columns, *(key for key in OPTIONAL_RECORDS if rows and all(key in row for row in rows))]
        details: Mapping[str, torch.Tensor] = engine.state.metric_details  # type: ignore[attr-defined]
        metrics = tuple(details) if self.metrics is None else self.metrics
        summary: dict[str, dict[str, Any]] = {}
        per_label: dict[str, dict[str, Any]] = {}
        means, label_scores = {}, {}
        for name in (*metrics, *self.percentiles):
            if name not in details:
                raise RuntimeError(
                    f"no scores of a metric {name!r}: the engine keeps those of {sorted(details)}. Name these in "
                    "metrics, or attach the metric with save_details=True."
                )
        for name in metrics:
            scores = self._scores(name, details[name], len(rows))
            means[name] = pair_means(details[name])
            summary[name] = _statistics(means[name], self.percentiles.get(name))
            if scores.shape[1] > 1 or (len(self.labels) == 1 and name.startswith(("dice", "hd"))):
                by_label = dict(zip(self.labels, scores.T, strict=True))
                label_scores.update({f"{name}_{n}": values for n, values in by_label.items()})
                words = {str(n): {"name": self.labels[n], **_statistics(values)} for n, values in by_label.items()}
                per_label[name] = words
        # as objects, each number is written as Python writes it
        said = pd.DataFrame(rows, columns=["fixed", "moving", *columns], dtype=object)
        frame = pd.concat([said, pd.DataFrame({**means, **label_scores}, dtype=object)], axis=1)
        frame = frame[["fixed", "moving", *metrics, *columns, *label_scores]]
        for key in columns:
            if all(isinstance(value, (bool, int, float)) for value in frame[key]):
                summary[key] = _statistics(frame[key], solver=True)
        result = {**self.info, "label_set": self.label_set, "labels": self.labels, "num_pairs": len(frame)}
        result["summary"] = summary
        if "verdict" in columns:
            result["verdicts"] = frame["verdict"].value_counts(sort=False).to_dict()
        if "sensitive_to" in columns:
            result["sensitive_to"] = frame["sensitive_to"].value_counts(sort=False).to_dict()
        result.update(per_label=per_label, pairs=frame.to_dict("records"))
        for path in self._pictures():  # of the files that are replaced
            path.unlink()
        if pictures := self._write_pictures(extremes):
            result["pictures"] = pictures
        with replace_file(self.csv_path) as path:
            frame.to_csv(path, index=False, na_rep="nan", lineterminator="\n")
        write_json(self.json_path, result)
        print(self._table(summary, len(frame)), flush=True)
        self.logger.info(f"wrote {self.csv_path} and {self.json_path}")

    def _write_pictures(self, extremes: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, str]]:
        """Write what has been drawn; of which pair each file is."""
        written = []
        for kind, entries in extremes.items():
            for number, entry in enumerate(entries, 1):
                if entry["png"] is not None:
                    file = self._picture(kind, number)
                    with replace_file(file) as path:
                        path.write_bytes(entry["png"])
                    written.append({"fixed": entry["fixed"], "moving": entry["moving"], "file": file.name})
        return written

    def _scores(self, name: str, details: torch.Tensor, num_pairs: int) -> np.ndarray:
        """Scores of a metric, one row a pair, one column or one a label."""
        scores = np.asarray(details.cpu(), dtype=float)
        if len(scores) != num_pairs:
            raise RuntimeError(f"metric {name!r} has {len(scores)} scores for {num_pairs} pairs.")
        if scores.shape[1] > 1 and scores.shape[1] != len(self.labels):
            raise RuntimeError(f"metric {name!r} has {scores.shape[1]} scores a pair for {len(self.labels)} labels.")
        return scores

    def _table(self, summary: Mapping[str, Mapping[str, Any]], num_pairs: int) -> str:
        """Mean, standard deviation and percentile by name, in words."""
        lines = [f"{num_pairs} pairs, label set {self.label_set!r} ({len(self.labels)} labels)"]
        width = max(map(len, summary), default=0)
        for name, value in summary.items():
            words = ["std", *([f"p{self.percentiles[name]:g}"] if name in self.percentiles else [])]
            more = ", ".join(f"{word} {value[word]:.4f}" for word in words if not np.isnan(value[word]))
            said = f"{value['mean']:10.4f}" + (f"  ({more})" if more else "") if value["pairs"] else "no score"
            lines.append(f"  {name:<{width}}  {said}")
        return "\n".join(lines)
