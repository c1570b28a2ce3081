# SPDX-License-Identifier: Apache-2.0
"""Transforms: loading and checks, solving, warping, writing."""

from __future__ import annotations

from .fixed_point_solver import FixedPointSolver, FixedPointSolverD, FixedPointSolverd, FixedPointSolverDict
from .intensity_window import WindowToUnitRangeD, WindowToUnitRanged, WindowToUnitRangeDict
from .learn2reg_ddf import (
    SaveLearn2RegDDFD,
    SaveLearn2RegDDFd,
    SaveLearn2RegDDFDict,
    learn2reg_ddf_name,
    load_learn2reg_ddf,
    save_learn2reg_ddf,
)
from .load_annotated_pair import load_annotated_pair_transforms
from .load_ddf import LoadDDFD, LoadDDFd, LoadDDFDict, load_ddf
from .load_keypoints import (
    CheckSameKeypointsD,
    CheckSameKeypointsd,
    CheckSameKeypointsDict,
    LoadKeypointsD,
    LoadKeypointsd,
    LoadKeypointsDict,
    ResizeKeypointsD,
    ResizeKeypointsd,
    ResizeKeypointsDict,
    load_keypoints,
    resize_keypoints,
)
from .load_pair import load_pair_transforms
from .load_subject import (
    CheckedCompose,
    CheckLabeld,
    CheckRegistrationImaged,
    CheckSameGridd,
    DropSliceAxisd,
    LoadRegistrationImaged,
    ScaleToUnitRanged,
    load_subject_transforms,
)
from .resample_ddf import ResampleDDF, ResampleDDFD, ResampleDDFd, ResampleDDFDict
from .save_registration import SaveRegistrationD, SaveRegistrationd, SaveRegistrationDict, save_nifti
from .warp import WarpByDDFD, WarpByDDFd, WarpByDDFDict
from .warp_points import WarpPointsByDDF, WarpPointsByDDFD, WarpPointsByDDFd, WarpPointsByDDFDict

__all__ = [
    "CheckSameKeypointsD",
    "CheckSameKeypointsDict",
    "CheckSameKeypointsd",
    "CheckedCompose",
    "CheckLabeld",
    "CheckRegistrationImaged",
    "CheckSameGridd",
    "DropSliceAxisd",
    "FixedPointSolver",
    "FixedPointSolverD",
    "FixedPointSolverDict",
    "FixedPointSolverd",
    "LoadDDFD",
    "LoadDDFDict",
    "LoadDDFd",
    "LoadKeypointsD",
    "LoadKeypointsDict",
    "LoadKeypointsd",
    "LoadRegistrationImaged",
    "ResampleDDF",
    "ResampleDDFD",
    "ResampleDDFDict",
    "ResampleDDFd",
    "ResizeKeypointsD",
    "ResizeKeypointsDict",
    "ResizeKeypointsd",
    "SaveLearn2RegDDFD",
    "SaveLearn2RegDDFDict",
    "SaveLearn2RegDDFd",
    "SaveRegistrationD",
    "SaveRegistrationDict",
    "SaveRegistrationd",
    "ScaleToUnitRanged",
    "WarpByDDFD",
    "WarpByDDFDict",
    "WarpByDDFd",
    "WarpPointsByDDF",
    "WarpPointsByDDFD",
    "WarpPointsByDDFDict",
    "WarpPointsByDDFd",
    "WindowToUnitRangeD",
    "WindowToUnitRangeDict",
    "WindowToUnitRanged",
    "learn2reg_ddf_name",
    "load_annotated_pair_transforms",
    "load_ddf",
    "load_keypoints",
    "load_learn2reg_ddf",
    "load_pair_transforms",
    "load_subject_transforms",
    "resize_keypoints",
    "save_learn2reg_ddf",
    "save_nifti",
]
