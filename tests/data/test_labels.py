# SPDX-License-Identifier: Apache-2.0
"""The label numbers of OASIS."""

from __future__ import annotations

import pytest

from monai_deq.data import SEG24_LABELS, SEG35_LABELS, label_set


def test_label_names():
    # numbers as in the label lists that come with the data set
    assert list(SEG35_LABELS) == list(range(1, 36)) and list(SEG24_LABELS) == list(range(1, 25))
    expected35 = {
        1: "Left-Cerebral-White-Matter",
        6: "Left-Cerebellum-Cortex",
        11: "3rd-Ventricle",
        12: "4th-Ventricle",
        13: "Brain-Stem",
        14: "Left-Hippocampus",
        18: "Left-Vessel",
        20: "Right-Cerebral-White-Matter",
        29: "Right-Pallidum",
        30: "Right-Hippocampus",
        35: "Right-Choroid-Plexus",
    }
    expected24 = {
        4: "Left-Inf-Lat-Ventricle",
        5: "Left-Thalamus",
        8: "Left-Pallidum",
        9: "3rd-Ventricle",
        10: "Brain-Stem",
        13: "Left-Choroid-Plexus",
        14: "Right-Cerebral-White-Matter",
        22: "Right-Hippocampus",
        24: "Right-Choroid-Plexus",
    }
    assert {k: SEG35_LABELS[k] for k in expected35} == expected35
    assert {k: SEG24_LABELS[k] for k in expected24} == expected24


def test_label_set():
    assert label_set("all", 3) == list(range(1, 36))
    assert label_set("all", 2) == list(range(1, 25))
    reduced = label_set("voxelmorph", 3)
    left_out = {SEG35_LABELS[i] for i in set(range(1, 36)) - set(reduced)}
    assert left_out == {
        "Left-Inf-Lat-Ventricle",
        "Right-Inf-Lat-Ventricle",
        "Left-Accumbens",
        "Right-Accumbens",
        "Left-Vessel",
        "Right-Vessel",
    }
    with pytest.raises(ValueError, match="3-D only"):
        label_set("voxelmorph", 2)
    with pytest.raises(ValueError, match="'freesurfer'.*'all' or 'voxelmorph'"):
        label_set("freesurfer", 3)
