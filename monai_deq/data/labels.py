# SPDX-License-Identifier: Apache-2.0
"""The label numbers of OASIS."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["SEG24_LABELS", "SEG35_LABELS", "check_spatial_dims", "label_set"]

_SIDE_35 = (
    *("Cerebral-White-Matter", "Cerebral-Cortex", "Lateral-Ventricle", "Inf-Lat-Ventricle"),
    *("Cerebellum-White-Matter", "Cerebellum-Cortex", "Thalamus", "Caudate", "Putamen", "Pallidum"),
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


def check_spatial_dims(spatial_dims: int) -> None:
    if spatial_dims not in (2, 3):
        raise ValueError(f"spatial_dims must be 2 or 3, got {spatial_dims!r}.")


def label_set(name: str, spatial_dims: int = 3) -> list[int]:
    """The label numbers that a named scoring of OASIS uses, ascending, without the background.

    Args:
        name: ``"all"``: every label, 1-35 in 3-D (as Learn2Reg scores) and 1-24 in 2-D. ``"voxelmorph"``: the reduced
            set of the VoxelMorph line of papers, 3-D only; its 30th structure, CSF, is not among the 35.
        spatial_dims: 2 or 3. Defaults to 3.

    Raises:
        ValueError: When the name is unknown, or has no meaning for ``spatial_dims``.
    """
    check_spatial_dims(spatial_dims)
    if name == "all":
        return sorted(SEG35_LABELS if spatial_dims == 3 else SEG24_LABELS)
    if name != "voxelmorph":
        raise ValueError(f"Unknown label set {name!r}; expected 'all' or 'voxelmorph'.")
    if spatial_dims == 2:
        raise ValueError("label set 'voxelmorph' is defined for the 35 labels in 3-D only; use 'all' in 2-D.")
    return list(_VOXELMORPH_35)
