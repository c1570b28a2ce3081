# SPDX-License-Identifier: Apache-2.0
"""Before a training: what is wrong with the files of a data set or of a list of pairs."""

from __future__ import annotations

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from monai_deq.data import (
    Learn2RegDataset,
    OasisDataset,
    find_learn2reg,
    find_oasis,
    grid_of,
    read_image,
    read_pair_list,
)
from monai_deq.transforms import (
    CheckLabeld,
    CheckRegistrationImaged,
    CheckSameKeypointsd,
    DropSliceAxisd,
    LoadKeypointsd,
    load_keypoints,
)
from monai_deq.utils import expand_user, gather_items, process_rank

__all__ = ["Finding", "check_files", "usable_parts"]

logger = logging.getLogger("monai_deq")

_ROLES = ("fixed", "moving")
# spans of 99.8 % of the voxels that the extreme one may lie beyond them; of scans of brains and lungs about 1
_WILD = 5.0
# robust standard deviations from the median; of 374 affinely aligned brains the farthest lie 5.6 away
_ASTRAY = 7.0
# the least number of scans on one grid that tell what is usual, and the part of an axis or of 1 that they vary by
_USUAL, _VARIATION = 8, 0.005
# where fewer subjects than this part lack a segmentation, it is lost rather than not public
_FEW = 0.1


class Finding(NamedTuple):
    """What is wrong with a file: its kind in a word or two, and what exactly."""

    file: str
    kind: str
    what: str
    severity: Literal["error", "warning"] = "error"


@dataclass
class _Scan:
    """A scan, what belongs to it, and what reading it told."""

    image: str
    labels: list[str] = field(default_factory=list)
    keypoints: str | None = None
    parts: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    points: torch.Tensor | None = None
    digest: str | None = None
    grid: tuple[str, ...] | None = None
    blocks: np.ndarray | None = None


def _reason(error: Exception, file: str) -> str:
    text = " ".join(str(error).split()).removeprefix("scan: ")
    return text.removeprefix(f"{file}: ")


def _read(scan: _Scan, file: str, spatial_dims: int, label: bool = False) -> Any:
    """The image in a file; None, with a finding, where it cannot be read."""
    if not Path(file).exists():
        return None  # found before
    try:
        image = read_image(file, "scan", label)
    except ImportError:
        raise
    except Exception as e:  # of whatever kind: the others are still to be looked at
        scan.findings.append(Finding(file, "unreadable", _reason(e, file)))
        return None
    return DropSliceAxisd("x")({"x": image})["x"] if spatial_dims == 2 else image


def _block_means(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """An image of mean 0 and standard deviation 1, as means over at most 32 blocks along each axis."""
    means = np.clip(values, low, high)
    means = (means - means.mean()) / means.std()
    for axis, size in enumerate(means.shape):
        edges = np.unique(np.linspace(0, size, 33).astype(int)[:-1])
        counts = np.diff([*edges, size]).reshape([-1 if a == axis else 1 for a in range(means.ndim)])
        means = np.add.reduceat(means, edges, axis=axis) / counts
    return means


def _look(
    scan: _Scan,
    spatial_dims: int,
    known_labels: frozenset[int] = frozenset(),
    any_grid: bool = False,
    warnings: bool = True,
    outside: Literal["refuse", "clamp"] = "refuse",
) -> _Scan:
    """Read a scan and what belongs to it."""
    image = _read(scan, scan.image, spatial_dims)
    if image is not None:
        try:
            CheckRegistrationImaged("x", spatial_dims)({"x": image})
        except ValueError as e:
            low, high = float(image.min()), float(image.max())
            finite = np.isfinite(low) and np.isfinite(high)
            kind = "not finite" if not finite else "constant" if low == high else "dimensions"
            scan.findings.append(Finding(scan.image, kind, _reason(e, scan.image)))
        else:
            _measure(scan, image, warnings)
    for file in scan.labels:
        label = _read(scan, file, spatial_dims, label=True)
        if label is None or image is None:
            continue
        try:
            CheckLabeld("x", "image", resample=any_grid)({"x": label, "image": image})
        except ValueError as e:
            scan.findings.append(Finding(file, "label", _reason(e, file)))
            continue
        if known_labels and (unknown := sorted({*map(int, np.unique(label.numpy()))} - known_labels - {0})):
            what = f"holds the labels {unknown[:5]}; expected some of {min(known_labels)} to {max(known_labels)}"
            scan.findings.append(Finding(file, "label", what))
    if scan.keypoints and Path(scan.keypoints).is_file() and image is not None:
        item: dict[Hashable, Any] = {"x": scan.keypoints, "image": image}
        try:
            scan.points = load_keypoints(scan.keypoints, image.ndim - 1, np.asarray(image.affine, dtype=float))
            LoadKeypointsd("x", "image", outside=outside)(item)
        except (ValueError, OSError) as e:
            scan.findings.append(Finding(scan.keypoints, "keypoints", _reason(e, scan.keypoints)))
    return scan


def _measure(scan: _Scan, image: Any, warnings: bool) -> None:
    values = np.ascontiguousarray(image.numpy()[0])
    scan.digest = hashlib.sha256(repr(values.shape).encode() + values.tobytes()).hexdigest()
    if (grid := grid_of(image)) is not None:
        spacing = " x ".join(f"{mm:.3f}" for mm in grid.spacing)
        size = " x ".join(map(str, grid.size))
        scan.grid = (f"size {size}", f"spacing {spacing} mm", f"orientation {grid.orientation}")
    if not warnings:
        return
    low, high = map(float, np.percentile(values, (0.1, 99.9)))
    for extreme, beyond in ((values.max(), values.max() - high), (values.min(), low - values.min())):
        if beyond > _WILD * (high - low):
            what = f"a voxel has {extreme:g}, while 99.8 % of all lie between {low:g} and {high:g}"
            scan.findings.append(Finding(scan.image, "wild voxel", what, "warning"))
    scan.blocks = _block_means(values, low, high)


def _usual_grid(scans: Sequence[_Scan]) -> tuple[tuple[str, ...] | None, int, int]:
    """The grid of most of the scans, of how many, and of how many the grid is known."""
    grids = Counter(scan.grid for scan in scans if scan.grid)
    most, count = grids.most_common(1)[0] if grids else (None, 0)
    return most, count, grids.total()


def _other_grids(scans: Sequence[_Scan]) -> Iterator[Finding]:
    most, count, known = _usual_grid(scans)
    if most is None or 2 * count <= known:
        return
    for scan in scans:
        if scan.grid and (parts := [f"{a}, not {b}" for a, b in zip(scan.grid, most, strict=True) if a != b]):
            yield Finding(scan.image, "grid", f"{'; '.join(parts)} as {count} of {known} scans")


def _robust_z(values: np.ndarray, least: float | np.ndarray) -> np.ndarray:
    off = values - np.median(values, axis=0)
    return np.asarray(off / np.maximum(1.4826 * np.median(np.abs(off), axis=0), least))


def _astray(scans: Sequence[_Scan]) -> Iterator[Finding]:
    """Scans whose foreground lies elsewhere than that of the others, or that are unlike their mean."""
    most, _, _ = _usual_grid(scans)
    group = [scan for scan in scans if scan.blocks is not None and scan.grid == most]
    if most is None or len(group) < _USUAL:
        return
    blocks = np.stack([scan.blocks for scan in group if scan.blocks is not None])
    axes = tuple(range(1, blocks.ndim))
    above = np.maximum(blocks, 0)
    places = np.meshgrid(*(np.arange(n) / n for n in blocks.shape[1:]), indexing="ij")
    centres = np.stack([(above * place).sum(axes) / above.sum(axes) for place in places], axis=1)
    likeness = np.corrcoef(blocks.mean(0).ravel(), blocks.reshape(len(blocks), -1))[0, 1:]
    apart = np.abs(_robust_z(centres, _VARIATION)).max(1)
    unlike = -_robust_z(likeness, _VARIATION)
    for scan, z_apart, z_unlike, correlation in zip(group, apart, unlike, likeness, strict=True):
        if max(z_apart, z_unlike) > _ASTRAY:
            what = (
                f"lies apart from the other {len(group) - 1}: centre of its foreground {z_apart:.1f}, correlation with "
                f"the mean ({correlation:.2f}) {z_unlike:.1f} robust standard deviations off; align it by an affine "
                "registration"
            )
            yield Finding(scan.image, "alignment", what, "warning")


def _repeated(scans: Sequence[_Scan]) -> Iterator[Finding]:
    first: dict[str, _Scan] = {}
    for scan in scans:
        if scan.digest is None or (other := first.setdefault(scan.digest, scan)) is scan:
            continue
        across = bool(scan.parts and other.parts and {*scan.parts} != {*other.parts})
        parts = f"; in {', '.join(scan.parts)} and {', '.join(other.parts)}" if scan.parts and other.parts else ""
        what = f"the same voxels as {other.image}{parts}"
        yield Finding(scan.image, "repeated", what, "error" if across else "warning")


def _unequal_points(pairs: Iterable[Mapping[str, Any]], scans: Iterable[_Scan]) -> Iterator[Finding]:
    known = {scan.image: scan.points for scan in scans if scan.points is not None}
    for pair in pairs:
        points: dict[Hashable, Any] = {role: known.get(str(pair.get(role))) for role in _ROLES}
        if all(p is not None for p in points.values()):
            try:
                CheckSameKeypointsd(_ROLES)(points)
            except ValueError as e:
                yield Finding(str(pair["moving_keypoints"]), "keypoints", _reason(e, ""))


def _files_of(item: Mapping[str, Any]) -> Iterator[tuple[str, list[Any], Any]]:
    """Of a subject or of a pair the images, the label maps and masks beside each, and its keypoints."""
    if "image" in item:
        yield item["image"], [item["label"]], None
        return
    for role in _ROLES:
        beside = [item.get(f"{role}_{kind}") for kind in ("label", "mask")]
        yield str(item[role]), beside, item.get(f"{role}_keypoints")


def _scans_of(items: Iterable[Mapping[str, Any]], parts: Mapping[str, Iterable[Mapping[str, Any]]]) -> dict[str, _Scan]:
    """The scans of subjects or pairs, each once, with the parts of a split that it is in."""
    scans: dict[str, _Scan] = {}
    for item in items:
        for image, labels, keypoints in _files_of(item):
            scan = scans.setdefault(image, _Scan(image))
            scan.labels += [str(label) for label in labels if label and str(label) not in scan.labels]
            scan.keypoints = keypoints or scan.keypoints
    for part, members in parts.items():
        for image in dict.fromkeys(image for item in members for image, _, _ in _files_of(item)):
            scans[image].parts.append(part)
    return scans


def _look_at(
    scans: Mapping[str, _Scan], workers: int | None, progress: bool | None, spatial_dims: int, **how: Any
) -> list[_Scan]:
    """Read scans, several at a time; ``progress`` None: with a bar on a terminal."""
    look: Callable[[_Scan], _Scan] = partial(_look, spatial_dims=spatial_dims, **how)
    # threads: zlib, SHA-256 and NumPy let each other run
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        disable = None if progress is None else not progress
        return list(tqdm(pool.map(look, scans.values()), total=len(scans), unit="scan", disable=disable))


def _findings(scans: Sequence[_Scan], items: Iterable[Mapping[str, Any]], any_grid: bool = False) -> list[Finding]:
    """What is wrong with scans that were read, each alone and beside the others."""
    findings = [finding for scan in scans for finding in scan.findings]
    if not any_grid:
        findings += [*_other_grids(scans), *_astray(scans)]
    return [*findings, *_repeated(scans), *_unequal_points(items, scans)]


def usable_parts(
    found: OasisDataset | Learn2RegDataset,
    parts: Mapping[str, list[dict[str, Any]]],
    check: Literal["stop", "skip", "off"] = "stop",
    keypoints_outside: Literal["refuse", "clamp"] = "refuse",
) -> dict[str, list[dict[str, Any]]]:
    """
    Read the files of a split before a training, and refuse or leave out what is damaged, constant, not finite, on
    another grid than most, not of its image, or the same scan in two parts: the errors of :py:func:`check_files`.

    Args:
        found: the data set.
        parts: its split; a scan of two parts is left out of the training.
        check: ``"stop"``: refuse; ``"skip"``: leave out, and log what; ``"off"``: do not look. Defaults to ``"stop"``.
        keypoints_outside: see :py:class:`monai_deq.transforms.LoadKeypointsd`. Defaults to ``"refuse"``.

    Raises:
        ValueError: When something is found and is not to be left out, or nothing of a part remains.
    """
    if check not in ("stop", "skip", "off"):
        raise ValueError(f'check must be "stop", "skip" or "off", got {check!r}.')
    parts = dict(parts)
    if check == "off":
        return parts
    findings: list[Finding] = []
    if process_rank() == 0:
        # of two equal scans the later is named: a test subject stays
        items = [item for part in reversed(parts) for item in parts[part]]
        dims, names = (found.spatial_dims, found.label_names) if isinstance(found, OasisDataset) else (3, {})
        how = {"known_labels": frozenset(names), "warnings": False, "outside": keypoints_outside}
        findings = _findings(_look_at(_scans_of(items, parts), None, None, dims, **how), items)
    reasons = {f.file: f"{f.kind}: {f.file}: {f.what}" for f in gather_items(findings) if f.severity == "error"}
    first = next(iter(reasons.values()), "")
    for reason in reasons.values():
        logger.warning("%s%s", reason, "; left out" if check == "skip" else "")
    if reasons and check == "stop":
        more = f" and {len(reasons) - 1} more, see the log" if len(reasons) > 1 else ""
        advice = "Mend or remove what is named, leave it out by --check skip, or do not look by --check off."
        raise ValueError(f"the data set in {found.root} has files that spoil a training: {first}{more}. {advice}")
    for part, items in parts.items():
        parts[part] = [item for item in items if reasons.keys().isdisjoint(map(str, item.values()))]
        if items and not parts[part]:
            raise ValueError(f"none of the {len(items)} of the {part} part in {found.root} is usable: {first}")
    return parts


def check_files(
    data: str | Path,
    spatial_dims: int = 3,
    workers: int | None = None,
    split_sizes: Sequence[int | None] | None = None,
    progress: bool = True,
) -> tuple[list[Finding], int]:
    """
    Read all files of a data set, or of a list of pairs, and say what is wrong with them.

    Args:
        data: folder of neurite-OASIS, of Learn2Reg OASIS or of a paired Learn2Reg task; or a list of pairs, see
            :py:func:`monai_deq.data.read_pair_list`, whose scans may lie in any space.
        spatial_dims: 2 or 3. Defaults to 3.
        workers: number of files read at a time. Defaults to None: as many as there are CPUs.
        split_sizes: subjects or pairs for training, validation and test. Defaults to None: as the data set's
            ``split``; OASIS with fewer subjects has no parts then.
        progress: show a progress bar. Defaults to True.

    Returns:
        Findings, those of one file together, and the number of scans that were looked at.

    Raises:
        FileNotFoundError: When there is no data set or list.
        ValueError: When ``data`` is malformed, or ``spatial_dims``, ``workers`` or ``split_sizes`` does not fit.
    """
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}.")
    if spatial_dims not in (2, 3):
        raise ValueError(f"spatial_dims must be 2 or 3, got {spatial_dims}.")
    root, missing = expand_user(data), list[str]()
    items: Sequence[Mapping[str, Any]]
    parts: Mapping[str, Sequence[Mapping[str, Any]]] = {}
    names: frozenset[int] = frozenset()
    is_list = not root.is_dir()
    if is_list:
        items = read_pair_list(root, missing)
    elif any(root.glob("*_dataset.json")) and not (root / "OASIS_dataset.json").is_file():
        task = find_learn2reg(root, missing=missing)
        items, parts = task.pairs, task.split(split_sizes, require_keypoints=False)
    else:
        found = find_oasis(root, spatial_dims, missing)
        items, names = found.subjects, frozenset(found.label_names)
        try:
            parts = found.split(split_sizes, require_labels=False)
        except ValueError:
            if split_sizes is not None:
                raise  # else there are fewer than the paper's
        unlabelled = [s["image"] for s in found.subjects if s["label"] is None]
        if len(unlabelled) < _FEW * len(items):
            missing += [f"{image} (its segmentation)" for image in unlabelled]
    done = _look_at(_scans_of(items, parts), workers, progress, spatial_dims, known_labels=names, any_grid=is_list)
    findings = [Finding(file, "missing", "is named, or belongs to a scan, and is not there") for file in missing]
    findings += _findings(done, items, any_grid=is_list)
    return sorted(dict.fromkeys(findings), key=lambda finding: finding.file), len(done)
