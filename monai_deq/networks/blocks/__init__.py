# SPDX-License-Identifier: Apache-2.0
"""Building blocks: warp, U-Net, updates."""

from __future__ import annotations

from .unet import RegistrationUNet
from .unet_update import UNetUpdate
from .warp import DDFWarp, check_ddf, warp_by_ddf

__all__ = ["DDFWarp", "RegistrationUNet", "UNetUpdate", "check_ddf", "warp_by_ddf"]
