# SPDX-License-Identifier: Apache-2.0
"""A synthetic cohort of inhale/exhale lung CT in the layout of Learn2Reg NLST, so that everything runs without a
download.

Nothing in it comes from a scan. Every pair has an anatomy of its own, written down in millimetres: two lungs with
fissures and a tree of vessels that grows into them, heart, diaphragm, ribs, spine. The anatomy is that of the exhale
scan, which is the moving one; the fixed, inhale scan shows it through a smooth displacement field that is known, so
that ``fixed(x) = moving(x + ddf(x))`` but for the density of the lung, which changes with the air in it, and for noise.
Keypoints are the branches of the vessels. It shows that software works; it says nothing about the accuracy of a method
on patients.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy.ndimage import gaussian_filter, map_coordinates
from scipy.spatial import cKDTree

from monai_deq.data.sample_folder import write_sample_folder
from monai_deq.data.sample_shapes import SmoothWaves, ellipsoid_depth

__all__ = ["resolve_lung_dataset_dir", "sample_lung_dataset_dir", "write_sample_lung_cohort"]

logger = logging.getLogger("monai_deq")

VERSION = 1  # raise it when the same parameters give other files

# Positions are in mm from the centre of the field of view: axis 0 to the left, 1 to the back, 2 to the head.
_FIELD_MM = np.array([288.0, 216.0, 288.0])
# Hounsfield units
_AIR, _FAT, _MUSCLE, _BLOOD, _BONE, _FISSURE = -1000.0, -90.0, 40.0, 45.0, 420.0, -620.0
_INHALE, _EXHALE = -870.0, -800.0  # the lung itself
_NOISE, _TEXTURE = 20.0, 25.0
_BRANCHINGS = 6  # a lung has 2^6 - 1 branches of its vessels


@dataclass(frozen=True)
class _Segment:
    """A piece of vessel between two points, with the radius at either, all in mm."""

    start: np.ndarray
    end: np.ndarray
    start_radius: float
    end_radius: float


@dataclass(frozen=True)
class _Anatomy:
    """What differs between the people of the cohort, as they have breathed out."""

    radii: np.ndarray  # of the lungs, mm
    apart: float  # distance of the lungs' centres from the midline, mm
    base: float  # level of the diaphragm at the edge, mm
    dome: float  # height of the diaphragm, mm
    rib_phase: float  # where the ribs begin, mm
    tilt: float  # of the fissures, mm a mm
    texture: SmoothWaves
    vessels: list[_Segment]
    branches: np.ndarray  # (points, 3), mm


def _lung_depth(points: np.ndarray, radii: np.ndarray, apart: float, base: float, dome: float) -> np.ndarray:
    """Depth in mm below the surface of the lungs at points ``(3, *spatial)``, negative outside."""
    a, b, c = points
    lung = ellipsoid_depth([np.abs(a) - apart, b, c + 20.0], radii.tolist())
    from_axis = ((np.abs(a) - apart) / radii[0]) ** 2 + (b / radii[1]) ** 2
    diaphragm = c - base - dome * (1.0 - np.minimum(from_axis, 1.5))
    heart = ellipsoid_depth([a - 22.0, b + 22.0, c + 45.0], [48.0, 42.0, 48.0])
    depth: np.ndarray = np.minimum.reduce([lung, diaphragm, -heart])
    return depth


def _grow(
    rng: np.random.Generator, node: np.ndarray, targets: np.ndarray, radius: float, level: int, vessels: list[_Segment]
) -> list[np.ndarray]:
    """Grow a tree of vessels from a node to the targets: each branch leads towards one half of them."""
    if level == 0 or len(targets) < 2:
        vessels.append(_Segment(node, targets.mean(axis=0), radius, 0.6 * radius))
        return []
    end = node + rng.uniform(0.35, 0.5) * (targets.mean(axis=0) - node)
    vessels.append(_Segment(node, end, radius, 0.85 * radius))
    centred = targets - targets.mean(axis=0)
    order = np.argsort(centred @ np.linalg.svd(centred, full_matrices=False)[2][0])
    half = len(order) // 2
    branches = [end]
    for part in (order[:half], order[half:]):
        branches += _grow(rng, end, targets[part], 0.78 * radius, level - 1, vessels)
    return branches


def _anatomy(rng: np.random.Generator) -> _Anatomy:
    """Draw an anatomy."""
    radii = np.array([46.0, 74.0, 120.0]) * np.exp(rng.normal(0.0, 0.04, 3))
    apart = float(rng.uniform(56.0, 62.0))
    base, dome = float(rng.uniform(-92.0, -84.0)), float(rng.uniform(28.0, 38.0))
    vessels: list[_Segment] = []
    branches: list[np.ndarray] = []
    for side in (-1.0, 1.0):
        # twice as many targets as ends of the tree, spread over the lung
        targets = rng.uniform(-1.0, 1.0, (200 * 2**_BRANCHINGS, 3)) * radii + [side * apart, 0.0, -20.0]
        targets = targets[_lung_depth(targets.T, radii, apart, base, dome) > 6.0][: 2 ** (_BRANCHINGS + 1)]
        hilum = np.array([side * (apart - 0.75 * radii[0]), 8.0, -5.0]) + rng.normal(0.0, 3.0, 3)
        branches += _grow(rng, hilum, targets, 8.0, _BRANCHINGS, vessels)
    points = np.array(branches)
    # where lung is all around them, so that they can be seen
    points = points[_lung_depth(points.T, radii, apart, base, dome) > 4.0]
    phase, tilt = float(rng.uniform(0.0, 26.0)), float(rng.uniform(0.6, 0.9))
    return _Anatomy(radii, apart, base, dome, phase, tilt, SmoothWaves(rng, 36.0), vessels, points)


def _vessel_depth(points: np.ndarray, vessels: Sequence[_Segment], thinnest: float) -> np.ndarray:
    """Depth in mm below the surface of the vessels at points ``(points, 3)``, negative outside."""
    centres, radii = [], []
    for v in vessels:
        t = np.linspace(0.0, 1.0, max(2, int(np.ceil(np.linalg.norm(v.end - v.start))) + 1))[:, None]
        centres.append(v.start + t * (v.end - v.start))
        radii.append(v.start_radius + t[:, 0] * (v.end_radius - v.start_radius))
    distance, index = cKDTree(np.concatenate(centres)).query(points, k=6)
    depth: np.ndarray = (np.maximum(np.concatenate(radii), thinnest)[index] - distance).max(axis=1)
    return depth


def _scan(points: np.ndarray, person: _Anatomy, lung_hu: float, voxel: float) -> tuple[np.ndarray, np.ndarray]:
    """
    What a scan shows at points ``(3, *spatial)`` of the anatomy: Hounsfield units (without noise) and the lung mask.

    Edges are as wide as a voxel, ``voxel`` mm, so that the image is a smooth function of the points.
    """
    a, b, c = points

    def inside(depth: np.ndarray) -> np.ndarray:
        return np.clip(depth / voxel + 0.5, 0.0, 1.0)

    image = np.full(a.shape, _AIR)

    def paint(depth: np.ndarray, hu: np.ndarray | float) -> None:
        nonlocal image
        share = inside(depth)
        image += share * (hu - image)

    thorax = ellipsoid_depth([a, b, 0.0 * c], [126.0, 94.0, 1.0])
    paint(thorax, _FAT)
    paint(thorax - 5.0, _MUSCLE)
    # ribs: rings in the wall, every 26 mm, lower in front
    ring = np.mod(c - 0.35 * b - person.rib_phase, 26.0) - 13.0
    paint(5.5 - np.hypot(thorax - 12.0, ring), _BONE)
    paint(18.0 - np.hypot(a, b - 74.0), _BONE)
    lung = _lung_depth(points, person.radii, person.apart, person.base, person.dome)
    texture = _TEXTURE * person.texture(points.astype(np.float32))
    paint(lung, lung_hu + texture)
    # oblique fissures in both lungs, high in the back, and the horizontal one in the right lung in front of it
    oblique = (c + 10.0 - person.tilt * b + 0.002 * a * b) / np.hypot(1.0, person.tilt)
    horizontal = np.where((a < 0.0) & (oblique > 0.0), np.abs(c - 12.0 - 0.1 * b), np.inf)
    share = np.exp(-np.square(np.minimum(np.abs(oblique), horizontal) / (1.0 + 0.4 * voxel))) * inside(lung)
    image += share * (_FISSURE - image)
    near = lung > -voxel
    depth = np.full(a.shape, -np.inf)
    # a vessel thinner than a voxel still brightens it
    depth[near] = _vessel_depth(points[:, near].T, person.vessels, 0.4 * voxel)
    image += inside(depth) * inside(lung) * (_BLOOD - image)
    return image, lung > 0.0


def _breathing(points: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Displacement in mm from inhale to exhale at points ``(3, *spatial)`` of the inhale scan; smooth everywhere."""
    a, b, c = points
    up, back, inwards = rng.uniform(12.0, 19.0), rng.uniform(3.0, 6.0), rng.uniform(2.0, 4.0)

    def rise(t: np.ndarray) -> np.ndarray:
        t = np.clip(t, 0.0, 1.0)
        return t * t * (3.0 - 2.0 * t)

    # the diaphragm rises, most in the middle of either lung and least at the apex, the spine and the ribs
    free = 0.4 + 0.6 * np.exp(-((a / 130.0) ** 4) - (b / 100.0) ** 4)
    free -= 0.3 * np.exp(-((a / 45.0) ** 2) - (b / 60.0 - 1.0) ** 2)
    low = rise((115.0 - c) / 210.0)
    displacement = np.stack(
        [-inwards * np.tanh(a / 70.0) * (0.4 + 0.6 * low), back * rise((60.0 - b) / 140.0), up * low * free]
    )
    for wavelength, strength in ((140.0, 1.2), (75.0, 0.5)):
        waves = [SmoothWaves(rng, wavelength, count=10) for _ in range(3)]
        displacement += strength * np.stack([w(points.astype(np.float32)) for w in waves])
    return displacement


def _interpolate(ddf: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Field ``(3, *spatial)`` at points ``(points, 3)`` in voxels, linearly."""
    # the type of the sums is that of the result
    return np.stack([map_coordinates(u, points.T, np.float64, order=1, mode="nearest") for u in ddf], axis=1)


def _fixed_points(ddf: np.ndarray, moving_points: np.ndarray) -> np.ndarray:
    """The points that a field carries to given points: solves ``x + ddf(x) = y``. Slopes of the field are below 0.4."""
    x = moving_points
    for _ in range(40):
        x = moving_points - _interpolate(ddf, x)
    return x


def _pair(rng: np.random.Generator, size: Sequence[int]) -> dict[str, np.ndarray]:
    """Images, masks and keypoints of a pair, ``0`` the fixed one, and the field between them."""
    spacing = _spacing(size)
    person = _anatomy(rng)
    centre = (np.asarray(size) - 1) / 2
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in size), indexing="ij")).astype(np.float64)

    def in_mm(voxels: np.ndarray) -> np.ndarray:
        return (voxels - centre.reshape(-1, 1, 1, 1)) * spacing.reshape(-1, 1, 1, 1)

    # the truth is what is written: float32 values on the grid, linear between them
    ddf = (_breathing(in_mm(grid), rng) / spacing.reshape(-1, 1, 1, 1)).astype(np.float32)
    # six decimals, as the files have them
    fixed_points = _fixed_points(ddf, person.branches / spacing + centre).round(6)
    pair = {"ddf": ddf, "keypoints0": fixed_points, "keypoints1": fixed_points + _interpolate(ddf, fixed_points)}
    voxel = float(spacing.mean())
    for i, (points, lung_hu) in enumerate(((in_mm(grid + ddf), _INHALE), (in_mm(grid), _EXHALE))):
        image, mask = _scan(points, person, lung_hu, voxel)
        image += gaussian_filter(rng.normal(size=size), 0.4) * _NOISE
        pair[f"image{i}"] = np.clip(image.round(), -1024, 3071).astype(np.int16)
        pair[f"mask{i}"] = mask.astype(np.uint8)
    return pair


def _spacing(size: Sequence[int]) -> np.ndarray:
    """Voxel size in mm that fits the chest into ``size`` voxels."""
    return _FIELD_MM / np.asarray(size)


def write_sample_lung_cohort(
    output_dir: str | Path,
    num_pairs: Sequence[int] = (12, 2, 4),
    spatial_size: Sequence[int] = (48, 32, 64),
    seed: int = 0,
) -> Path:
    """
    Write a synthetic cohort of lung CT pairs in the layout of Learn2Reg NLST.

    Images and masks in ``imagesTr`` and ``masksTr`` (test pairs in ``imagesTs`` ...), keypoints in voxel coordinates in
    ``keypointsTr``, ``NLST_0001_0000`` being the fixed (inhale) and ``NLST_0001_0001`` the moving (exhale) scan of the
    first pair; ``NLST_dataset.json`` lists the pairs. The true displacements are in ``true_ddf``, in the format of a
    submission, ``disp_0001_0001.nii.gz``: interpolated linearly at the fixed keypoints they lead to the moving
    keypoints to within 1e-5 voxel.

    The folder appears whole or not at all. The same arguments give the same files.

    Args:
        output_dir: folder to write; its parent is made where needed.
        num_pairs: number of pairs for training, validation and test. Defaults to (12, 2, 4).
        spatial_size: voxels of a scan; voxels are 6 x 6.75 x 4.5 mm by default. Defaults to (48, 32, 64).
        seed: seed of everything. Defaults to 0.

    Returns:
        ``output_dir``; where it holds this very cohort already it is left untouched.

    Raises:
        ValueError: When an argument is out of range.
        FileExistsError: When ``output_dir`` holds anything else.
    """
    size, counts = [int(n) for n in spatial_size], [int(n) for n in num_pairs]
    if len(size) != 3 or min(size) < 16:
        raise ValueError(f"spatial_size must give 3 sizes of at least 16, got {spatial_size}.")
    if len(counts) != 3 or min(counts) < 0 or not 1 <= sum(counts) <= 9999:
        raise ValueError(f"num_pairs must give 3 numbers that sum to 1..9999, none negative, got {num_pairs}.")
    parameters = {"cohort": "lung", "version": VERSION, "num_pairs": counts, "spatial_size": size, "seed": seed}
    return write_sample_folder(output_dir, parameters, lambda folder: _write(folder, counts, size, seed))


def _write(root: Path, counts: Sequence[int], size: Sequence[int], seed: int) -> None:
    scans: dict[str, list[dict[str, str]]] = {"Tr": [], "Ts": []}
    pairs: dict[str, list[dict[str, str]]] = {}
    number = 0
    parts = ("training_paired_images", "registration_val", "registration_test")
    for part, count, where in zip(parts, counts, ("Tr", "Tr", "Ts"), strict=True):
        pairs[part] = []
        for _ in range(count):
            number += 1
            pair = _pair(np.random.default_rng([seed, number]), size)
            names = [f"NLST_{number:04d}_{i:04d}" for i in range(2)]
            for i, name in enumerate(names):
                _save(root / f"images{where}" / f"{name}.nii.gz", pair[f"image{i}"])
                _save(root / f"masks{where}" / f"{name}.nii.gz", pair[f"mask{i}"])
                keypoints = root / f"keypoints{where}" / f"{name}.csv"
                keypoints.parent.mkdir(exist_ok=True)
                np.savetxt(keypoints, pair[f"keypoints{i}"], fmt="%.6f", delimiter=",")
                # the data set's own list names the keypoints so, though they are .csv files
                files = {kind: f"./{kind}s{where}/{name}.nii.gz" for kind in ("image", "mask", "keypoint")}
                scans[where].append(files)
            _save(root / "true_ddf" / f"disp_{number:04d}_{number:04d}.nii.gz", np.moveaxis(pair["ddf"], 0, -1))
            fixed, moving = (f"./images{where}/{name}.nii.gz" for name in names)
            pairs[part].append({"fixed": fixed, "moving": moving})
    content = {
        "name": "NLST",
        "release": f"synthetic {VERSION}",
        "description": "Synthetic inhale/exhale lung CT in the layout of Learn2Reg NLST; no scan of a person",
        "pairings": "paired",
        "provided_data": {"0": ["image", "mask", "keypoint"]},
        "registration_direction": {"fixed": 0, "moving": 1},
        "modality": {"0": "CT"},
        "img_shift": {"fixed": "inspiration", "moving": "expiration"},
        "labels": {"0": {"0": "background", "1": "lung"}},
        "tensorImageSize": {"0": "3D"},
        "tensorImageShape": {"0": list(size)},
        "numTraining": len(scans["Tr"]),
        "numTest": len(scans["Ts"]),
        "training": scans["Tr"],
        "test": scans["Ts"],
        "numPairedTraining": counts[0],
        "training_paired_images": pairs[parts[0]],
        "numPairedTest": counts[2],
        "test_paired_images": pairs[parts[2]],
        "numRegistration_val": counts[1],
        "registration_val": pairs[parts[1]],
        "numRegistration_test": counts[2],
        "registration_test": pairs[parts[2]],
    }
    (root / "NLST_dataset.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (root / "README.txt").write_text(
        "Synthetic lung CT written by monai_deq. No scan of a person is in here, in spite of the file names, which\n"
        "follow the Learn2Reg NLST layout so that the same software reads them. They show that software works and say\n"
        "nothing about the accuracy of a method on real images. Displacements: true_ddf. Parameters: sample.json.\n",
        encoding="utf-8",
    )


def _save(file: Path, array: np.ndarray) -> None:
    spacing = _spacing(array.shape[:3])
    affine = np.diag([*(spacing * [-1, -1, 1]), 1.0])
    affine[:3, 3] = -affine[:3, :3] @ ((np.asarray(array.shape[:3]) - 1) / 2)
    image = nib.Nifti1Image(array, affine)
    image.header.set_xyzt_units("mm")
    file.parent.mkdir(exist_ok=True)
    nib.save(image, file)


def sample_lung_dataset_dir() -> Path:
    """Where the sample lung cohort lives: in ``$MONAI_DATA_DIRECTORY`` if set, else in ``~/.cache/monai_deq``."""
    data_directory = os.environ.get("MONAI_DATA_DIRECTORY")
    if data_directory:
        return Path(data_directory).expanduser() / "monai_deq_sample_lung"
    return Path.home() / ".cache" / "monai_deq" / f"sample-lung-{VERSION}"


def resolve_lung_dataset_dir(dataset_dir: str | Path | None = None) -> Path:
    """
    The folder of the lung data set, or of the synthetic sample cohort where none is given.

    Args:
        dataset_dir: folder of the data set. None or empty: the sample cohort, written at the first use.

    Raises:
        FileNotFoundError: When the folder does not exist.
    """
    if dataset_dir is None or str(dataset_dir) == "":
        root = write_sample_lung_cohort(sample_lung_dataset_dir())
        logger.info(
            "no data set given: using the SYNTHETIC sample lung cohort in %s; for real data give --dataset_dir "
            "(Learn2Reg NLST)",
            root,
        )
        return root
    root = Path(dataset_dir).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(
            f"dataset_dir {str(root)!r} does not exist or is no folder. Give the folder of the data set, or leave it "
            "out to use the synthetic sample lung cohort."
        )
    return root
