# SPDX-License-Identifier: Apache-2.0
"""Registration networks."""

from __future__ import annotations

from .deq_registration_net import DEQRegistrationNet
from .pair_network import PairNetwork
from .resolution_levels import coarse_to_fine, refuse_untrained_coarse
from .unrolled_registration_net import UnrolledRegistrationNet

__all__ = ["DEQRegistrationNet", "PairNetwork", "UnrolledRegistrationNet", "coarse_to_fine", "refuse_untrained_coarse"]
