# SPDX-License-Identifier: Apache-2.0
"""VoxelMorph as an update: one look at the pair gives the whole displacement."""

from __future__ import annotations

import torch
import torch.nn as nn
from monai.networks.blocks import DVF2DDF
from monai.networks.nets import VoxelMorphUNet

from monai_deq.networks.blocks.backbone import backbone_autocast_dtype, run_backbone, start_he_normal, start_small
from monai_deq.networks.blocks.convolution import with_small_volumes
from monai_deq.networks.blocks.warp import warp_by_ddf

__all__ = ["VoxelMorphUpdate"]


class VoxelMorphUpdate(nn.Module):
    """
    VoxelMorph (Balakrishnan et al., TMI 2019) with MONAI's :py:class:`monai.networks.nets.VoxelMorphUNet`: input
    ``[moving o ddf, fixed]``, output a displacement. Taken once, from a zero displacement, it is VoxelMorph; further
    steps, which the method does not have, would register what the first one left. 327,331 parameters in 3-D.

    Weights start He-normal, as in the authors' Keras implementation, the last convolution next to zero.

    Args:
        spatial_dims: 2 or 3. Defaults to 3.
        integration_steps: steps of scaling and squaring (:py:class:`monai.networks.blocks.DVF2DDF`) that make the
            network's output, then a velocity, a diffeomorphic displacement. Defaults to 0: it is a displacement.
        flow_std: standard deviation of the initial weights of the last convolution. Defaults to 1e-5.
        autocast_dtype: run the U-Net under autocast with this dtype, e.g. ``"bfloat16"``. Defaults to ``None``.

    Raises:
        ValueError: When an argument is out of its range.
    """

    def __init__(
        self,
        spatial_dims: int = 3,
        integration_steps: int = 0,
        flow_std: float = 1e-5,
        autocast_dtype: str | None = None,
    ) -> None:
        super().__init__()
        if spatial_dims not in (2, 3):
            raise ValueError(f"spatial_dims must be 2 or 3, got {spatial_dims}.")
        if integration_steps < 0:
            raise ValueError(f"integration_steps must not be negative, got {integration_steps}.")
        self.spatial_dims = spatial_dims
        self.autocast_dtype = backbone_autocast_dtype(autocast_dtype)
        self.backbone = VoxelMorphUNet(
            spatial_dims,
            in_channels=2,
            unet_out_channels=32,
            channels=(16, 32, 32, 32, 32, 32, 32, 32),
            final_conv_channels=(16, 16),
        )
        self.backbone.divisor = 16  # type: ignore[assignment]
        self.dvf2ddf = DVF2DDF(integration_steps, padding_mode="border") if integration_steps else nn.Identity()
        with_small_volumes(self.backbone)
        start_he_normal(self.backbone)
        flow = [m for m in self.backbone.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d))][-1]
        start_small(flow, flow_std)

    def forward(self, moving: torch.Tensor, fixed: torch.Tensor, ddf: torch.Tensor) -> torch.Tensor:
        """
        Args:
            moving: ``(B, 1, *spatial)``, intensities in [0, 1].
            fixed: ``(B, 1, *spatial)``, intensities in [0, 1].
            ddf: ``(B, ndim, *spatial)``, voxels.

        Returns:
            The change of the displacement, ``(B, ndim, *spatial)``, voxels.
        """
        x = torch.cat([warp_by_ddf(moving, ddf), fixed], dim=1)
        flow = run_backbone(self.backbone, x, self.autocast_dtype)
        # in half precision the integration would lose sub-voxel displacements at high voxel indices
        with torch.autocast(x.device.type, enabled=False):
            return self.dvf2ddf(flow.to(ddf.dtype))
