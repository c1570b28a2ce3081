# SPDX-License-Identifier: Apache-2.0
"""Classical systems that the learned ones are compared with, behind the same interface."""

from __future__ import annotations

from .classical import ClassicalRegistration, ElastixRegistration, InitialAlignment

__all__ = ["ClassicalRegistration", "ElastixRegistration", "InitialAlignment"]
