# SPDX-License-Identifier: Apache-2.0
"""Methods of a bundle: their configurations, their trained networks, and their evaluation, once."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from monai.bundle import ConfigParser, ConfigWorkflow
from monai.data import DataLoader

import monai_deq
from monai_deq.data import collate_annotated_pairs, keep_annotations
from monai_deq.engines import PreparePairBatch
from monai_deq.evaluation.scores import MethodResult, read_pair_results
from monai_deq.networks import NetworkRecord, load_weights, read_record
from monai_deq.utils import as_flag, read_json, refuse_existing

__all__ = ["BundleMethod", "FirstPair", "evaluate_method"]

logger = logging.getLogger("monai_deq")

# where things lie, and how fast they are loaded, does not change what comes out
_PLACES = ("bundle_root", "ckpt_dir", "ckpt_path", "output_dir", "overwrite", "num_workers", "cache_dir", "cache_rate")
_WRAPPERS = ("Failed to evaluate", "Failed to instantiate")
_Item = TypeVar("_Item")


def as_list(value: _Item | Sequence[_Item]) -> list[_Item]:
    """One name, path or number, or a sequence of them, as a list."""
    return [value] if isinstance(value, (str, Path, int)) else list(value)  # type: ignore[list-item, arg-type]


def check_count(value: int, name: str, least: int = 1) -> None:
    """Refuse what is no whole number of at least ``least``."""
    if int(value) != value or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value}.")


def new_files(folder: str | Path, names: Sequence[str], overwrite: bool) -> list[Path]:
    """Files to be written in a folder; ``FileExistsError`` where one is there and ``overwrite`` is not set."""
    files = [Path(folder) / name for name in names]
    if not overwrite:
        refuse_existing(files, "Replace it with overwrite, or name another output_dir.")
    return files


def already_there(what: str, *files: Path) -> bool:
    """Whether files of an earlier run with the same fingerprint are there, which is logged."""
    there = all(file.is_file() for file in files)
    if there:
        logger.info(f"{what}: already there, read from {files[0]}")
    return there


def root_cause(error: BaseException) -> str:
    """What went wrong, on one line: MONAI's configurations wrap an error in others that say where it came up."""
    while isinstance(error, RuntimeError) and str(error).startswith(_WRAPPERS) and error.__cause__ is not None:
        error = error.__cause__
    # str() of a KeyError is the repr of its text
    text = " ".join(str(error.args[0] if isinstance(error, KeyError) and error.args else error).split())
    text = text if len(text) <= 300 else text[:297] + "..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@contextmanager
def noted_failure(what: str, into: MutableMapping[str, Any], key: str = "failure") -> Iterator[None]:
    """Log an error of the block and note its cause, whatever it is: the other methods are still of use."""
    try:
        yield
    except Exception as e:
        logger.error(f"{what} failed", exc_info=e)
        into[key] = root_cause(e)


@cache
def _source_digest() -> bytes:
    """Digest of the code that makes the scores."""
    digest = hashlib.sha256()
    package = Path(monai_deq.__file__).parent
    for path in sorted(package.rglob("*.py")):
        if path.parent.name not in ("evaluation", "visualize") and path.name != "cli.py":
            digest.update(path.relative_to(package).as_posix().encode() + path.read_bytes())
    return digest.digest()


@dataclass(frozen=True)
class BundleMethod:
    """
    A method of a bundle. A trained network is rebuilt from the record beside its weights, by ``evaluate.json`` alone;
    the overlay ``methods/<name>.json`` goes over ``train.json``, and over ``evaluate.json`` where it says
    ``"ckpt_path": null``: the method has no weights.

    Args:
        name: name of the overlay.
        bundle_dir: folder of the bundle.
        root: folder of the method's training, its ``--bundle_root``.
        overlays: configuration files of the data set, in the bundle's folder or else the current one.
        overrides: entries of the configuration in place of those in the files.
    """

    name: str
    bundle_dir: Path
    root: Path
    overlays: Sequence[str | Path] = ()
    overrides: Mapping[str, Any] | None = None

    def with_overrides(self, **overrides: Any) -> BundleMethod:
        """The same method with further overrides."""
        return replace(self, overrides={**(self.overrides or {}), **overrides})

    @property
    def overlay(self) -> Path:
        """File of the overlay, whether it is there or not."""
        return self.bundle_dir / "methods" / f"{self.name}.json"

    def _overlay_entry(self, key: str, default: Any) -> Any:
        return read_json(self.overlay).get(key, default) if self.overlay.is_file() else default

    @property
    def is_trained(self) -> bool:
        """Whether the method has weights."""
        return self._overlay_entry("ckpt_path", "") is not None

    def files(self, config: str) -> list[str]:
        """Configuration files for ``"evaluate"`` or ``"train"``; ``FileNotFoundError`` when one is not there."""
        overlays = [self.bundle_dir / p if (self.bundle_dir / p).is_file() else Path(p) for p in self.overlays]
        own = [self.overlay] if config == "train" or not self.is_trained else []
        files = [self.bundle_dir / f"{config}.json", *overlays, *own]
        for file in files:
            if not file.is_file():
                raise FileNotFoundError(f"method {self.name!r}: no configuration at {file}.")
        return [str(file) for file in files]

    def parser(self, config: str, **overrides: Any) -> ConfigParser:
        """The configuration ``"evaluate"`` or ``"train"`` with further overrides, not parsed yet."""
        parser = ConfigParser()
        parser.read_config(self.files(config))
        parser.update({**(self.overrides or {}), "bundle_root": str(self.root), **overrides})
        return parser

    @property
    def checkpoint(self) -> Path | None:
        """The trained weights, ``None`` for a method that has none."""
        path = self.parser("evaluate").get_parsed_content("ckpt_path")
        return None if path is None else Path(path)

    @property
    def record(self) -> NetworkRecord:
        """What is known of the trained network."""
        return read_record(self.checkpoint)

    @property
    def trained_steps(self) -> int:
        """Steps of the network in its training, of one with levels on each of them; 0 without a training."""
        if not self.is_trained:
            return 0
        record = self.record
        network = record.network or {}
        own = network.get("solver", {}).get("max_steps") or max(as_list(network.get("steps", record.steps)))
        return int(record.training.get("max_steps", own))

    @property
    def title(self) -> str:
        """Name of the method for the reader: its overlay's, or that of its training."""
        return str(self._overlay_entry("method", None) or self.record.method or self.name)

    def check_trained(self) -> None:
        """``FileNotFoundError`` where there should be weights, ``ValueError`` where they are another method's."""
        checkpoint = self.checkpoint
        if checkpoint is None:
            return
        if not checkpoint.is_file():
            raise FileNotFoundError(f"no checkpoint at {checkpoint}: train first, with --bundle_root {self.root}")
        expected, trained_as = self._overlay_entry("method", None), self.record.method
        if expected and trained_as and trained_as != expected:
            raise ValueError(f"{checkpoint} was trained as {trained_as!r}, without the overlay {self.name!r}")

    def fingerprint(self, config: str) -> str:
        """Twelve digits of the weights, their record, the configuration and this package's code, not of places."""
        digest = hashlib.sha256(_source_digest())
        entries: dict[str, Any] = self.parser(config).get()  # type: ignore[assignment]
        content = {k: v for k, v in entries.items() if k not in _PLACES}
        digest.update(json.dumps(content, sort_keys=True, default=str).encode())
        if (checkpoint := self.checkpoint) is not None:
            for path in (checkpoint, checkpoint.with_suffix(".json")):
                digest.update(path.read_bytes() if path.is_file() else b"-")
        return digest.hexdigest()[:12]


def check_bundle(bundle_dir: str | Path, overlays: Iterable[str | Path] = ()) -> None:
    """``FileNotFoundError`` for what is no folder of a bundle, and for overlays that are not there."""
    root = Path(bundle_dir)
    if not (root / "train.json").is_file():
        raise FileNotFoundError(f"bundle_dir {str(root)!r} is no bundle: it has no train.json.")
    if lost := [str(file) for file in overlays if not ((root / file).is_file() or Path(file).is_file())]:
        raise FileNotFoundError(f"overlays: {lost[0]!r} is not there, neither in {root} nor here.")


def refuse_unknown(methods: Iterable[BundleMethod], overrides: Mapping[str, Any]) -> None:
    """Refuse overrides that no configuration of the methods has: nothing would read them."""
    known: set[str] = set()
    for method in methods:
        for config in ("evaluate", "train"):
            try:
                known |= set(ConfigParser.load_config_files(method.files(config)))
            except FileNotFoundError:  # its row will say so
                continue
    unknown = [key for key in overrides if key.split("#")[0].split("::")[0] not in known]
    if known and unknown:
        near = [f" (is it {n}?)" for n in get_close_matches(unknown[0], sorted(known), 1)]
        raise ValueError(f"overrides: {unknown} is no setting of the bundle or its methods{''.join(near)}.")


def bundle_methods(
    names: str | Sequence[str],
    bundle_dir: str | Path,
    results_dir: str | Path,
    overlays: str | Path | Sequence[str | Path],
    overrides: Mapping[str, Any] | None,
) -> dict[str, BundleMethod]:
    """Methods by name; each has an overlay or a folder of results, and the overrides are known."""
    names, bundle_dir, overrides = as_list(names), Path(bundle_dir), dict(overrides or {})
    check_bundle(bundle_dir, as_list(overlays))
    if not names or len(set(names)) != len(names):
        raise ValueError(f"methods must be names, each once, got {names}.")
    entries = {n: BundleMethod(n, bundle_dir, Path(results_dir) / n, as_list(overlays), overrides) for n in names}
    unknown = [n for n, method in entries.items() if not method.overlay.is_file() and not method.root.is_dir()]
    if unknown:
        available = sorted(path.stem for path in (bundle_dir / "methods").glob("*.json"))
        raise ValueError(f"methods: no overlay for {unknown} in {bundle_dir / 'methods'}, there are {available}.")
    refuse_unknown(entries.values(), overrides)
    return entries


def evaluate_method(method: BundleMethod, ranked: bool = True) -> tuple[MethodResult, dict[str, Any]]:
    """
    Evaluate a method by the bundle's ``evaluate.json``, once: what is there with the same weights and configuration is
    read from ``<root>/comparison/<fingerprint>``, and nothing is replaced there. Returns the result, an error as its
    ``failure``, and the summary that the evaluation wrote, then an empty dict.
    """
    title, failed = method.name, dict[str, str]()
    with noted_failure(title, failed):
        title = method.title
        method.check_trained()
        output_dir = method.root / "comparison" / method.fingerprint("evaluate")
        pairs_path, summary_path = (output_dir / f"evaluation_{n}" for n in ("pairs.csv", "summary.json"))
        whole = summary_path.is_file() and not read_json(summary_path).get("failed")
        if not (whole and already_there(title, pairs_path, summary_path)):
            logger.info(f"{title}: evaluation")
            # overwrite: a half of the two files, left by a run that was stopped between them
            places = {"bundle_root": str(method.root), "output_dir": str(output_dir), "overwrite": True}
            given = {"pictures": 0, **(method.overrides or {})}
            settings = {**given, **places, "prefix": "evaluation", "run_id": "evaluating"}
            workflow = ConfigWorkflow(method.files("evaluate"), logging_file=False, workflow_type="infer", **settings)
            workflow.initialize()
            workflow.run()
            workflow.finalize()
        summary = read_json(summary_path)
        return MethodResult(method.name, title, read_pair_results(pairs_path), ranked=ranked), summary
    return MethodResult(method.name, title, failure=failed["failure"], ranked=ranked), {}


class FirstPair:
    """The first pair of a method's evaluation, on its device, with the network and inferer that register it."""

    def __init__(self, method: BundleMethod) -> None:
        evaluation = method.parser("evaluate", certificate=None)  # it costs evaluations that no registration needs
        self.device = torch.device(evaluation.get_parsed_content("device"))
        # one pair is enough: not the whole split is loaded
        given = "cases" in evaluation
        name, number = ("cases", 1) if given else ("subjects", 2)
        evaluation[name] = evaluation.get_parsed_content(name)[:number]
        #: what the data set says of the pair, where it gives pairs
        self.case: dict[str, Any] | None = evaluation[name][0] if given else None
        evaluation.parse(reset=True)
        batch = next(iter(DataLoader(evaluation.get_parsed_content("dataset"), batch_size=1)))
        self.moving, self.target, (self.fixed,), _ = PreparePairBatch()(batch, self.device)
        self.network = evaluation.get_parsed_content("network").eval()
        self.inferer = evaluation.get_parsed_content("inferer")
        self.amp = as_flag(evaluation.get_parsed_content("amp"), "amp")
        if (checkpoint := method.checkpoint) is not None:
            load_weights(self.network, checkpoint)

    def training_target(self, training: ConfigParser) -> dict[str, Any]:
        """What the loss of a training compares with: the images, and of a given pair what else it takes, as masks."""
        if self.case is None:
            return self.target
        keys, load = training.get_parsed_content("target_keys"), training.get_parsed_content("load")(keep_scans=False)
        batch = collate_annotated_pairs([load(case) for case in keep_annotations([self.case], keys)])
        return PreparePairBatch(target_keys=keys)(batch, self.device)[1]

    def register(self) -> None:
        """Register the pair."""
        with torch.autocast(self.device.type, enabled=self.amp):
            self.inferer(self.moving, self.network, self.fixed)
