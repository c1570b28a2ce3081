# SPDX-License-Identifier: Apache-2.0
"""From files to files: check them, register pairs of scans, apply and invert what was found."""

from __future__ import annotations

from .preflight import Finding, check_files, usable_parts
from .registration import PRESETS, RegistrationSettings, register_pairs
from .transformation import apply_transforms, invert_transform

__all__ = [
    "PRESETS",
    "Finding",
    "RegistrationSettings",
    "apply_transforms",
    "check_files",
    "invert_transform",
    "register_pairs",
    "usable_parts",
]
