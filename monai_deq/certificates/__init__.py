# SPDX-License-Identifier: Apache-2.0
"""What can be said of a solution: whether it is at rest, attracts, is the only one, and
answers to changes that should not matter."""

from __future__ import annotations

from .answers import HARMLESS_CHANGES, harmless_answers
from .certification import (
    OPTIONAL_RECORDS,
    Certificate,
    Verdict,
    certified_solve,
    certify,
    check_certificate,
    starting_point,
    verdict,
)
from .spectrum import spectral_radius

__all__ = [
    "HARMLESS_CHANGES",
    "OPTIONAL_RECORDS",
    "Certificate",
    "Verdict",
    "certified_solve",
    "certify",
    "check_certificate",
    "harmless_answers",
    "spectral_radius",
    "starting_point",
    "verdict",
]
