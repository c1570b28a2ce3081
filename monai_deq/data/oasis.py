# SPDX-License-Identifier: Apache-2.0
"""OASIS brain MRI: finds the data set in a folder, names its labels, splits its subjects.

Two published layouts are read:

- neurite-OASIS (Hoopes et al., HyperMorph, IPMI 2021; https://github.com/adalca/medical-datasets): one folder per
  subject, ``OASIS_OAS1_NNNN_MR1/{aligned_norm,aligned_seg35,slice_norm,slice_seg24}.nii.gz``, order in
  ``subjects.txt``.
- Learn2Reg OASIS (https://learn2reg.grand-challenge.org): ``imagesTr|Ts``, ``labelsTr|Ts``, ``OASIS_dataset.json``.

The images come from OASIS-1 (Marcus et al., J. Cogn. Neurosci. 2007).
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from monai_deq.data.split import PARTS, part_sizes, shorten

__all__ = [
    "LEARN2REG_OASIS",
    "NEURITE_OASIS",
    "SEG24_LABELS",
    "SEG35_LABELS",
    "OasisDataset",
    "find_oasis",
    "label_set",
    "split_subjects",
]

logger = logging.getLogger("monai_deq")

NEURITE_OASIS = "neurite-OASIS"
LEARN2REG_OASIS = "Learn2Reg OASIS"

_SIDE_35 = (
    "Cerebral-White-Matter",
    "Cerebral-Cortex",
    "Lateral-Ventricle",
    "Inf-Lat-Ventricle",
    "Cerebellum-White-Matter",
    "Cerebellum-Cortex",
    "Thalamus",
    "Caudate",
    "Putamen",
    "Pallidum",
)
_SIDE_35_REST = ("Hippocampus", "Amygdala", "Accumbens", "Ventral-DC", "Vessel", "Choroid-Plexus")
_SIDE_24 = (*_SIDE_35[:4], *_SIDE_35[6:])
_SIDE_24_REST = ("Hippocampus", "Ventral-DC", "Choroid-Plexus")


def _label_names(side: Sequence[str], middle: Sequence[str], rest: Sequence[str]) -> dict[int, str]:
    """Number the left structures, the unpaired ones amid them, then the right ones, as the data set does."""
    left = [*(f"Left-{n}" for n in side), *middle, *(f"Left-{n}" for n in rest)]
    return dict(enumerate([*left, *(f"Right-{n}" for n in (*side, *rest))], start=1))


SEG35_LABELS: dict[int, str] = _label_names(_SIDE_35, ("3rd-Ventricle", "4th-Ventricle", "Brain-Stem"), _SIDE_35_REST)
"""Names of the 35 labels of ``aligned_seg35.nii.gz`` and of Learn2Reg OASIS; 0 is unknown."""

SEG24_LABELS: dict[int, str] = _label_names(_SIDE_24, ("3rd-Ventricle", "Brain-Stem"), _SIDE_24_REST)
"""Names of the 24 labels of ``slice_seg24.nii.gz``; 0 is unknown."""

# The structures scored in the VoxelMorph line of papers (Balakrishnan et al., IEEE TMI 2019), in seg35 numbers.
_VOXELMORPH_35 = [*range(1, 4), *range(5, 16), 17, *range(19, 23), *range(24, 32), 33, 35]

_FILES = {2: ("slice_norm.nii.gz", "slice_seg24.nii.gz"), 3: ("aligned_norm.nii.gz", "aligned_seg35.nii.gz")}


def _check_spatial_dims(spatial_dims: int) -> None:
    if spatial_dims not in (2, 3):
        raise ValueError(f"spatial_dims must be 2 or 3, got {spatial_dims!r}.")


def label_set(name: str, spatial_dims: int = 3) -> list[int]:
    """The label numbers that a named scoring uses.

    Args:
        name: ``"all"``: every label, 1-35 in 3-D (as Learn2Reg scores) and 1-24 in 2-D. ``"voxelmorph"``: the reduced
            set of the VoxelMorph line of papers, 3-D only; its 30th structure, CSF, is not among the 35.
        spatial_dims: 2 or 3. Defaults to 3.

    Returns:
        Label numbers, ascending, without the background.

    Raises:
        ValueError: When the name is unknown, or has no meaning for ``spatial_dims``.
    """
    _check_spatial_dims(spatial_dims)
    if name == "all":
        return sorted(SEG35_LABELS if spatial_dims == 3 else SEG24_LABELS)
    if name == "voxelmorph":
        if spatial_dims == 2:
            raise ValueError("label set 'voxelmorph' is defined for the 35 labels in 3-D only; use 'all' in 2-D.")
        return list(_VOXELMORPH_35)
    raise ValueError(f"Unknown label set {name!r}; expected 'all' or 'voxelmorph'.")


@dataclass(frozen=True)
class OasisDataset:
    """What was found in a data set folder. A subject is ``{"subject": name, "image": path, "label": path or None}``.

    Args:
        layout: ``"neurite-OASIS"`` or ``"Learn2Reg OASIS"``.
        spatial_dims: 2 or 3.
        root: the folder.
        subjects: every subject, in the order of the data set's own list.
        label_names: names of the label numbers.
        training: Learn2Reg: the official training subjects, without those of the two pair lists below (the official
            list names the validation subjects too).
        registration_val: Learn2Reg: the official validation pairs, ``{"fixed": subject, "moving": subject}``.
        registration_test: Learn2Reg: the official test pairs; their segmentations are not public.
    """

    layout: str
    spatial_dims: int
    root: Path
    subjects: list[dict[str, Any]]
    label_names: dict[int, str]
    training: list[dict[str, Any]] = field(default_factory=list)
    registration_val: list[dict[str, dict[str, Any]]] = field(default_factory=list)
    registration_test: list[dict[str, dict[str, Any]]] = field(default_factory=list)


def find_oasis(dataset_dir: str | Path, spatial_dims: int = 3) -> OasisDataset:
    """Find the OASIS brain data set in a folder, by what is there.

    Args:
        dataset_dir: folder in the neurite-OASIS or the Learn2Reg OASIS layout.
        spatial_dims: 3 for the volumes, 2 for the coronal slices (neurite-OASIS only). Defaults to 3.

    Returns:
        The subjects and, for Learn2Reg, the official lists.

    Raises:
        FileNotFoundError: When the folder is missing, holds neither layout, or misses files that its lists name.
        ValueError: When ``spatial_dims`` does not fit, or the JSON file of the data set is malformed.
    """
    _check_spatial_dims(spatial_dims)
    root = Path(dataset_dir).expanduser()
    if not root.is_dir():
        what = "is not a folder" if root.exists() else "does not exist"
        raise FileNotFoundError(
            f"dataset_dir {str(root)!r} {what}; expected the folder of neurite-OASIS or Learn2Reg OASIS."
        )
    if any(root.glob("OASIS_OAS1_*_MR*/")):
        return _find_neurite(root, spatial_dims)
    if any((root / name).is_dir() for name in ("imagesTr", "imagesTs")) or any(root.glob("*_dataset.json")):
        return _find_learn2reg(root, spatial_dims)
    found = sorted(p.name + "/" * p.is_dir() for p in root.iterdir())
    raise FileNotFoundError(
        f"No OASIS data set in {str(root)!r}. Looked for folders OASIS_OAS1_NNNN_MR1/ (neurite-OASIS) and for "
        f"imagesTr/ with OASIS_dataset.json (Learn2Reg OASIS); found {shorten(found) if found else 'nothing'}. "
        "Give the folder that directly holds these."
    )


def _find_neurite(root: Path, spatial_dims: int) -> OasisDataset:
    image_name, label_name = _FILES[spatial_dims]
    folders = sorted(p.name for p in root.glob("OASIS_OAS1_*_MR*") if p.is_dir())
    list_file = root / "subjects.txt"
    if list_file.is_file():
        named = [line.strip() for line in list_file.read_text(encoding="utf-8").splitlines() if line.strip()]
        repeated = sorted({n for n in named if named.count(n) > 1}) if len(set(named)) < len(named) else []
        if repeated:
            raise ValueError(f"{list_file} names a subject twice: {shorten(repeated)}.")
        source = "subjects.txt"
        unlisted = len(set(folders) - set(named))
    else:
        named, source, unlisted = folders, "their folders", 0

    subjects, broken = [], []
    for name in named:
        image, label = root / name / image_name, root / name / label_name
        if image.is_file():
            subjects.append({"subject": name, "image": str(image), "label": str(label) if label.is_file() else None})
        elif label.is_file():
            broken.append(str(image))
    if broken:
        raise FileNotFoundError(
            f"{len(broken)} subject(s) have {label_name} but no image; missing: {shorten(broken)}. "
            "Download these again, or remove the subjects from subjects.txt."
        )
    if not subjects:
        other = {2: 3, 3: 2}[spatial_dims]
        others = sum((root / name / _FILES[other][0]).is_file() for name in folders)
        raise FileNotFoundError(
            f"No {spatial_dims}-D image in {str(root)!r}: looked for {image_name} of {len(named)} subjects named by "
            f"{source}; "
            f"{len(folders)} subject folders were found, {others} of them with {_FILES[other][0]}"
            + (f" (spatial_dims={other})." if others else ".")
        )
    logger.info(
        "%s in %s: %d of %d subjects named by %s have a %d-D image, %d of these a segmentation%s",
        NEURITE_OASIS,
        root,
        len(subjects),
        len(named),
        source,
        spatial_dims,
        sum(s["label"] is not None for s in subjects),
        f"; {unlisted} folder(s) not in subjects.txt are left out" if unlisted else "",
    )
    names = SEG35_LABELS if spatial_dims == 3 else SEG24_LABELS
    return OasisDataset(NEURITE_OASIS, spatial_dims, root, subjects, dict(names))


def _find_learn2reg(root: Path, spatial_dims: int) -> OasisDataset:
    if spatial_dims != 3:
        raise ValueError(f"{str(root)!r} is in the Learn2Reg layout, which holds 3-D images only; set spatial_dims=3.")
    candidates = sorted(root.glob("*_dataset.json"))
    if len(candidates) > 1 and root / "OASIS_dataset.json" in candidates:
        candidates = [root / "OASIS_dataset.json"]
    if len(candidates) != 1:
        found = shorten([c.name for c in candidates]) if candidates else "none"
        raise FileNotFoundError(f"{str(root)!r} must hold one OASIS_dataset.json (Learn2Reg layout); found {found}.")
    json_file = candidates[0]
    try:
        content = json.loads(json_file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise ValueError(f"{json_file} is not valid JSON ({e}); download it again.") from e
    required = ("training", "registration_val")
    missing_keys = [k for k in required if not isinstance(content, dict) or not isinstance(content.get(k), list)]
    if missing_keys:
        has = sorted(content) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{json_file} must hold the lists {required}; missing {missing_keys}, it holds {has}.")

    subjects: dict[str, dict[str, Any]] = {}  # by image path as the JSON names it, in the order of the JSON
    missing_files: list[str] = []

    def path_of(entry: Any, where: str) -> str:
        if not isinstance(entry, str):
            raise ValueError(f"{json_file}: {where} must be a file name, got {entry!r}.")
        file = root / entry
        if not re.match(r"OASIS_\d", file.name):
            raise ValueError(f"{json_file}: {where} is {entry!r}; expected an OASIS image (OASIS_NNNN_0000.nii.gz).")
        if not file.is_file() and str(file) not in missing_files:
            missing_files.append(str(file))
        return str(file)

    def add(image: Any, label: Any, where: str) -> dict[str, Any]:
        file = path_of(image, where)
        if file not in subjects:
            name = re.sub(r"_0000$", "", Path(file).name.removesuffix(".gz").removesuffix(".nii"))
            label_file = path_of(label, where) if label is not None else None
            subjects[file] = {"subject": name, "image": file, "label": label_file}
        return subjects[file]

    def add_pairs(key: str) -> list[dict[str, dict[str, Any]]]:
        pairs = []
        for i, entry in enumerate(content.get(key) or []):
            where = f"{key}[{i}]"
            if not isinstance(entry, dict) or not {"fixed", "moving"} <= set(entry):
                raise ValueError(f"{json_file}: {where} must have the keys 'fixed' and 'moving', got {entry!r}.")
            pair = {}
            for role in ("fixed", "moving"):
                # a pair names images only; the segmentation has the same name under labelsTr / labelsTs, where public
                label = re.sub(r"(^|/)images(Tr|Ts)/", r"\1labels\2/", str(entry[role]))
                known = label != entry[role] and (root / label).is_file()
                pair[role] = add(entry[role], label if known else None, f"{where}[{role!r}]")
            pairs.append(pair)
        return pairs

    training = []
    for i, entry in enumerate(content["training"]):
        if not isinstance(entry, dict) or "image" not in entry:
            raise ValueError(f"{json_file}: training[{i}] must have the key 'image', got {entry!r}.")
        training.append(add(entry["image"], entry.get("label"), f"training[{i}]"))
    val_pairs, test_pairs = add_pairs("registration_val"), add_pairs("registration_test")
    if missing_files:
        raise FileNotFoundError(
            f"{json_file} names {len(missing_files)} file(s) that are missing: {shorten(missing_files)}. "
            "Unpack the data set whole."
        )
    names = [s["subject"] for s in subjects.values()]
    if len(set(names)) < len(names):
        raise ValueError(
            f"{json_file} names two images of one subject: {shorten([n for n in names if names.count(n) > 1])}."
        )
    held_out = {s["subject"] for pair in (*val_pairs, *test_pairs) for s in pair.values()}
    kept = [s for s in training if s["subject"] not in held_out]
    logger.info(
        "%s in %s: %d subjects, %d with a segmentation; %d for training (the list names %d, less those of the pairs), "
        "%d validation pairs, %d test pairs",
        LEARN2REG_OASIS,
        root,
        len(subjects),
        sum(s["label"] is not None for s in subjects.values()),
        len(kept),
        len(training),
        len(val_pairs),
        len(test_pairs),
    )
    return OasisDataset(
        LEARN2REG_OASIS, 3, root, list(subjects.values()), dict(SEG35_LABELS), kept, val_pairs, test_pairs
    )


def split_subjects(
    dataset: OasisDataset,
    sizes: Sequence[int | None] = (300, 30, 84),
    lists: Mapping[str, Sequence[str | int]] | None = None,
    require_labels: bool = True,
) -> dict[str, list[dict[str, Any]]]:
    """Split the subjects into training, validation and test.

    Args:
        dataset: what :py:func:`find_oasis` found.
        sizes: number of subjects for training, validation and test, taken in the data set's order. One of them may be
            None: all that remain. Defaults to the paper's (300, 30, 84).
        lists: explicit subjects instead of sizes, under ``"training"``, ``"validation"`` and ``"test"``: full names,
            or the four digits in them (``"0001"`` or 1). A part left out is empty. A subject may be in several parts
            if it is listed in each; that is logged.
        require_labels: refuse validation and test subjects without a segmentation. Defaults to True.

    Returns:
        The subjects under ``"training"``, ``"validation"`` and ``"test"``.

    Raises:
        ValueError: When there are too few subjects, a listed subject does not exist, or a segmentation is missing.
    """
    split = _split_by_lists(dataset, lists) if lists is not None else _split_by_sizes(dataset, sizes)
    if require_labels:
        for part in PARTS[1:]:
            unlabelled = [s["subject"] for s in split[part] if s["label"] is None]
            if unlabelled:
                raise ValueError(
                    f"The {part} part needs segmentations, but {len(unlabelled)} of its {len(split[part])} subjects "
                    f"have none: {shorten(unlabelled)}. Choose other subjects by `lists`, or set require_labels=False."
                )
    return split


def _split_by_sizes(dataset: OasisDataset, sizes: Sequence[int | None]) -> dict[str, list[dict[str, Any]]]:
    where = f"with {dataset.spatial_dims}-D images in {str(dataset.root)!r}"
    split, start = {}, 0
    for part, count in part_sizes(sizes, len(dataset.subjects), "subjects", where).items():
        split[part] = dataset.subjects[start : start + count]
        start += count
    return split


def _split_by_lists(dataset: OasisDataset, lists: Mapping[str, Sequence[str | int]]) -> dict[str, list[dict[str, Any]]]:
    unknown = sorted(set(lists) - set(PARTS))
    if unknown:
        raise ValueError(f"lists has unknown part(s) {unknown}; expected {PARTS}.")
    by_id: dict[str, dict[str, Any]] = {}
    for subject in dataset.subjects:
        by_id[subject["subject"]] = subject
        digits = re.search(r"OASIS_(?:OAS1_)?(\d{4})(?:_MR1)?$", subject["subject"])
        if digits:
            by_id[digits.group(1)] = subject
    split: dict[str, list[dict[str, Any]]] = {}
    for part in PARTS:
        wanted = [f"{i:04d}" if isinstance(i, int) else str(i) for i in lists.get(part, ())]
        absent = [i for i in wanted if i not in by_id]
        if absent:
            raise ValueError(
                f"lists[{part!r}] names {len(absent)} subject(s) without a {dataset.spatial_dims}-D image in "
                f"{str(dataset.root)!r}: {shorten(absent)}. Found {len(dataset.subjects)} subjects: "
                f"{shorten([s['subject'] for s in dataset.subjects])}."
            )
        split[part] = [by_id[i] for i in wanted]
        names = [s["subject"] for s in split[part]]
        if len(set(names)) < len(names):
            raise ValueError(
                f"lists[{part!r}] names a subject twice: {shorten([n for n in names if names.count(n) > 1])}."
            )
    for i, a in enumerate(PARTS):
        for b in PARTS[i + 1 :]:
            both = sorted({s["subject"] for s in split[a]} & {s["subject"] for s in split[b]})
            if both:
                logger.warning("%d subject(s) are listed for both %s and %s: %s", len(both), a, b, shorten(both))
    return split
