# SPDX-License-Identifier: Apache-2.0
"""Before a training: what is wrong with the files of a data set or of a list of pairs."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from monai_deq.data import find_learn2reg, find_oasis, grid_of, read_image, read_pair_list
from monai_deq.transforms import (
    CheckLabeld,
    CheckRegistrationImaged,
    CheckSameKeypointsd,
    DropSliceAxisd,
    LoadKeypointsd,
    load_keypoints,
)
from monai_deq.utils import expand_user

__all__ = ["Finding", "check_files"]

_ROLES = ("fixed", "moving")
# spans of 99.8 % of the voxels that the extreme one may lie beyond them; of scans of brains and lungs about 1
_WILD = 5.0
# robust standard deviations from the median; of 374 affinely aligned brains the farthest lie 5 away
_ASTRAY = 8.0
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
    foreground: np.ndarray | None = None


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


def _foreground(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Where an image is above its mean, as means over at most 32 blocks along each axis."""
    clipped = np.clip(values, low, high)
    mask = (clipped > clipped.mean()).astype(np.float32)
    for axis, size in enumerate(mask.shape):
        edges = np.unique(np.linspace(0, size, 33).astype(int)[:-1])
        counts = np.diff([*edges, size]).reshape([-1 if a == axis else 1 for a in range(mask.ndim)])
        mask = np.add.reduceat(mask, edges, axis=axis) / counts
    return mask


def _look(scan: _Scan, spatial_dims: int, known_labels: frozenset[int], any_grid: bool) -> _Scan:
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
            _measure(scan, image)
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
            LoadKeypointsd("x", "image", outside="refuse")(item)
        except (ValueError, OSError) as e:
            scan.findings.append(Finding(scan.keypoints, "keypoints", _reason(e, scan.keypoints)))
    return scan


def _measure(scan: _Scan, image: Any) -> None:
    values = np.ascontiguousarray(image.numpy()[0])
    scan.digest = hashlib.sha256(repr(values.shape).encode() + values.tobytes()).hexdigest()
    low, high = map(float, np.percentile(values, (0.1, 99.9)))
    for extreme, beyond in ((values.max(), values.max() - high), (values.min(), low - values.min())):
        if beyond > _WILD * (high - low):
            what = f"a voxel has {extreme:g}, while 99.8 % of all lie between {low:g} and {high:g}"
            scan.findings.append(Finding(scan.image, "wild voxel", what, "warning"))
    if (grid := grid_of(image)) is not None:
        spacing = " x ".join(f"{mm:.3f}" for mm in grid.spacing)
        size = " x ".join(map(str, grid.size))
        scan.grid = (f"size {size}", f"spacing {spacing} mm", f"orientation {grid.orientation}")
    scan.foreground = _foreground(values, low, high)


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
    """Scans whose foreground lies elsewhere than that of the others, or has another shape."""
    most, count, _ = _usual_grid(scans)
    if count < _USUAL:
        return
    group = [scan for scan in scans if scan.foreground is not None and scan.grid == most]
    masks = np.stack([scan.foreground for scan in group if scan.foreground is not None])
    axes = tuple(range(1, masks.ndim))
    places = np.meshgrid(*(np.arange(n) / n for n in masks.shape[1:]), indexing="ij")
    centres = np.stack([(masks * place).sum(axes) / masks.sum(axes) for place in places], axis=1)
    overlap = 2 * np.minimum(masks, usual := masks.mean(0)).sum(axes) / (masks.sum(axes) + usual.sum())
    apart = np.abs(_robust_z(centres, _VARIATION)).max(1)
    unlike = -_robust_z(overlap, _VARIATION)
    for scan, z_apart, z_unlike, dice in zip(group, apart, unlike, overlap, strict=True):
        if max(z_apart, z_unlike) > _ASTRAY:
            what = (
                f"its foreground lies apart from that of the other {count - 1}: centre {z_apart:.1f}, overlap (Dice "
                f"{dice:.2f}) {z_unlike:.1f} robust standard deviations off; align it by an affine registration"
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


def _unequal_points(pairs: Sequence[Mapping[str, Any]], scans: Mapping[str, _Scan]) -> Iterator[Finding]:
    for pair in pairs:
        points: dict[Hashable, Any] = {role: scans[str(pair[role])].points for role in _ROLES}
        if all(p is not None for p in points.values()):
            try:
                CheckSameKeypointsd(_ROLES)(points)
            except ValueError as e:
                yield Finding(str(pair["moving_keypoints"]), "keypoints", _reason(e, ""))


def _of_subjects(found: Any, split_sizes: Sequence[int | None] | None, missing: list[str]) -> dict[str, _Scan]:
    scans = {s["image"]: _Scan(s["image"], [s["label"]] if s["label"] else []) for s in found.subjects}
    try:
        split = found.split(split_sizes, require_labels=False)
    except ValueError:
        if split_sizes is not None:
            raise
        split = {}  # fewer than the paper's
    for part, subjects in split.items():
        for subject in subjects:
            scans[subject["image"]].parts.append(part)
    unlabelled = [s["image"] for s in found.subjects if s["label"] is None]
    if len(unlabelled) < _FEW * len(scans):
        missing += [f"{image} (its segmentation)" for image in unlabelled]
    return scans


def _of_pairs(pairs: Sequence[Mapping[str, Any]], split: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, _Scan]:
    scans: dict[str, _Scan] = {}
    for pair in pairs:
        for role in _ROLES:
            scan = scans.setdefault(str(pair[role]), _Scan(str(pair[role])))
            files = [str(pair[key]) for kind in ("label", "mask") if (key := f"{role}_{kind}") in pair]
            scan.labels += [file for file in files if file not in scan.labels]
            scan.keypoints = pair.get(f"{role}_keypoints", scan.keypoints)
    for part, items in split.items():
        for image in {str(item[role]) for item in items for role in _ROLES}:
            scans[image].parts.append(part)
    return scans


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
    workers = workers if workers is not None else os.cpu_count() or 1
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}.")
    if spatial_dims not in (2, 3):
        raise ValueError(f"spatial_dims must be 2 or 3, got {spatial_dims}.")
    root, missing = expand_user(data), list[str]()
    pairs: Sequence[Mapping[str, Any]] = ()
    names: frozenset[int] = frozenset()
    is_list = not root.is_dir()
    if is_list:
        pairs = read_pair_list(root, missing)
        scans = _of_pairs(pairs, {})
    elif any(root.glob("*_dataset.json")) and not (root / "OASIS_dataset.json").is_file():
        task = find_learn2reg(root, missing=missing)
        pairs = task.pairs
        scans = _of_pairs(pairs, task.split(split_sizes, require_keypoints=False))
    else:
        found = find_oasis(root, spatial_dims, missing)
        names = frozenset(found.label_names)
        scans = _of_subjects(found, split_sizes, missing)
    look: Callable[[_Scan], _Scan] = partial(_look, spatial_dims=spatial_dims, known_labels=names, any_grid=is_list)
    # threads: zlib, SHA-256 and NumPy let each other run
    with ThreadPoolExecutor(workers) as pool:
        done = list(tqdm(pool.map(look, scans.values()), total=len(scans), unit="scan", disable=not progress))
    findings = [Finding(file, "missing", "is named, or belongs to a scan, and is not there") for file in missing]
    findings += [finding for scan in done for finding in scan.findings]
    if not is_list:
        findings += [*_other_grids(done), *_astray(done)]
    findings += [*_repeated(done), *_unequal_points(pairs, scans)]
    return sorted(dict.fromkeys(findings), key=lambda finding: finding.file), len(done)
