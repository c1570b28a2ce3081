# SPDX-License-Identifier: Apache-2.0
"""What can be said of a solution: whether it is at rest, attracts, and is the only one."""

from __future__ import annotations

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
    "OPTIONAL_RECORDS",
    "Certificate",
    "Verdict",
    "certified_solve",
    "certify",
    "check_certificate",
    "spectral_radius",
    "starting_point",
    "verdict",
]
