# SPDX-License-Identifier: Apache-2.0
"""Transforms: loading and checks, solving, warping, writing."""

from __future__ import annotations

from .fixed_point_solver import FixedPointSolver, FixedPointSolverD, FixedPointSolverd, FixedPointSolverDict
from .load_ddf import LoadDDFD, LoadDDFd, LoadDDFDict, load_ddf
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
    "LoadRegistrationImaged",
    "ResampleDDF",
    "ResampleDDFD",
    "ResampleDDFDict",
    "ResampleDDFd",
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
    "load_ddf",
    "load_pair_transforms",
    "load_subject_transforms",
    "save_nifti",
]
