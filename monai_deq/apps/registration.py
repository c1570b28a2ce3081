# SPDX-License-Identifier: Apache-2.0
"""Pairs of scans in files registered, and what was found written beside each other."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from monai_deq.certificates import Verdict
from monai_deq.data import affine_of, image_dims, pair_items
from monai_deq.networks import load_weights, read_record
from monai_deq.networks.blocks import EnergyUpdate
from monai_deq.networks.nets import EnergyRegistrationNet, RegistrationNet, energy_finish
from monai_deq.transforms import (
    FIELD_FORMATS,
    AffineKind,
    CheckedCompose,
    FixedPointSolverd,
    SaveRegistrationd,
    finish_pair_transforms,
    load_pair_transforms,
    pull_image,
    summary_lines,
)
from monai_deq.utils import (
    check_device,
    check_on_error,
    check_writable,
    expand_user,
    failure_reason,
    json_ready,
    local_device,
)
from monai_deq.visualize import HTMLPage, RegisteredPair, new_figure, write_pair_report

__all__ = ["PRESETS", "RegistrationSettings", "register_pairs"]

logger = logging.getLogger("monai_deq")


@dataclass(frozen=True)
class Preset:
    """What fits one kind of scans.

    Args:
        weight: of the smoothness in the energy.
        steps: step limits of the energy's sizes, from the smallest. Defaults to ``None``: those of the method.
        window: intensities that become 0 and 1, Hounsfield units. Defaults to ``None``: by each scan's percentiles.
    """

    weight: float
    steps: tuple[int, ...] | None = None
    window: tuple[float, float] | None = None


#: chosen on validation slices of brains, and on the one pair of lungs there is
PRESETS: dict[str, Preset] = {
    "brain": Preset(weight=0.4),
    "lung": Preset(weight=1.5, steps=(60, 60, 40, 20), window=(-1200.0, 400.0)),
}


@dataclass(frozen=True)
class RegistrationSettings:
    """How pairs are registered.

    Args:
        preset: one of :py:data:`PRESETS`. Defaults to ``"brain"``.
        weights: trained weights, their record beside them: the network's solution, finished by the energy. Defaults to
            ``None``: the energy's own equilibrium.
        affine: ``"rigid"`` or ``"affine"``: align the scans first. Defaults to ``None``: they are aligned.
        steps: step limits of the energy's sizes, from the smallest, each half of the next; of a network its one limit.
            Defaults to ``None``: those of the preset, or of the record.
        tolerance: RMS displacement of a step in voxels at which a pair is at rest. Defaults to ``None``: the method's.
        device: where to solve. Defaults to ``None``: the GPU, or the CPU where there is none.
        transform_format: ending of the transform's file, see :py:func:`monai_deq.transforms.save_transform`.
        save_ddf: write the displacement field in voxels too.
        report: write a report, one HTML file a pair.
        overwrite: replace existing files.
    """

    preset: str = "brain"
    weights: str | Path | None = None
    affine: AffineKind | None = None
    steps: Sequence[int] | None = None
    tolerance: float | None = None
    device: str | None = None
    transform_format: str = ".nii.gz"
    save_ddf: bool = False
    report: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, got {self.preset!r}.")
        if self.affine not in (None, "rigid", "affine"):
            raise ValueError(f"affine: expected 'rigid' or 'affine', or None, got {self.affine!r}.")
        if self.transform_format.lower() not in (*FIELD_FORMATS, ".h5"):
            formats = ", ".join((*FIELD_FORMATS, ".h5"))
            raise ValueError(f"transform_format: expected one of {formats}, got {self.transform_format!r}.")
        if self.tolerance is not None and not self.tolerance >= 0:
            raise ValueError(f"tolerance must not be negative, got {self.tolerance}.")
        if self.weights is not None and self.steps is not None and len(self.steps) != 1:
            raise ValueError(
                f"steps: a network has one step limit, got {list(self.steps)}; without weights one a size."
            )


def _method(settings: RegistrationSettings, dims: int) -> tuple[RegistrationNet, dict[str, Any], dict[str, Any]]:
    """The network, what the solver is given beside it, and what the scans are brought to."""
    preset = PRESETS[settings.preset]
    if settings.weights is None:
        steps = settings.steps or preset.steps
        network: RegistrationNet = EnergyRegistrationNet(EnergyUpdate(dims, weight=preset.weight), steps=steps).eval()
        return network, {}, {"spatial_size": "isotropic", "window": preset.window}
    record = read_record(settings.weights, dims)
    network = record.build()
    load_weights(network, settings.weights)
    solver: dict[str, Any] = {"finish": energy_finish(dims, weight=preset.weight)}
    solver |= {"max_steps": settings.steps[0]} if settings.steps else {}
    known = {key: record.preprocessing.get(key) for key in ("window", "orientation")}
    return network, solver, {"spatial_size": record.spatial_size, **known}


def _transforms(
    settings: RegistrationSettings, dims: int, output_dir: Path, replace: bool
) -> tuple[CheckedCompose, FixedPointSolverd, CheckedCompose, SaveRegistrationd]:
    """What loads a pair, solves it, and makes of the solution what is written."""
    network, solver, scans = _method(settings, dims)
    device = str(local_device() if settings.device is None else check_device(settings.device))
    network.to(device)
    if solver.get("finish") is not None:
        solver["finish"].to(device)
    solve = FixedPointSolverd(
        network,
        initial_ddf_key="initial_ddf",
        mask_key="fixed_mask",
        # the energy's solution has its folds removed behind the last step: another one would always move it
        certificate=None if settings.weights is None else {},
        tolerance=settings.tolerance,
        device=device,
        **solver,
    )
    save = SaveRegistrationd(output_dir, replace, settings.transform_format, settings.save_ddf)
    return load_pair_transforms(dims, affine=settings.affine, **scans), solve, finish_pair_transforms(), save


def register_pairs(
    pairs: Sequence[Mapping[str, Any]],
    output_dir: str | Path,
    settings: RegistrationSettings | None = None,
    on_error: Literal["stop", "skip"] = "stop",
    resume: bool = False,
) -> list[dict[str, Any]]:
    """
    Register pairs of scans in files, each in any space, and write what is found, see
    :py:class:`monai_deq.transforms.SaveRegistrationd`; at the end what became of them is printed.

    Args:
        pairs: files by their kind, see :py:func:`monai_deq.data.pair_items`.
        output_dir: folder of the results.
        settings: how. Defaults to :py:class:`RegistrationSettings`, whose own are the defaults.
        on_error: ``"stop"``, or ``"skip"``: go on with the other pairs. Defaults to ``"stop"``.
        resume: leave out pairs that are there already, made with these settings; what is there of a pair without its
            record is replaced. Defaults to False.

    Returns:
        Of each pair its names, ``"verdict"``, ``"converged"``, ``"summary"``, ``"seconds"`` and ``"files"``; of one
        that failed its names and the ``"error"``. Pairs that were left out are not among them.

    Raises:
        ValueError, FileNotFoundError, RuntimeError: When a file or a setting is wrong, or a result that is there was
            made with other settings.
        FileExistsError: When a result is there already and is not to be replaced; before anything is done.
        OSError: When the folder cannot be written to; before anything is done too.
    """
    settings, output_dir = settings or RegistrationSettings(), expand_user(output_dir)
    if settings.overwrite and resume:
        raise ValueError("resume and overwrite exclude each other.")
    check_on_error(on_error)
    items = pair_items(pairs)
    if not items:
        raise ValueError("there is no pair to register.")
    save = SaveRegistrationd(output_dir, settings.overwrite, settings.transform_format, settings.save_ddf)
    used = json_ready({key: getattr(settings, key) for key in _DECISIVE})
    left = [item for item in items if not (resume and _is_done(save, item, used, settings.report))]
    if len(left) < len(items):
        logger.info("%d of %d pairs are there already", len(items) - len(left), len(items))
    for item in left if not resume else ():
        save.refuse_existing(item)
        if settings.affine or "initial_transform" in item:
            save.refuse_existing({**item, "initial_transform": [2 * np.eye(4)]})  # its affine file too
        if settings.report:
            HTMLPage.check(_report_path(save, item), settings.overwrite)
    check_writable(output_dir)
    if settings.report:
        new_figure(1.0, 1.0)  # an error where matplotlib is missing
    transforms: dict[int, Any] = {}
    dims: list[int | None] = []
    for item in left:  # what is wrong with a setting is said before anything is done, and with a scan unless skipped
        try:
            dims.append(image_dims(item["fixed"], "fixed"))
        except (OSError, RuntimeError, ValueError):
            if on_error == "stop":
                raise
            dims.append(None)
        if dims[-1] is not None and dims[-1] not in transforms:
            transforms[dims[-1]] = _transforms(settings, dims[-1], output_dir, settings.overwrite or resume)
    results: list[dict[str, Any]] = []
    for number, (item, n) in enumerate(zip(left, dims, strict=True), start=1):
        logger.info("pair %d of %d: %s to %s", number, len(left), item["moving"], item["fixed"])
        try:
            n = image_dims(item["fixed"], "fixed") if n is None else n
            results.append(_register({**item, "settings": used}, settings, *transforms[n]))
        except (OSError, RuntimeError, ValueError) as e:
            if on_error == "stop":
                raise
            reason = failure_reason(e)
            logger.error("pair %d of %d failed: %s", number, len(left), reason)
            names: dict[str, Any] = {
                key: item[key] for key in ("fixed_subject", "moving_subject", "name") if key in item
            }
            results.append({**names, "error": reason})
    done, failed = ([r for r in results if ("error" in r) == wrong] for wrong in (False, True))
    if done:
        print("\n".join(summary_lines(done)), flush=True)
    if failed:
        print(f"{len(failed)} of {len(left)} pairs failed; the same with --resume does these alone:")
        print("\n".join(f"  {r['moving_subject']} to {r['fixed_subject']}: {r['error']}" for r in failed), flush=True)
    return results


#: settings that a result depends on
_DECISIVE = ("preset", "weights", "affine", "steps", "tolerance", "transform_format")


def _is_done(saver: SaveRegistrationd, item: Mapping[str, Any], settings: Mapping[str, Any], report: bool) -> bool:
    """Whether a pair has all its files; ``ValueError`` where they were made with other settings."""
    return (not report or _report_path(saver, item).is_file()) and saver.is_done(item, settings)


def _register(
    item: Mapping[str, Any],
    settings: RegistrationSettings,
    load: CheckedCompose,
    solve: FixedPointSolverd,
    finish: CheckedCompose,
    save: SaveRegistrationd,
) -> dict[str, Any]:
    """Register one pair and write what is found."""
    begin = time.perf_counter()
    loaded: Any = load(item)
    logger.info("registering on a grid of %s voxels", " x ".join(map(str, loaded["fixed"].shape[1:])))
    solved = solve(loaded)
    logger.info("warping and measuring")
    done: Any = finish(solved)
    saved = save({**done, **{k: v for k, v in done["record"].items() if k not in done}})
    record = saved["record"]
    if settings.report:
        saved["files"]["report"] = str(_report_path(save, item))
        _write_report(saved, settings, save.overwrite)
    kept: dict[str, Any] = {
        k: saved[k] for k in ("fixed_subject", "moving_subject", "name", "summary", "files") if k in saved
    }
    verdict, converged = record["reason"], bool(record["converged"])
    if "verdict" in record:  # of the certificate, which may find rest where the solver was stopped by its limit
        verdict, converged = record["verdict"], record["verdict"] == Verdict.CONVERGED
    if "finish" in record:
        verdict, converged = record["finish"]["reason"], bool(record["finish"]["converged"])
    return {**kept, "verdict": verdict, "converged": converged, "seconds": time.perf_counter() - begin}


def _report_path(saver: SaveRegistrationd, item: Mapping[str, Any]) -> Path:
    record = saver.paths(item)["record"]
    return record.with_name(record.name.replace("_record.json", "_report.html"))


#: what each file is, and how it is used
_FILES = {
    "warped": ("the moving scan on the grid of the fixed one", "opens in any viewer, over the fixed scan"),
    "label": ("its label map there", "each voxel from the nearest"),
    "transform": ("the displacement field, LPS mm", "monai-deq apply, antsApplyTransforms -t, Slicer, SimpleITK"),
    "affine": ("the alignment that came before it, in the field too", "antsApplyTransforms -t, Slicer, SimpleITK"),
    "ddf": ("the displacement field in voxels of the fixed scan", "monai_deq.transforms.load_ddf"),
    "record": ("what the solver said, and the scores", "JSON"),
}


def _write_report(item: Mapping[Any, Any], settings: RegistrationSettings, replace: bool) -> None:
    """One HTML file of a registered pair."""
    scan = item["fixed_scan"]
    labels = {key: _plain(item[key]) for key in ("fixed_label", "warped_label") if key in item}
    if "moving_label" in item:
        labels["moving_label"] = _plain(pull_image(item["moving_label"], scan, mode="nearest"))
    pair = RegisteredPair(
        fixed=_plain(scan),
        moving=_plain(pull_image(item["moving_scan"], scan)),
        warped=_plain(item["warped_scan"]),
        ddf=item["ddf"].cpu().numpy(),
        affine=affine_of(scan),
        names=(str(item["moving_subject"]), str(item["fixed_subject"])),
        **labels,
    )
    summary = dict(item["summary"])
    scores = {k.removesuffix("_after"): v for k, v in summary.items() if k.endswith("_after")}
    pairs: dict[str, Any] = {k: (summary[f"{k}_before"], v) for k, v in scores.items()}
    pairs |= {k: v for k, v in summary.items() if not k.endswith(("_before", "_after", "_labels"))}
    pairs["dice_per_label"] = {k: tuple(v) for k, v in summary.get("dice_labels", {}).items()}
    files = {path: _FILES[what] for what, path in item["files"].items() if what in _FILES}
    used = {**asdict(settings), "fixed": item["fixed_subject"], "moving": item["moving_subject"]}
    used["intensities"] = item.get("intensities", {})
    write_pair_report(item["files"]["report"], pair, item["record"], pairs, used, files, overwrite=replace)


def _plain(image: torch.Tensor) -> np.ndarray:
    return np.asarray(image[0].cpu())
