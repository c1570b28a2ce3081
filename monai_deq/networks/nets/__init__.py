# SPDX-License-Identifier: Apache-2.0
"""Registration networks."""

from __future__ import annotations

from .deq_registration_net import DEQRegistrationNet

__all__ = ["DEQRegistrationNet"]
