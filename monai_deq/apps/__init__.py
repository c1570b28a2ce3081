# SPDX-License-Identifier: Apache-2.0
"""From files to files: register pairs of scans, apply and invert what was found."""

from __future__ import annotations

from .registration import PRESETS, RegistrationSettings, register_pairs
from .transformation import apply_transforms, invert_transform

__all__ = ["PRESETS", "RegistrationSettings", "apply_transforms", "invert_transform", "register_pairs"]
