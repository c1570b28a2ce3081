# SPDX-License-Identifier: Apache-2.0
"""One method of a bundle evaluated by the bundle's own configuration, once."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser, ConfigWorkflow

import monai_deq
from monai_deq.evaluation.method_results import MethodResult, read_pair_results
from monai_deq.networks import trained_with

__all__ = ["BundleMethod", "evaluate_method", "refuse_unknown", "root_cause"]

# where things lie, and how fast they are loaded, does not change what comes out
_PLACES = ("bundle_root", "ckpt_dir", "ckpt_path", "output_dir", "overwrite", "num_workers", "cache_dir", "cache_rate")
_WRAPPERS = ("Failed to evaluate", "Failed to instantiate")


def root_cause(error: BaseException) -> str:
    """
    What went wrong, on one line: MONAI's configurations wrap an error in others that say where it came up.

    Args:
        error: the error that came.
    """
    while isinstance(error, RuntimeError) and str(error).startswith(_WRAPPERS) and error.__cause__ is not None:
        error = error.__cause__
    # str() of a KeyError is the repr of its text
    text = " ".join(str(error.args[0] if isinstance(error, KeyError) and error.args else error).split())
    text = text if len(text) <= 300 else text[:297] + "..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@cache
def _source_digest() -> bytes:
    """Digest of the code that makes the scores."""
    digest = hashlib.sha256()
    package = Path(monai_deq.__file__).parent
    for path in sorted(package.rglob("*.py")):
        if path.parent.name != "evaluation":
            digest.update(path.relative_to(package).as_posix().encode() + path.read_bytes())
    return digest.digest()


@dataclass(frozen=True)
class BundleMethod:
    """
    A method of a bundle: its overlay over the bundle's configurations, and the folder of its training.

    Args:
        name: name of the overlay ``methods/<name>.json`` in the bundle.
        bundle_dir: folder of the bundle.
        root: folder of the method, given to its training as ``--bundle_root``.
        overlays: configuration files of the data set between the bundle's and the method's, e.g. ``slices.json``;
            a relative one lies in the bundle's folder or else in the current one.
        overrides: entries of the configuration in place of those in the files.
    """

    name: str
    bundle_dir: Path
    root: Path
    overlays: Sequence[str | Path] = ()
    overrides: Mapping[str, Any] | None = None

    def files(self, config: str) -> list[str]:
        """
        Configuration files of the method.

        Args:
            config: name of the bundle's configuration, e.g. ``"evaluate"``.

        Raises:
            FileNotFoundError: When one is not there.
        """
        overlays = [self.bundle_dir / p if (self.bundle_dir / p).is_file() else Path(p) for p in self.overlays]
        files = [self.bundle_dir / f"{config}.json", *overlays, self.bundle_dir / "methods" / f"{self.name}.json"]
        for file in files:
            if not file.is_file():
                raise FileNotFoundError(f"method {self.name!r}: no configuration at {file}.")
        return [str(file) for file in files]

    def parser(self, config: str, **overrides: Any) -> ConfigParser:
        """
        The method's configuration, not parsed yet.

        Args:
            config: name of the bundle's configuration.
            overrides: further entries.
        """
        parser = ConfigParser()
        parser.read_config(self.files(config))
        parser.update({**(self.overrides or {}), "bundle_root": str(self.root), **overrides})
        return parser

    @property
    def title(self) -> str:
        """Name of the method for the reader, as its overlay gives it."""
        return str(self.parser("evaluate").get("method", self.name))

    @property
    def checkpoint(self) -> Path | None:
        """The trained weights, ``None`` for a method that has none."""
        path = self.parser("evaluate").get_parsed_content("ckpt_path")
        return None if path is None else Path(path)

    def trained_with(self) -> dict[str, Any]:
        """Settings of the method's training."""
        return trained_with(self.checkpoint)

    def check_trained(self) -> None:
        """
        Make sure that the checkpoint is there, and this method's.

        Raises:
            FileNotFoundError: When there is none.
            ValueError: When it was trained as another method.
        """
        if self.checkpoint is None:
            return
        if not self.checkpoint.is_file():
            raise FileNotFoundError(f"no checkpoint at {self.checkpoint}: train first, with --bundle_root {self.root}")
        trained_as = self.trained_with().get("method", self.title)
        if trained_as != self.title:
            raise ValueError(f"{self.checkpoint} was trained as {trained_as!r}, without the overlay {self.name!r}")

    def fingerprint(self, config: str, **overrides: Any) -> str:
        """
        Twelve digits that change with the weights, the settings of their training, the configuration and the code of
        this package, and not with where weights and results lie.

        Args:
            config: name of the bundle's configuration.
            overrides: further entries of it.
        """
        digest = hashlib.sha256(_source_digest())
        entries: dict[str, Any] = self.parser(config, **overrides).get()  # type: ignore[assignment]
        content = {k: v for k, v in entries.items() if k not in _PLACES}
        digest.update(json.dumps(content, sort_keys=True, default=str).encode())
        if self.checkpoint is not None:
            for path in (self.checkpoint, self.checkpoint.with_suffix(".json")):
                digest.update(path.read_bytes() if path.is_file() else b"-")
        return digest.hexdigest()[:12]


def evaluate_method(method: BundleMethod, ranked: bool = True, **overrides: Any) -> tuple[MethodResult, dict[str, Any]]:
    """
    Results of a method on the pairs of the bundle's ``evaluate.json``. What has been evaluated before with the same
    weights and configuration is read from ``<root>/comparison/<fingerprint>``, nothing is ever replaced there. An
    error becomes the result's ``failure``.

    Args:
        method: the method.
        ranked: see :py:class:`monai_deq.evaluation.MethodResult`. Defaults to ``True``.
        overrides: further entries of the configuration.

    Returns:
        The result, and the summary that the evaluation wrote, an empty dict when it failed.
    """
    logger = logging.getLogger("monai_deq")
    title = method.name
    try:
        title = method.title
        method.check_trained()
        output_dir = method.root / "comparison" / method.fingerprint("evaluate", **overrides)
        summary_path, pairs_path = (output_dir / f"evaluation_{n}" for n in ("summary.json", "pairs.csv"))
        if summary_path.is_file() and pairs_path.is_file():
            logger.info(f"{title}: already evaluated, read from {output_dir}")
        else:
            logger.info(f"{title}: evaluation")
            settings = {
                **(method.overrides or {}),
                **overrides,
                "bundle_root": str(method.root),
                "output_dir": str(output_dir),
                "prefix": "evaluation",
                "overwrite": True,  # of a half of the two files, left by a run that was stopped between them
            }
            workflow = ConfigWorkflow(
                method.files("evaluate"),
                logging_file=False,
                run_id="evaluating",
                workflow_type="infer",
                **settings,
            )
            workflow.initialize()
            workflow.run()
            workflow.finalize()
        summary = json.loads(summary_path.read_text())
        return MethodResult(method.name, title, read_pair_results(pairs_path), ranked=ranked), summary
    except Exception as e:  # whatever it is, the other methods still have their rows
        logger.error(f"{title} failed", exc_info=e)
        return MethodResult(method.name, title, failure=root_cause(e), ranked=ranked), {}


def refuse_unknown(methods: Iterable[BundleMethod], overrides: Mapping[str, Any], program: str) -> None:
    """
    Refuse settings that no method has: a mistyped one would be taken as an entry of the configuration that nothing
    reads.

    Args:
        methods: the methods; one without an overlay is passed over.
        overrides: the settings.
        program: who was given them, for the error.

    Raises:
        ValueError: When there are such settings.
    """
    known: set[str] = set()
    for method in methods:
        for config in ("evaluate", "train"):
            try:
                known |= set(ConfigParser.load_config_files(method.files(config)))
            except FileNotFoundError:  # its row will say so
                continue
    unknown = [key for key in overrides if key.split("#")[0].split("::")[0] not in known]
    if known and unknown:
        raise ValueError(f"{unknown} is neither an argument of {program} nor a setting of the bundle or its methods.")
