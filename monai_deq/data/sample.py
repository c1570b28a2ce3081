# SPDX-License-Identifier: Apache-2.0
"""A synthetic cohort of brain-like images in the neurite-OASIS layout, so that everything runs without a download.

Nothing in it comes from a scan. One anatomy is written down as ellipsoids, tubes and a folded cortex, in millimetres;
each subject is that anatomy with its own shape (size of the ventricles, thickness of the cortex, ...) seen through its
own smooth diffeomorphism, with T1-like intensities, bias field, partial volume and noise. The numbers of the labels
are those of the data set. It shows that software works; it says nothing about the accuracy of a method on patients.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from monai.networks.blocks import DVF2DDF
from scipy.ndimage import gaussian_filter

from monai_deq.data.labels import SEG24_LABELS, SEG35_LABELS
from monai_deq.data.sample_folder import write_sample_folder
from monai_deq.data.sample_shapes import SmoothWaves, ellipsoid_depth

__all__ = ["resolve_dataset_dir", "sample_dataset_dir", "write_sample_cohort"]

logger = logging.getLogger("monai_deq")

VERSION = 1  # raise it when the same parameters give other files

# The anatomy is laid out on the 160 x 192 x 224 mm field of neurite-OASIS: axis 0 to the left, 1 down, 2 to the front.
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
_WHITE, _GREY, _FLUID = 0.40, 0.26, 0.06
_BRIGHTNESS = {
    "Cerebral-White-Matter": _WHITE,
    "Cerebellum-White-Matter": 0.36,
    "Cerebral-Cortex": _GREY,
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


@dataclass(frozen=True)
class _Shape:
    """What differs between subjects apart from their diffeomorphism; 1 is the mean anatomy."""

    ventricles: float
    nuclei: float
    hippocampus: float
    cortex: float
    white: float
    grey: float


_FOLD_MM = 44.0  # twice the distance from sulcus to sulcus
# The folds and the fine contrast belong to the anatomy: all subjects share them, hence a seed of their own.
_anatomy_rng = np.random.default_rng(2025)
_FOLDS = SmoothWaves(_anatomy_rng, wavelength=_FOLD_MM)
_FOLIA = SmoothWaves(_anatomy_rng, wavelength=16.0)
_CONTRAST = SmoothWaves(_anatomy_rng, wavelength=30.0)


def _tube_depth(
    along: np.ndarray, p: np.ndarray, q: np.ndarray, sections: Sequence[Sequence[float]], scale: float
) -> np.ndarray:
    """Depth in mm below the surface of a bent tube with round ends, negative outside."""
    s, cp, cq, r = np.asarray(sections, dtype=np.float32).T
    over = along - np.clip(along, s[0], s[-1])
    distance = np.sqrt(
        (p - np.interp(along, s, cp)) ** 2 + (q - np.interp(along, s, cq)) ** 2 + over**2,
    )
    return scale * np.interp(along, s, r) - distance


def _anatomy(points: np.ndarray, shape: _Shape) -> tuple[np.ndarray, np.ndarray]:
    """Labels (seg35) and brightness of the anatomy at points ``(3, *spatial)`` in mm."""
    side = points[0] - _MIDLINE
    a, j, k = np.abs(side), points[1], points[2]
    left = side > 0
    number = {name: label for label, name in SEG35_LABELS.items()}
    labels = np.zeros(a.shape, dtype=np.uint8)
    tissue = np.zeros(a.shape, dtype=np.float32)

    def paint(inside: np.ndarray, name: str) -> None:
        if name in number:
            labels[inside] = number[name]
        else:
            labels[inside] = np.where(left[inside], number[f"Left-{name}"], number[f"Right-{name}"])
        brightness = _BRIGHTNESS.get(name, _FLUID)
        tissue[inside] = brightness * (shape.white if brightness > 0.33 else shape.grey if brightness > 0.2 else 1.0)

    # cerebrum: a dome that is flat below, and a temporal lobe
    dome = ellipsoid_depth([a, j - 74.0, k - 106.0], [68.0, np.where(j < 74.0, 56.0, 40.0), 88.0])
    temporal = ellipsoid_depth([a - 42.0, j - 113.0, k - 120.0], [23.0, 27.0, 42.0])
    cerebrum = np.maximum(dome, temporal)
    # the fissures between the hemispheres (down to the corpus callosum) and above the temporal lobe
    between = np.maximum(a - 1.0, j - (58.0 + 0.018 * (k - 106.0) ** 2))
    sylvian = np.maximum.reduce([np.abs(j - 106.0 - 0.25 * (k - 130.0)) - 1.0, 41.0 - a, 88.0 - k, k - 170.0])
    cerebellum = ellipsoid_depth([a, j - 131.0, k - 62.0], [52.0, 28.0, 31.0])
    stem = np.maximum(
        _tube_depth(j, a, k, [(104.0, 0.0, 102.0, 13.0), (128.0, 0.0, 96.0, 16.0), (158.0, 0.0, 84.0, 9.0)], 1.0),
        ellipsoid_depth([a, j - 128.0, k - 101.0], [17.0, 14.0, 13.0]),
    )
    # fluid fills the fissures and a thin layer around the brain
    fluid_depth = np.maximum.reduce([cerebrum, cerebellum, stem])
    tissue[fluid_depth > -2.5] = _FLUID
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
        paint(ellipsoid_depth(q, [scale * r for r in radii]) > 0.0, name)
    for name, sections in _TUBES.items():
        scale = {"Caudate": shape.nuclei, "Hippocampus": shape.hippocampus}.get(name, shape.ventricles)
        paint(_tube_depth(k, a, j, sections, scale) > 0.0, name)
    paint(ellipsoid_depth([a, j - 101.0, k - 114.0], [3.5 * shape.ventricles, 12.0, 18.0]) > 0.0, "3rd-Ventricle")
    paint(ellipsoid_depth([a, j - 129.0, k - 80.0], [8.0 * shape.ventricles, 10.0, 8.0]) > 0.0, "4th-Ventricle")
    # weak contrast inside the tissues that moves with the anatomy, as fibre tracts and cortical areas have
    tissue += np.where(tissue > 0.2, 0.02, 0.0).astype(np.float32) * _CONTRAST(points)
    return labels, tissue


def _diffeomorphism(rng: np.random.Generator, size: Sequence[int], spacing: np.ndarray) -> np.ndarray:
    """Displacement ``(ndim, *size)`` in mm of a random smooth diffeomorphism: exp of a stationary velocity field."""
    velocity = np.zeros((len(size), *size))
    for smoothness, strength in ((26.0, 1.8), (12.0, 1.2)):  # mm: standard deviations of the kernel and of the field
        for channel in velocity:
            # periodic, so that the border moves as much as the middle
            part = gaussian_filter(rng.normal(size=size), smoothness / spacing, mode="wrap")
            channel += strength * part / part.std()
    velocity /= spacing.reshape(-1, *[1] * len(size))
    with torch.no_grad():
        displacement = DVF2DDF(num_steps=6)(torch.as_tensor(velocity, dtype=torch.float32)[None])[0].numpy()
    return displacement * spacing.reshape(-1, *[1] * len(size)).astype(np.float32)


def _subject(rng: np.random.Generator, shape: _Shape, size: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Image (float32 in [0, 1]) and labels (seg35) of one subject on a grid of 2 or 3 dimensions."""
    ndim = len(size)
    spacing = _spacing(size)
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in size), indexing="ij")).astype(np.float32)
    first = (_CENTRE[ndim] - spacing * (np.asarray(size) - 1) / 2).reshape(-1, *[1] * ndim)
    points = (first + spacing.reshape(-1, *[1] * ndim) * grid + _diffeomorphism(rng, size, spacing)).astype(np.float32)
    if ndim == 2:
        points = np.concatenate([points, np.full_like(points[:1], _SLICE_MM)])
    labels, tissue = _anatomy(points, shape)
    inside = tissue > 0
    bias = np.exp(0.06 * SmoothWaves(rng, wavelength=200.0, count=6)(points))
    image = gaussian_filter(tissue, 0.5) * bias + rng.normal(scale=0.008, size=size)
    # three decimals: below the noise, and half the size when packed
    return np.where(inside, np.clip(image, 0.0, 1.0), 0.0).astype(np.float32).round(3), labels


def _spacing(size: Sequence[int]) -> np.ndarray:
    """Voxel size in mm that fits the head into ``size`` voxels."""
    return _FIELD_MM[len(size)] / np.asarray(size)


def _affine(size: Sequence[int]) -> np.ndarray:
    """Voxel to world, oriented as neurite-OASIS: axis 0 to the left, 1 down, 2 to the front."""
    s = np.ones(3)
    s[: len(size)] = _spacing(size)
    n = np.ones(3)
    n[: len(size)] = size
    affine = np.zeros((4, 4))
    affine[0, 0], affine[2, 1], affine[1, 2], affine[3, 3] = -s[0], -s[1], s[2], 1.0
    affine[:3, 3] = -affine[:3, :3] @ ((n - 1) / 2)
    return affine


def write_sample_cohort(
    output_dir: str | Path,
    num_subjects: int = 16,
    spatial_size_3d: Sequence[int] = (32, 32, 48),
    spatial_size_2d: Sequence[int] = (80, 96),
    seed: int = 0,
) -> Path:
    """Write a synthetic cohort in the neurite-OASIS layout, volumes and slices.

    The folder appears whole or not at all. The same arguments give the same files.

    Args:
        output_dir: folder to write; its parent is made where needed.
        num_subjects: number of subjects, at least 2. They are named from ``OASIS_OAS1_9001_MR1`` on. Defaults to 16.
        spatial_size_3d: voxels of a volume; voxels are about 5 mm by default. Defaults to (32, 32, 48).
        spatial_size_2d: pixels of a slice; pixels are 2 mm by default. Defaults to (80, 96).
        seed: seed of everything that differs between subjects. Defaults to 0.

    Returns:
        ``output_dir``; where it holds this very cohort already it is left untouched.

    Raises:
        ValueError: When an argument is out of range.
        FileExistsError: When ``output_dir`` holds anything else.
    """
    size3, size2 = [int(n) for n in spatial_size_3d], [int(n) for n in spatial_size_2d]
    if len(size3) != 3 or len(size2) != 2 or min(*size3, *size2) < 8:
        raise ValueError(f"Need 3 and 2 sizes of at least 8, got {spatial_size_3d=} and {spatial_size_2d=}.")
    if not 2 <= num_subjects <= 999:
        raise ValueError(f"num_subjects must be in 2..999, got {num_subjects}.")
    parameters = {
        "version": VERSION,
        "num_subjects": num_subjects,
        "spatial_size_3d": size3,
        "spatial_size_2d": size2,
        "seed": seed,
    }
    return write_sample_folder(output_dir, parameters, lambda folder: _write(folder, parameters))


def _write(root: Path, parameters: dict) -> None:
    size3, size2 = parameters["spatial_size_3d"], parameters["spatial_size_2d"]
    names = [f"OASIS_OAS1_{9001 + i:04d}_MR1" for i in range(parameters["num_subjects"])]
    # a number missing in the 24 labels of the slices becomes background
    to_seg24 = np.zeros(max(SEG35_LABELS) + 1, dtype=np.uint8)
    in_seg24 = {name: label for label, name in SEG24_LABELS.items()}
    for label, name in SEG35_LABELS.items():
        to_seg24[label] = in_seg24.get(name, 0)
    for i, name in enumerate(names):
        folder = root / name
        folder.mkdir()
        rng = np.random.default_rng([parameters["seed"], i])
        shape = _Shape(
            ventricles=float(np.exp(rng.normal(0.0, 0.15))),
            nuclei=float(np.exp(rng.normal(0.0, 0.05))),
            hippocampus=float(np.exp(rng.normal(0.0, 0.07))),
            cortex=float(np.exp(rng.normal(0.0, 0.06))),
            white=float(np.exp(rng.normal(0.0, 0.03))),
            grey=float(np.exp(rng.normal(0.0, 0.03))),
        )
        image, labels = _subject(rng, shape, size3)
        _save(folder / "aligned_norm.nii.gz", image, size3)
        _save(folder / "aligned_seg35.nii.gz", labels, size3)
        image, labels = _subject(rng, shape, size2)
        _save(folder / "slice_norm.nii.gz", image[..., None], size2)
        _save(folder / "slice_seg24.nii.gz", to_seg24[labels][..., None], size2)
    (root / "subjects.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
    for file, table in (("seg35_labels.txt", SEG35_LABELS), ("seg24_labels.txt", SEG24_LABELS)):
        lines = [f"{number:<5d} {name}" for number, name in {0: "Unknown", **table}.items()]
        (root / file).write_text("\n".join(lines) + "\n", encoding="utf-8")
    (root / "README.txt").write_text(
        "Synthetic brain-like images written by monai_deq. No scan of a person is in here, in spite of the folder "
        "names,\n"
        "which follow the neurite-OASIS layout so that the same software reads them. They show that software works "
        "and\n"
        "say nothing about the accuracy of a method on real images. Parameters: sample.json.\n",
        encoding="utf-8",
    )


def _save(file: Path, array: np.ndarray, size: Sequence[int]) -> None:
    image = nib.Nifti1Image(array, _affine(size))
    image.header.set_xyzt_units("mm")
    nib.save(image, file)


def sample_dataset_dir() -> Path:
    """Where the sample cohort lives: in ``$MONAI_DATA_DIRECTORY`` where that is set, else in ``~/.cache/monai_deq``."""
    data_directory = os.environ.get("MONAI_DATA_DIRECTORY")
    if data_directory:
        return Path(data_directory).expanduser() / "monai_deq_sample"
    return Path.home() / ".cache" / "monai_deq" / f"sample-{VERSION}"


def resolve_dataset_dir(dataset_dir: str | Path | None = None) -> Path:
    """The folder of the data set, or of the synthetic sample cohort where none is given.

    Args:
        dataset_dir: folder of the data set. None or empty: the sample cohort, written at the first use.

    Raises:
        FileNotFoundError: When the folder does not exist.
    """
    if dataset_dir is None or str(dataset_dir) == "":
        root = write_sample_cohort(sample_dataset_dir())
        logger.info(
            "no data set given: using the SYNTHETIC sample cohort in %s; for real data give --dataset_dir "
            "(neurite-OASIS or Learn2Reg OASIS)",
            root,
        )
        return root
    root = Path(dataset_dir).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(
            f"dataset_dir {str(root)!r} does not exist or is no folder. Give the folder of the data set, or leave it "
            f"out to "
            "use the synthetic sample cohort."
        )
    return root
