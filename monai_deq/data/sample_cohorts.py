# SPDX-License-Identifier: Apache-2.0
"""Folders of synthetic brains and lungs in the layouts of the public data sets, for runs without a download."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from monai_deq.data.labels import SEG24_LABELS, SEG35_LABELS
from monai_deq.data.sample_images import BrainShape, brain_affine, brain_images, lung_affine, lung_pair
from monai_deq.utils import expand_user

__all__ = [
    *("is_sample", "sample_dataset_dir", "sample_lung_dataset_dir", "write_sample_cohort", "write_sample_lung_cohort"),
]

VERSION = 1  # raise it when the same parameters give other files
_README = """\
Synthetic {0} written by monai_deq. No scan of a person is in here, in spite of the names, which follow the {1}
layout so that the same software reads them. They show that software works and say nothing about the accuracy of a
method on real images. Parameters: sample.json.{2}"""


def write_sample_cohort(
    output_dir: str | Path,
    num_subjects: int = 16,
    spatial_size_3d: Sequence[int] = (32, 32, 48),
    spatial_size_2d: Sequence[int] = (80, 96),
    seed: int = 0,
) -> Path:
    """Write a cohort of synthetic brains in the neurite-OASIS layout, volumes and slices, and return its folder.

    It appears whole or not at all; the same arguments give the same files, and are then left untouched.

    Args:
        output_dir: folder to write; its parent is made where needed.
        num_subjects: number of subjects, 2 to 999, named from ``OASIS_OAS1_9001_MR1`` on. Defaults to 16.
        spatial_size_3d: voxels of a volume, about 5 mm each by default. Defaults to (32, 32, 48).
        spatial_size_2d: pixels of a slice, 2 mm each by default. Defaults to (80, 96).
        seed: seed of everything that differs between subjects. Defaults to 0.

    Raises:
        ValueError: When an argument is out of range.
        FileExistsError: When ``output_dir`` holds anything else.
    """
    size3, size2 = [int(n) for n in spatial_size_3d], [int(n) for n in spatial_size_2d]
    if len(size3) != 3 or len(size2) != 2 or min(*size3, *size2) < 8:
        raise ValueError(f"Need 3 and 2 sizes of at least 8, got {spatial_size_3d=} and {spatial_size_2d=}.")
    if not 2 <= num_subjects <= 999:
        raise ValueError(f"num_subjects must be in 2..999, got {num_subjects}.")
    sizes = {"spatial_size_3d": size3, "spatial_size_2d": size2}
    parameters = {"version": VERSION, "num_subjects": num_subjects, **sizes, "seed": seed}
    return _write_folder(output_dir, parameters, lambda root: _write_brains(root, num_subjects, size3, size2, seed))


def _write_brains(root: Path, count: int, size3: Sequence[int], size2: Sequence[int], seed: int) -> None:
    names = [f"OASIS_OAS1_{9001 + i:04d}_MR1" for i in range(count)]
    in_seg24 = {name: label for label, name in SEG24_LABELS.items()}
    # the labels of the slices; what is none of the 24 becomes background
    to_seg24 = np.array([0, *(in_seg24.get(name, 0) for name in SEG35_LABELS.values())], dtype=np.uint8)
    for i, name in enumerate(names):
        rng = np.random.default_rng([seed, i])
        shape = BrainShape(rng)
        image, labels = brain_images(rng, shape, size3)
        _save(root / name / "aligned_norm.nii.gz", image, brain_affine(size3))
        _save(root / name / "aligned_seg35.nii.gz", labels, brain_affine(size3))
        image, labels = brain_images(rng, shape, size2)
        _save(root / name / "slice_norm.nii.gz", image[..., None], brain_affine(size2))
        _save(root / name / "slice_seg24.nii.gz", to_seg24[labels][..., None], brain_affine(size2))
    _write_text(root / "subjects.txt", names)
    for file, table in (("seg35_labels.txt", SEG35_LABELS), ("seg24_labels.txt", SEG24_LABELS)):
        _write_text(root / file, [f"{number:<5d} {name}" for number, name in {0: "Unknown", **table}.items()])
    _write_text(root / "README.txt", [_README.format("brain-like images", "neurite-OASIS", "")])


def write_sample_lung_cohort(
    output_dir: str | Path,
    num_pairs: Sequence[int] = (12, 2, 4),
    spatial_size: Sequence[int] = (48, 32, 64),
    seed: int = 0,
) -> Path:
    """Write a cohort of synthetic lung CT pairs in the layout of Learn2Reg NLST, and return its folder.

    Images, masks and keypoints (voxel coordinates) lie in ``imagesTr``, ``masksTr``, ``keypointsTr`` (test pairs:
    ``imagesTs`` ...): ``NLST_0001_0000`` is the fixed (inhale), ``NLST_0001_0001`` the moving (exhale) scan of the
    first pair. ``true_ddf`` holds the true fields in the format of a submission, ``disp_0001_0001.nii.gz``:
    interpolated linearly at the fixed keypoints they lead to the moving ones to within 1e-5 voxel. The folder appears
    whole or not at all; the same arguments give the same files, and are then left untouched.

    Args:
        output_dir: folder to write; its parent is made where needed.
        num_pairs: number of pairs for training, validation and test. Defaults to (12, 2, 4).
        spatial_size: voxels of a scan, 6 x 6.75 x 4.5 mm each by default. Defaults to (48, 32, 64).
        seed: seed of everything. Defaults to 0.

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
    return _write_folder(output_dir, parameters, lambda root: _write_lungs(root, counts, size, seed))


def _write_lungs(root: Path, counts: Sequence[int], size: Sequence[int], seed: int) -> None:
    affine = lung_affine(size)
    scans: dict[str, list[dict[str, str]]] = {"Tr": [], "Ts": []}
    pairs: list[list[dict[str, str]]] = [[], [], []]
    wheres = [(part, where) for part, where in enumerate(("Tr", "Tr", "Ts")) for _ in range(counts[part])]
    for number, (part, where) in enumerate(wheres, start=1):
        pair = lung_pair(np.random.default_rng([seed, number]), size)
        names = [f"NLST_{number:04d}_{i:04d}" for i in range(2)]
        for i, name in enumerate(names):
            _save(root / f"images{where}" / f"{name}.nii.gz", pair[f"image{i}"], affine)
            _save(root / f"masks{where}" / f"{name}.nii.gz", pair[f"mask{i}"], affine)
            keypoints = root / f"keypoints{where}" / f"{name}.csv"
            keypoints.parent.mkdir(exist_ok=True)
            np.savetxt(keypoints, pair[f"keypoints{i}"], fmt="%.6f", delimiter=",")
            # the data set's own list names the keypoints so, though they are .csv files
            scans[where].append({k: f"./{k}s{where}/{name}.nii.gz" for k in ("image", "mask", "keypoint")})
        _save(root / "true_ddf" / f"disp_{number:04d}_{number:04d}.nii.gz", np.moveaxis(pair["ddf"], 0, -1), affine)
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
        "training_paired_images": pairs[0],
        "numPairedTest": counts[2],
        "test_paired_images": pairs[2],
        "numRegistration_val": counts[1],
        "registration_val": pairs[1],
        "numRegistration_test": counts[2],
        "registration_test": pairs[2],
    }
    _write_text(root / "NLST_dataset.json", [json.dumps(content, indent=2)])
    _write_text(root / "README.txt", [_README.format("lung CT", "Learn2Reg NLST", " Displacements: true_ddf.")])


def _save(file: Path, array: np.ndarray, affine: np.ndarray) -> None:
    image = nib.Nifti1Image(array, affine)
    image.header.set_xyzt_units("mm")
    file.parent.mkdir(exist_ok=True)
    nib.save(image, file)


def _write_text(file: Path, lines: Sequence[str]) -> None:
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _write_folder(output_dir: str | Path, parameters: dict[str, Any], write: Callable[[Path], None]) -> Path:
    """Write a cohort under a temporary name and move it into place when it is whole, with its parameters in it."""
    output = expand_user(output_dir)
    content = {"generator": "monai_deq", **parameters}
    if _holds(output, content):
        return output
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.parent / f".{output.name}.{uuid.uuid4().hex}"
    temporary.mkdir()
    try:
        write(temporary)
        _write_text(temporary / "sample.json", [json.dumps(content, indent=2)])
        try:
            os.replace(temporary, output)
        except OSError:
            if not _holds(output, content):  # another process may have written it meanwhile
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return output


def _parameters(folder: Path) -> dict[str, Any] | None:
    """The parameters of the sample cohort in a folder, ``None`` where there is no such cohort."""
    try:
        content = json.loads((folder / "sample.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and content.get("generator") == "monai_deq" else None


def _holds(output: Path, content: dict[str, Any]) -> bool:
    """Whether a folder holds this cohort; refuses one that holds something else."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    if (found := _parameters(output)) is None:
        raise FileExistsError(f"{output} exists and holds no sample cohort; choose another output_dir.")
    if found != content:
        others = f"other parameters: {found}, wanted {content}"
        raise FileExistsError(
            f"{output} holds a sample cohort of {others}. Choose another output_dir or remove the folder."
        )
    return True


def is_sample(path: str | Path) -> bool:
    """Whether a folder is a synthetic cohort of this package; results on it can be marked so."""
    return _parameters(expand_user(path)) is not None


def sample_dataset_dir() -> Path:
    """Where the sample cohort lives: in ``$MONAI_DATA_DIRECTORY`` where that is set, else in ``~/.cache/monai_deq``."""
    return _cache_dir("sample")


def sample_lung_dataset_dir() -> Path:
    """Where the sample lung cohort lives: in ``$MONAI_DATA_DIRECTORY`` if set, else in ``~/.cache/monai_deq``."""
    return _cache_dir("sample-lung")


def _cache_dir(name: str) -> Path:
    if data_directory := os.environ.get("MONAI_DATA_DIRECTORY"):
        return expand_user(data_directory) / f"monai_deq_{name.replace('-', '_')}"
    return Path.home() / ".cache" / "monai_deq" / f"{name}-{VERSION}"
