# SPDX-License-Identifier: Apache-2.0
"""Synthetic brains and chests; nothing in them comes from a scan. They say nothing about accuracy on patients.

Brain: one anatomy of ellipsoids, tubes and a folded cortex in mm. A subject is this anatomy with its own shape (size of
the ventricles, thickness of the cortex, ...) seen through its own smooth diffeomorphism, with T1-like intensities, bias
field and noise, and the labels of the data set.

Chest: each pair has its own lungs, fissures, tree of vessels, heart, diaphragm, ribs and spine in mm. They are those of
the moving (exhale) scan; the fixed (inhale) one shows them through a known smooth field, ``fixed(x) = moving(x +
ddf(x))`` but for the density of the lung and for noise. Keypoints are the branches of the vessels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from monai.networks.blocks import DVF2DDF
from scipy.ndimage import gaussian_filter, map_coordinates
from scipy.spatial import cKDTree

from monai_deq.data.labels import SEG35_LABELS

__all__ = ["BrainShape", "brain_affine", "brain_images", "brain_spacing", "diffeomorphism", "lung_affine", "lung_pair"]


class SmoothWaves:
    """A smooth random field of one wavelength in mm that can be evaluated anywhere: a sum of random plane waves."""

    def __init__(self, rng: np.random.Generator, wavelength: float, count: int = 20) -> None:
        direction = rng.normal(size=(count, 3))
        direction /= np.linalg.norm(direction, axis=1, keepdims=True)
        self.k = (2 * np.pi / wavelength * direction).astype(np.float32)
        self.phase = rng.uniform(0, 2 * np.pi, count).astype(np.float32)

    def __call__(self, points: np.ndarray) -> np.ndarray:
        """Values ``(*spatial)``, float32, of zero mean and unit variance, at points ``(3, *spatial)`` in mm."""
        total = np.zeros(points.shape[1:], dtype=np.float32)
        for k, phase in zip(self.k, self.phase, strict=True):
            total += np.cos(np.tensordot(k, points, axes=1) + phase)
        return total * np.float32(np.sqrt(2.0 / len(self.k)))


def _ellipsoid_depth(q: Sequence[np.ndarray], radii: Sequence[np.ndarray | float]) -> np.ndarray:
    """Depth in mm below an ellipsoid's surface, to first order, negative outside; ``q``: position from its centre."""
    f = np.sqrt(sum((x / r) ** 2 for x, r in zip(q, radii, strict=True)))
    slope = np.sqrt(sum((x / np.square(r)) ** 2 for x, r in zip(q, radii, strict=True)))
    return (1.0 - f) * f / np.maximum(slope, 1e-6)


def _per_axis(values: np.ndarray) -> np.ndarray:
    """One value an axis, to be combined with ``(ndim, *spatial)``."""
    return values.reshape(-1, *[1] * len(values))


# --- brain: mm on the 160 x 192 x 224 field of neurite-OASIS, axis 0 to the left, 1 down, 2 to the front ---
_MIDLINE = 79.5
_CENTRE = {2: np.array([79.5, 95.5]), 3: np.array([79.5, 91.5, 106.0])}
_FIELD_MM = {2: np.array([160.0, 192.0]), 3: np.array([168.0, 168.0, 224.0])}
_SLICE_MM = 111.5  # front position of the coronal slice: through thalamus, putamen and hippocampus
# Deep structures, painted in this order. Centre (distance from the midline, down, front) and radii in mm.
_ELLIPSOIDS = {
    "Ventral-DC": ((10.0, 109.0, 109.0), (8.5, 9.0, 13.0)),
    "Thalamus": ((13.5, 92.0, 107.0), (11.0, 12.0, 17.0)),
    "Putamen": ((27.5, 99.0, 126.0), (6.5, 13.0, 22.0)),
    "Pallidum": ((20.0, 101.0, 121.0), (5.0, 8.0, 12.0)),
    "Accumbens": ((11.0, 108.0, 140.0), (6.0, 6.0, 8.0)),
    "Amygdala": ((27.0, 119.0, 124.0), (9.0, 8.5, 9.0)),
}
# Bent structures: sections (front position, distance from the midline, down, radius) in mm.
_TUBES = {
    "Caudate": ((98.0, 25.5, 72.0, 5.0), (120.0, 23.0, 77.0, 6.0), (142.0, 15.0, 87.0, 9.0)),
    "Hippocampus": ((88.0, 22.0, 104.0, 6.5), (112.0, 29.0, 119.0, 8.5)),
    "Lateral-Ventricle": (
        (60.0, 27.0, 90.0, 8.0),
        (80.0, 20.0, 80.0, 9.0),
        (110.0, 11.0, 75.5, 8.5),
        (146.0, 10.5, 83.0, 7.5),
    ),
    "Inf-Lat-Ventricle": ((90.0, 31.0, 106.0, 4.5), (116.0, 37.0, 115.0, 4.0)),
    "Choroid-Plexus": ((72.0, 22.0, 86.0, 4.5), (112.0, 11.0, 79.0, 3.5)),
}
# T1-like brightness: white matter bright, grey matter between, fluid dark.
_FLUID = 0.06
_BRIGHTNESS = {
    "Cerebral-White-Matter": 0.40,
    "Cerebellum-White-Matter": 0.36,
    "Cerebral-Cortex": 0.26,
    "Cerebellum-Cortex": 0.24,
    "Thalamus": 0.32,
    "Caudate": 0.27,
    "Putamen": 0.30,
    "Pallidum": 0.37,
    "Hippocampus": 0.25,
    "Amygdala": 0.24,
    "Accumbens": 0.28,
    "Ventral-DC": 0.36,
    "Brain-Stem": 0.35,
    "Choroid-Plexus": 0.15,
}
_FOLD_MM = 44.0  # twice the distance from sulcus to sulcus
# The folds and the fine contrast belong to the anatomy: all subjects share them, hence a seed of their own.
_anatomy_rng = np.random.default_rng(2025)
_FOLDS = SmoothWaves(_anatomy_rng, wavelength=_FOLD_MM)
_FOLIA = SmoothWaves(_anatomy_rng, wavelength=16.0)
_CONTRAST = SmoothWaves(_anatomy_rng, wavelength=30.0)


class BrainShape:
    """What differs between subjects apart from their diffeomorphism; 1 is the mean anatomy. Drawn from ``rng``."""

    def __init__(self, rng: np.random.Generator) -> None:
        spreads = (0.15, 0.05, 0.07, 0.06, 0.03, 0.03)
        drawn = (float(np.exp(rng.normal(0.0, spread))) for spread in spreads)
        self.ventricles, self.nuclei, self.hippocampus, self.cortex, self.white, self.grey = drawn


def _tube_depth(
    along: np.ndarray, p: np.ndarray, q: np.ndarray, sections: Sequence[Sequence[float]], scale: float
) -> np.ndarray:
    """Depth in mm below the surface of a bent tube with round ends, negative outside."""
    s, cp, cq, r = np.asarray(sections, dtype=np.float32).T
    over = along - np.clip(along, s[0], s[-1])
    distance = np.sqrt((p - np.interp(along, s, cp)) ** 2 + (q - np.interp(along, s, cq)) ** 2 + over**2)
    return scale * np.interp(along, s, r) - distance


def _brain(points: np.ndarray, shape: BrainShape) -> tuple[np.ndarray, np.ndarray]:
    """Labels (seg35) and brightness of the anatomy at points ``(3, *spatial)`` in mm."""
    a, j, k = np.abs(points[0] - _MIDLINE), points[1], points[2]
    left = points[0] > _MIDLINE
    number = {name: label for label, name in SEG35_LABELS.items()}
    labels = np.zeros(a.shape, dtype=np.uint8)
    tissue = np.zeros(a.shape, dtype=np.float32)

    def paint(inside: np.ndarray, name: str) -> None:
        of_left, of_right = (number.get(name) or number[f"{which}-{name}"] for which in ("Left", "Right"))
        labels[inside] = np.where(left[inside], of_left, of_right)
        brightness = _BRIGHTNESS.get(name, _FLUID)
        tissue[inside] = brightness * (shape.white if brightness > 0.33 else shape.grey if brightness > 0.2 else 1.0)

    # cerebrum: a dome that is flat below, and a temporal lobe
    dome = _ellipsoid_depth([a, j - 74.0, k - 106.0], [68.0, np.where(j < 74.0, 56.0, 40.0), 88.0])
    temporal = _ellipsoid_depth([a - 42.0, j - 113.0, k - 120.0], [23.0, 27.0, 42.0])
    cerebrum = np.maximum(dome, temporal)
    # the fissures between the hemispheres (down to the corpus callosum) and above the temporal lobe
    between = np.maximum(a - 1.0, j - (58.0 + 0.018 * (k - 106.0) ** 2))
    sylvian = np.maximum.reduce([np.abs(j - 106.0 - 0.25 * (k - 130.0)) - 1.0, 41.0 - a, 88.0 - k, k - 170.0])
    cerebellum = _ellipsoid_depth([a, j - 131.0, k - 62.0], [52.0, 28.0, 31.0])
    stem = np.maximum(
        _tube_depth(j, a, k, [(104.0, 0.0, 102.0, 13.0), (128.0, 0.0, 96.0, 16.0), (158.0, 0.0, 84.0, 9.0)], 1.0),
        _ellipsoid_depth([a, j - 128.0, k - 101.0], [17.0, 14.0, 13.0]),
    )
    # fluid fills the fissures and a thin layer around the brain
    tissue[np.maximum.reduce([cerebrum, cerebellum, stem]) > -2.5] = _FLUID
    depth = np.minimum.reduce([cerebrum, between, sylvian])
    # sulci: sheets that enter from the surface where a smooth field is zero; distance to them to first order
    sulci = np.maximum(np.abs(_FOLDS(points)) * _FOLD_MM / (2 * np.pi) - 0.9, depth - 11.0)
    depth = np.minimum(depth, sulci)
    paint(depth > 0.0, "Cerebral-Cortex")
    paint(depth > 4.0 * shape.cortex, "Cerebral-White-Matter")
    behind = (cerebellum > 0.0) & (cerebellum > cerebrum)
    paint(behind, "Cerebellum-Cortex")
    paint(behind & (cerebellum > (10.0 + 4.0 * np.tanh(_FOLIA(points))) * shape.cortex), "Cerebellum-White-Matter")
    paint(stem > 0.0, "Brain-Stem")
    for name, (centre, radii) in _ELLIPSOIDS.items():
        q = [a - centre[0], j - centre[1], k - centre[2]]
        if name in ("Putamen", "Pallidum"):
            q[0] = q[0] + 0.18 * q[2]  # both diverge to the back
        scale = shape.hippocampus if name == "Amygdala" else shape.nuclei
        paint(_ellipsoid_depth(q, [scale * r for r in radii]) > 0.0, name)
    for name, sections in _TUBES.items():
        scale = {"Caudate": shape.nuclei, "Hippocampus": shape.hippocampus}.get(name, shape.ventricles)
        paint(_tube_depth(k, a, j, sections, scale) > 0.0, name)
    paint(_ellipsoid_depth([a, j - 101.0, k - 114.0], [3.5 * shape.ventricles, 12.0, 18.0]) > 0.0, "3rd-Ventricle")
    paint(_ellipsoid_depth([a, j - 129.0, k - 80.0], [8.0 * shape.ventricles, 10.0, 8.0]) > 0.0, "4th-Ventricle")
    # weak contrast inside the tissues that moves with the anatomy, as fibre tracts and cortical areas have
    tissue += np.where(tissue > 0.2, 0.02, 0.0).astype(np.float32) * _CONTRAST(points)
    return labels, tissue


def diffeomorphism(rng: np.random.Generator, size: Sequence[int], spacing: np.ndarray) -> np.ndarray:
    """Displacement ``(ndim, *size)`` in mm of a random smooth diffeomorphism: exp of a stationary velocity field."""
    velocity = np.zeros((len(size), *size))
    for smoothness, strength in ((26.0, 1.8), (12.0, 1.2)):  # mm: standard deviations of the kernel and of the field
        for channel in velocity:
            # periodic, so that the border moves as much as the middle
            part = gaussian_filter(rng.normal(size=size), smoothness / spacing, mode="wrap")
            channel += strength * part / part.std()
    velocity /= _per_axis(spacing)
    with torch.no_grad():
        displacement = DVF2DDF(num_steps=6)(torch.as_tensor(velocity, dtype=torch.float32)[None])[0].numpy()
    return displacement * _per_axis(spacing).astype(np.float32)


def brain_spacing(size: Sequence[int]) -> np.ndarray:
    """Voxel size in mm that fits the head into ``size`` voxels, 2 or 3 of them."""
    return _FIELD_MM[len(size)] / np.asarray(size)


def brain_affine(size: Sequence[int]) -> np.ndarray:
    """Voxel to world, oriented as neurite-OASIS: axis 0 to the left, 1 down, 2 to the front."""
    spacing, voxels = np.ones(3), np.ones(3)
    spacing[: len(size)], voxels[: len(size)] = brain_spacing(size), size
    affine = np.zeros((4, 4))
    affine[0, 0], affine[2, 1], affine[1, 2], affine[3, 3] = -spacing[0], -spacing[1], spacing[2], 1.0
    affine[:3, 3] = -affine[:3, :3] @ ((voxels - 1) / 2)
    return affine


def brain_images(rng: np.random.Generator, shape: BrainShape, size: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Image (float32 in [0, 1]) and labels (seg35, uint8) ``(*size)`` of a subject, a volume or a coronal slice."""
    spacing = brain_spacing(size)
    first = _CENTRE[len(size)] - spacing * (np.asarray(size) - 1) / 2
    grid = np.indices(size).astype(np.float32)
    points = _per_axis(first) + _per_axis(spacing) * grid + diffeomorphism(rng, size, spacing)
    points = points.astype(np.float32)
    if len(size) == 2:
        points = np.concatenate([points, np.full_like(points[:1], _SLICE_MM)])
    labels, tissue = _brain(points, shape)
    bias = np.exp(0.06 * SmoothWaves(rng, wavelength=200.0, count=6)(points))
    image = gaussian_filter(tissue, 0.5) * bias + rng.normal(scale=0.008, size=size)
    # three decimals: below the noise, and half the size when packed
    return np.where(tissue > 0, np.clip(image, 0.0, 1.0), 0.0).astype(np.float32).round(3), labels


# --- chest: mm from the centre of the field of view, axis 0 to the left, 1 to the back, 2 to the head ---
_CHEST_MM = np.array([288.0, 216.0, 288.0])
# Hounsfield units
_AIR, _FAT, _MUSCLE, _BLOOD, _BONE, _FISSURE = -1000.0, -90.0, 40.0, 45.0, 420.0, -620.0
_INHALE, _EXHALE = -870.0, -800.0  # the lung itself
_NOISE, _TEXTURE = 20.0, 25.0
_BRANCHINGS = 6  # a lung has 2^6 - 1 branches of its vessels
_Vessel = tuple[np.ndarray, np.ndarray, float, float]  # two points and the radius at either, mm


class _Chest(NamedTuple):
    """What differs between the people, as they have breathed out; lengths in mm."""

    radii: np.ndarray  # of the lungs
    apart: float  # distance of the lungs' centres from the midline
    base: float  # level of the diaphragm at the edge
    dome: float  # height of the diaphragm
    rib_phase: float  # where the ribs begin
    tilt: float  # of the fissures, mm a mm
    texture: SmoothWaves
    vessels: list[_Vessel]
    branches: np.ndarray  # (points, 3)


def _lung_depth(points: np.ndarray, radii: np.ndarray, apart: float, base: float, dome: float) -> np.ndarray:
    """Depth in mm below the surface of the lungs at points ``(3, *spatial)``, negative outside."""
    a, b, c = points
    lung = _ellipsoid_depth([np.abs(a) - apart, b, c + 20.0], radii.tolist())
    from_axis = ((np.abs(a) - apart) / radii[0]) ** 2 + (b / radii[1]) ** 2
    diaphragm = c - base - dome * (1.0 - np.minimum(from_axis, 1.5))
    heart = _ellipsoid_depth([a - 22.0, b + 22.0, c + 45.0], [48.0, 42.0, 48.0])
    return np.minimum.reduce([lung, diaphragm, -heart])


def _grow(
    rng: np.random.Generator, node: np.ndarray, targets: np.ndarray, radius: float, level: int, vessels: list[_Vessel]
) -> list[np.ndarray]:
    """Grow a tree of vessels from a node to the targets, each branch towards one half of them; returns the branches."""
    if level == 0 or len(targets) < 2:
        vessels.append((node, targets.mean(axis=0), radius, 0.6 * radius))
        return []
    end = node + rng.uniform(0.35, 0.5) * (targets.mean(axis=0) - node)
    vessels.append((node, end, radius, 0.85 * radius))
    centred = targets - targets.mean(axis=0)
    order = np.argsort(centred @ np.linalg.svd(centred, full_matrices=False)[2][0])
    halves = order[: len(order) // 2], order[len(order) // 2 :]
    parts = [_grow(rng, end, targets[half], 0.78 * radius, level - 1, vessels) for half in halves]
    return [end, *parts[0], *parts[1]]


def _draw_chest(rng: np.random.Generator) -> _Chest:
    radii = np.array([46.0, 74.0, 120.0]) * np.exp(rng.normal(0.0, 0.04, 3))
    apart = float(rng.uniform(56.0, 62.0))
    base, dome = float(rng.uniform(-92.0, -84.0)), float(rng.uniform(28.0, 38.0))
    vessels: list[_Vessel] = []
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
    return _Chest(radii, apart, base, dome, phase, tilt, SmoothWaves(rng, 36.0), vessels, points)


def _vessel_depth(points: np.ndarray, vessels: Sequence[_Vessel], thinnest: float) -> np.ndarray:
    """Depth in mm below the surface of the vessels at points ``(points, 3)``, negative outside."""
    centres, radii = [], []
    for start, end, start_radius, end_radius in vessels:
        t = np.linspace(0.0, 1.0, max(2, int(np.ceil(np.linalg.norm(end - start))) + 1))[:, None]
        centres.append(start + t * (end - start))
        radii.append(start_radius + t[:, 0] * (end_radius - start_radius))
    distance, index = cKDTree(np.concatenate(centres)).query(points, k=6)
    return (np.maximum(np.concatenate(radii), thinnest)[index] - distance).max(axis=1)


def _scan(points: np.ndarray, chest: _Chest, lung_hu: float, voxel: float) -> tuple[np.ndarray, np.ndarray]:
    """Hounsfield units (without noise) and lung mask at points ``(3, *spatial)``; edges are ``voxel`` mm wide."""
    a, b, c = points
    image = np.full(a.shape, _AIR)

    def inside(depth: np.ndarray) -> np.ndarray:
        return np.clip(depth / voxel + 0.5, 0.0, 1.0)

    def paint(share: np.ndarray, hu: np.ndarray | float) -> None:
        image[:] += share * (hu - image)

    thorax = _ellipsoid_depth([a, b, 0.0 * c], [126.0, 94.0, 1.0])
    paint(inside(thorax), _FAT)
    paint(inside(thorax - 5.0), _MUSCLE)
    # ribs: rings in the wall, every 26 mm, lower in front
    ring = np.mod(c - 0.35 * b - chest.rib_phase, 26.0) - 13.0
    paint(inside(5.5 - np.hypot(thorax - 12.0, ring)), _BONE)
    paint(inside(18.0 - np.hypot(a, b - 74.0)), _BONE)
    lung = _lung_depth(points, chest.radii, chest.apart, chest.base, chest.dome)
    paint(inside(lung), lung_hu + _TEXTURE * chest.texture(points.astype(np.float32)))
    # oblique fissures in both lungs, high in the back, and the horizontal one in the right lung in front of it
    oblique = (c + 10.0 - chest.tilt * b + 0.002 * a * b) / np.hypot(1.0, chest.tilt)
    horizontal = np.where((a < 0.0) & (oblique > 0.0), np.abs(c - 12.0 - 0.1 * b), np.inf)
    fissure = np.exp(-np.square(np.minimum(np.abs(oblique), horizontal) / (1.0 + 0.4 * voxel)))
    paint(fissure * inside(lung), _FISSURE)
    near = lung > -voxel
    depth = np.full(a.shape, -np.inf)
    # a vessel thinner than a voxel still brightens it
    depth[near] = _vessel_depth(points[:, near].T, chest.vessels, 0.4 * voxel)
    paint(inside(depth) * inside(lung), _BLOOD)
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


def lung_affine(size: Sequence[int]) -> np.ndarray:
    """Voxel to world of a chest in ``size`` voxels: axis 0 to the left, 1 to the back, 2 to the head."""
    affine = np.diag([*(_CHEST_MM / np.asarray(size) * [-1, -1, 1]), 1.0])
    affine[:3, 3] = -affine[:3, :3] @ ((np.asarray(size) - 1) / 2)
    return affine


def lung_pair(rng: np.random.Generator, size: Sequence[int]) -> dict[str, np.ndarray]:
    """A pair of chests of one person.

    Returns:
        ``image0`` (fixed, inhale) and ``image1`` (moving, exhale), int16 Hounsfield units ``(*size)``; ``mask0/1``,
        uint8; ``keypoints0/1 (points, 3)`` in voxels; the true ``ddf (3, *size)`` in voxels, float32.
    """
    spacing = _CHEST_MM / np.asarray(size)
    chest = _draw_chest(rng)
    centre = (np.asarray(size) - 1) / 2
    grid = np.indices(size).astype(np.float64)

    def in_mm(voxels: np.ndarray) -> np.ndarray:
        return (voxels - _per_axis(centre)) * _per_axis(spacing)

    # the truth is what is written: float32 values on the grid, linear between them
    ddf = (_breathing(in_mm(grid), rng) / _per_axis(spacing)).astype(np.float32)
    # six decimals, as the files have them
    fixed_points = _fixed_points(ddf, chest.branches / spacing + centre).round(6)
    pair = {"ddf": ddf, "keypoints0": fixed_points, "keypoints1": fixed_points + _interpolate(ddf, fixed_points)}
    voxel = float(spacing.mean())
    for i, (points, lung_hu) in enumerate(((in_mm(grid + ddf), _INHALE), (in_mm(grid), _EXHALE))):
        image, mask = _scan(points, chest, lung_hu, voxel)
        image += gaussian_filter(rng.normal(size=size), 0.4) * _NOISE
        pair[f"image{i}"] = np.clip(image.round(), -1024, 3071).astype(np.int16)
        pair[f"mask{i}"] = mask.astype(np.uint8)
    return pair
