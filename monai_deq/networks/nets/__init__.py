# SPDX-License-Identifier: Apache-2.0
"""Registration networks."""

from __future__ import annotations

from .coarse_to_fine import coarse_to_fine
from .deq_registration_net import DEQRegistrationNet
from .unrolled_registration_net import UnrolledRegistrationNet

__all__ = ["DEQRegistrationNet", "UnrolledRegistrationNet", "coarse_to_fine"]
