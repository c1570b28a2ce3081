# SPDX-License-Identifier: Apache-2.0
"""Results of an engine: refused before any work where they cannot be written, written pair by pair, gone on from."""

from __future__ import annotations

import glob
import json
import logging
from abc import ABC, abstractmethod
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
from monai_deq.networks import load_checkpoint, save_checkpoint
from monai_deq.utils import (
    as_flag,
    check_writable,
    gather_items,
    json_ready,
    process_rank,
    read_json,
    refuse_existing,
    refuse_other_settings,
    replace_file,
    wait_for_all,
    write_json,
)

__all__ = ["OutputGuard", "PairResults", "PairResultsSaver"]

logger = logging.getLogger("monai_deq")

#: what the solver says of every pair
_SOLVER = ("steps", "evaluations", "residual", "relative_residual", "converged", "reason")


class PairResults(ABC):
    """Handler that writes results of pairs, from which a later run may go on."""

    @abstractmethod
    def begin(self, engine: Any, names: Sequence[Mapping[str, str]], settings: Mapping[str, Any]) -> list[int]:
        """
        Before a run: the numbers of the pairs that are left to do; of several processes what the first one says counts.

        Args:
            engine: the :py:class:`monai_deq.engines.RegistrationEvaluator`.
            names: names of all pairs, see :py:func:`monai_deq.data.pair_names`.
            settings: what the results depend on, but for what the handler itself knows.

        Raises:
            ValueError: When there are results of other settings to go on from.
        """


class _Saver(Protocol):
    output_dir: Path
    overwrite: bool
    settings: Mapping[str, Any] | None

    def refuse_existing(self, item: Any) -> None: ...

    def is_done(self, item: Any, settings: Mapping[str, Any]) -> bool: ...


class OutputGuard(PairResults):
    """
    When an engine starts, see that the folders of its results (``saver.output_dir``) can be written to, and let their
    writers (``saver.refuse_existing(item)``) refuse every item of ``data`` whose files are there already. Of several
    processes the first one sees to the items of all, before any writes.

    Args:
        savers: writers such as :py:class:`monai_deq.transforms.SaveRegistrationd`, which records the settings too.
        data: items of all pairs, in the order of the data set.
        resume: leave out pairs that are there already, made with these settings; what is there of a pair that is not
            whole is replaced. Defaults to False.
        settings: what the results depend on beside network and inferer. Defaults to nothing.
    """

    def __init__(
        self,
        savers: Sequence[_Saver],
        data: Sequence[Mapping[Any, Any]],
        resume: bool | str = False,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.savers, self.data, self.resume = list(savers), data, as_flag(resume, "resume")
        self.settings = dict(settings or {})
        if self.resume and any(saver.overwrite for saver in self.savers):
            raise ValueError("resume and overwrite exclude each other.")

    def begin(self, engine: Any, names: Sequence[Mapping[str, str]], settings: Mapping[str, Any]) -> list[int]:
        """See :py:meth:`PairResults.begin`."""
        used = json_ready({**self.settings, **settings})
        numbers = range(len(self.data))
        left = [n for n in numbers if not (self.resume and all(s.is_done(self.data[n], used) for s in self.savers))]
        for saver in self.savers:
            saver.settings, saver.overwrite = used, saver.overwrite or self.resume
        return left

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


def _short(names: Mapping[str, str]) -> dict[str, str]:
    """The names of a pair as they are called in the files."""
    return {key: names.get(f"{key}_subject", "") for key in ("fixed", "moving")}


def _is_numbers(values: pd.Series) -> bool:
    return all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)


class PairResultsSaver(PairResults):
    """
    Collect the scores of each pair that the metric handlers of an engine keep (``save_details``) with what the solver
    said of it, and write ``<prefix>_pairs.csv`` (one row a pair) and ``<prefix>_summary.json`` (mean and sample
    standard deviation over the pairs) when the run is complete. Attach it after the metrics.

    A metric with one score for each label gives one column a label and its mean over the labels of the pair. A score
    that is not there is ``nan`` in the CSV and null in the JSON, and is left out of every mean; ``"pairs"`` beside a
    mean says over how many it was taken. Of several processes the first one writes, in the order of the processes.

    Pairs that failed are not in the means: the JSON lists them under ``"failed"`` with their reasons, the CSV in their
    place, ``"failed: <reason>"`` as ``reason`` and no score. In a :py:class:`monai_deq.engines.RegistrationEvaluator`
    the rows so far are kept after each iteration in ``<prefix>_unfinished_<process>.pt``, until none is missing.

    Args:
        output_dir: folder of the files.
        labels: number and name of each label scored.
        label_set: name of the label set, put into every output.
        metrics: names of the metrics to write, as the engine knows them. Defaults to None: all that it keeps.
        prefix: start of the file names.
        info: what else the summary should state (data set, checkpoint, ...), in types of JSON, else ``TypeError``.
        overwrite: replace existing files.
        percentiles: percentile (0 to 100) over the pairs by name of a metric, put beside its mean as
            ``"p<percentile>"``, e.g. ``{"tre": 70}`` for the error that 30 % of the pairs exceed.
        pictures: number, at most 9, of best and of worst pairs, by the first of the metrics that is ``dice`` or
            ``tre``, of which ``<prefix>_best_1.png``, ..., ``<prefix>_worst_1.png``, ... are written, where matplotlib
            is installed; the summary says of which pairs they are. Defaults to 0.
        resume: take over the rows that an evaluation with the same weights and settings has left, and measure those
            that are missing; ``ValueError`` where the settings were others. Defaults to False.
    """

    def __init__(
        self,
        output_dir: str | Path,
        labels: Mapping[int, str],
        label_set: str,
        metrics: Sequence[str] | None = None,
        prefix: str = "evaluation",
        info: Mapping[str, Any] | None = None,
        overwrite: bool = False,
        percentiles: Mapping[str, float] | None = None,
        pictures: int = 0,
        resume: bool | str = False,
    ) -> None:
        self.csv_path = Path(output_dir) / f"{prefix}_pairs.csv"
        self.json_path = Path(output_dir) / f"{prefix}_summary.json"
        self.labels, self.label_set = dict(labels), label_set
        self.metrics = None if metrics is None else tuple(metrics)
        self.percentiles = dict(percentiles or {})
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
        self.overwrite, self.resume = overwrite, as_flag(resume, "resume")
        if self.overwrite and self.resume:
            raise ValueError("resume and overwrite exclude each other.")
        if pictures not in range(10):
            raise ValueError(f"pictures: expected a whole number from 0 to 9, got {pictures!r}.")
        self.extremes = ExtremePairs(pictures, self.metrics)
        self.rows: list[dict[str, Any]] = []
        #: rows and pictures that were there before, the places of the pairs, and the settings, once a run has begun
        self.earlier: list[dict[str, Any]] = []
        self.earlier_pictures: list[dict[str, Any]] = []
        self.settings: dict[str, Any] = {}
        self.used: dict[str, Any] | None = None
        #: a whole summary, of which nothing is missing
        self.whole: dict[str, Any] | None = None

    def attach(self, engine: Engine) -> None:
        """Attach to the evaluator."""
        self.extremes.attach(engine)
        engine.add_event_handler(Events.STARTED, self.started)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.iteration_completed)
        engine.add_event_handler(Events.COMPLETED, self.completed)

    def begin(self, engine: Any, names: Sequence[Mapping[str, str]], settings: Mapping[str, Any]) -> list[int]:
        """See :py:meth:`PairResults.begin`."""
        asked = None if self.metrics is None else list(self.metrics)
        stated = {**self.info, "label_set": self.label_set, "labels": self.labels}
        self.settings = json_ready({**settings, "metrics": asked})
        self.used = json_ready({**stated, **self.settings})
        pairs = [(pair.get("fixed_subject", ""), pair.get("moving_subject", "")) for pair in names]
        self.extremes.places = {pair: number for number, pair in enumerate(pairs)}
        self.earlier, self.earlier_pictures, self.whole = [], [], None
        if self.resume:
            self._take_over(pairs)
        if process_rank() > 0:  # those of all are with the first one
            self.earlier, self.earlier_pictures = [], []
        elif self.earlier:
            for name, handler in engine.metric_handlers.items():
                scores = [row["scores"][name] for row in self.earlier if name in row["scores"]]
                handler.earlier = torch.tensor(scores, dtype=torch.float64) if scores else None
            self._keep(self.earlier, self.earlier_pictures)
        there = set(pairs) if self.whole else {(row["fixed"], row["moving"]) for row in self.earlier}
        return [number for number, pair in enumerate(pairs) if pair not in there]

    def _take_over(self, pairs: Sequence[tuple[str, str]]) -> None:
        """Read what an earlier evaluation has left of these pairs."""
        rows: dict[tuple[str, str], dict[str, Any]] = {}
        pictures: dict[tuple[str, str], dict[str, Any]] = {}
        parts = self._unfinished()
        for file in parts:
            content = load_checkpoint(file)
            refuse_other_settings(file, content.get("settings"), self.used or {})
            rows |= {(row["fixed"], row["moving"]): row for row in content["rows"]}
            pictures |= {(entry["fixed"], entry["moving"]): entry for entry in content["pictures"]}
        if not parts and self.json_path.is_file():
            self.whole = self._read_whole(pairs)
        elif not parts:
            logger.info(f"nothing to resume in {self.json_path.parent}: the evaluation starts from the beginning")
        self.earlier = [rows[pair] for pair in pairs if pair in rows]
        self.earlier_pictures = [pictures[pair] for pair in pairs if pair in rows and pair in pictures]

    def _read_whole(self, pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
        """The summary of an evaluation that was not cut off, of just these pairs."""
        file = self.json_path
        try:
            content = read_json(file)
            had = {(pair["fixed"], pair["moving"]) for pair in content["pairs"]}
        except (ValueError, KeyError, TypeError) as e:
            raise ValueError(f"{file} is no summary to go on from ({e}): replace it with --overwrite.") from e
        used = self.used or {}
        said = content.get("settings")
        stated = {key: content[key] for key in used if key in content and key not in self.settings}
        refuse_other_settings(file, {**stated, **said} if isinstance(said, dict) else None, used)
        if not self.csv_path.is_file():
            raise ValueError(f"{file} has lost its {self.csv_path.name}: replace it with --overwrite.")
        if had != set(pairs):
            missing = len(set(pairs) - had)
            raise ValueError(
                f"{file} is of other pairs, {missing} of the {len(pairs)} here are not in it: replace it with "
                "--overwrite, or name another folder of results."
            )
        return dict(content)

    def _unfinished(self) -> list[Path]:
        """What is kept of an evaluation of this name that is not whole, by the first of several processes first."""
        return sorted(self.csv_path.parent.glob(f"{glob.escape(self._part(0).stem[:-1])}*.pt"))

    def _part(self, rank: int) -> Path:
        return self.csv_path.with_name(f"{self.csv_path.name.removesuffix('pairs.csv')}unfinished_{rank}.pt")

    def _keep(self, rows: Sequence[Mapping[str, Any]], pictures: Sequence[Mapping[str, Any]]) -> None:
        """Write what there is, for an evaluation that goes on from it."""
        if self.used is not None:
            content = {"settings": self.used, "rows": list(rows), "pictures": list(pictures)}
            save_checkpoint(content, self._part(process_rank()))

    def _picture(self, kind: str, number: int) -> Path:
        return self.csv_path.with_name(f"{self.csv_path.name.removesuffix('pairs.csv')}{kind}_{number}.png")

    def _pictures(self) -> list[Path]:
        """Pictures of an evaluation of this name."""
        paths = [self._picture(kind, number) for kind in ("best", "worst") for number in range(1, 10)]
        return [path for path in paths if path.exists()]

    def started(self, engine: Engine) -> None:
        """Refuse to overwrite, and a folder that cannot be written to, before any work is done."""
        self.rows, self.extremes.kept[:] = list(self.earlier), self.earlier_pictures
        if process_rank() == 0:
            self._prepare()
        wait_for_all()  # what another process keeps from now on is not of an earlier run

    def _prepare(self) -> None:
        check_writable(self.csv_path.parent)
        if self.overwrite:
            for path in self._unfinished():
                path.unlink()
        elif not self.resume:
            parts = self._unfinished()
            advice = "Replace it with --overwrite true, or name another --output_dir."
            advice = f"Go on from it with --resume true. {advice}" if parts else advice
            refuse_existing([*parts, self.csv_path, self.json_path, *self._pictures()], advice)

    def iteration_completed(self, engine: Engine) -> None:
        """Keep names, scores and the solver's words of this iteration's pairs."""
        output: Any = engine.state.output
        scores: Mapping[str, torch.Tensor] = getattr(engine.state, "batch_scores", {})
        rows = []
        for number, item in enumerate(output if isinstance(output, list) else decollate_batch(output)):
            keys = (*_SOLVER, *(key for key in OPTIONAL_RECORDS if key in item))
            said = {key: item[key].item() if hasattr(item[key], "item") else item[key] for key in keys}
            names = {key: str(item[f"{key}_subject"]) for key in ("fixed", "moving")}
            rows.append({**names, **said, "scores": {name: value[number].tolist() for name, value in scores.items()}})
        self._keep([*self.rows, *rows], self.extremes.kept)
        self.rows += rows

    def completed(self, engine: Engine) -> None:
        """Write the files and print the table; where all pairs failed there is none."""
        rows, extremes = gather_items(self.rows), self.extremes.gather()
        failed = gather_items(getattr(engine, "failed", ()))
        if process_rank() > 0 or (failed and not rows):
            return
        if self.whole:
            known: dict[str, dict[str, Any]] = self.whole["summary"]
            known = {k: {w: np.nan if v is None else v for w, v in value.items()} for k, value in known.items()}
            print(self._table(known, str(self.whole["num_pairs"])), flush=True)
            return
        rows.sort(key=lambda row: self.extremes.places.get((row["fixed"], row["moving"]), 0))
        columns = [*_SOLVER, *(key for key in OPTIONAL_RECORDS if rows and all(key in row for row in rows))]
        details: dict[str, torch.Tensor] = dict(engine.state.metric_details)  # type: ignore[attr-defined]
        for name in rows[0]["scores"] if rows else ():
            details[name] = torch.tensor([row["scores"][name] for row in rows], dtype=torch.float64)
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
        lost = [{**_short(pair.names), "reason": pair.reason} for pair in failed]
        if lost:
            result["failed"] = lost
        if self.used is not None:
            result["settings"] = self.settings
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
            self._with_failed(frame, lost).to_csv(path, index=False, na_rep="nan", lineterminator="\n")
        write_json(self.json_path, result)
        for path in () if lost else self._unfinished():  # behind the files: what it is kept for is done
            path.unlink()
        count = f"{len(frame)} of {len(frame) + len(lost)}" if lost else str(len(frame))
        print(self._table(summary, count), flush=True)
        logger.info(f"wrote {self.csv_path} and {self.json_path}")

    def _with_failed(self, frame: pd.DataFrame, lost: Sequence[Mapping[str, str]]) -> pd.DataFrame:
        """The table with a row in its place for each pair that failed: its reason as text, no score."""
        if not lost:
            return frame
        # texts in columns of texts, by which these are told from scores
        texts = {key: False if key == "converged" else "failed" for key in frame if not _is_numbers(frame[key])}
        more = [{**texts, **pair, **({"reason": f"failed: {pair['reason']}"})} for pair in lost]
        both = pd.concat([frame, pd.DataFrame(more, columns=frame.columns, dtype=object)], ignore_index=True)
        places = [self.extremes.places.get(pair, 0) for pair in zip(both["fixed"], both["moving"], strict=True)]
        return both.iloc[np.argsort(places, kind="stable")]

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

    def _table(self, summary: Mapping[str, Mapping[str, Any]], num_pairs: str) -> str:
        """Mean, standard deviation and percentile by name, in words."""
        lines = [f"{num_pairs} pairs, label set {self.label_set!r} ({len(self.labels)} labels)"]
        width = max(map(len, summary), default=0)
        for name, value in summary.items():
            words = ["std", *([f"p{self.percentiles[name]:g}"] if name in self.percentiles else [])]
            more = ", ".join(f"{word} {value[word]:.4f}" for word in words if not np.isnan(value[word]))
            said = f"{value['mean']:10.4f}" + (f"  ({more})" if more else "") if value["pairs"] else "no score"
            lines.append(f"  {name:<{width}}  {said}")
        return "\n".join(lines)
