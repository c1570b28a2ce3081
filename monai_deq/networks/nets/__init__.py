# SPDX-License-Identifier: Apache-2.0
"""Registration networks."""

from __future__ import annotations

from .coarse_to_fine import coarse_to_fine, refuse_untrained_coarse
from .deq_registration_net import DEQRegistrationNet
from .pair_network import PairNetwork
from .unrolled_registration_net import UnrolledRegistrationNet

__all__ = ["DEQRegistrationNet", "PairNetwork", "UnrolledRegistrationNet", "coarse_to_fine", "refuse_untrained_coarse"]
