# SPDX-License-Identifier: Apache-2.0
"""The update of DEQReg: a U-Net that looks at the pair as it is aligned now."""

from __future__ import annotations

import torch
import torch.nn as nn

from monai_deq.networks.blocks.backbone import backbone_autocast_dtype, run_backbone
from monai_deq.networks.blocks.unet import RegistrationUNet
from monai_deq.networks.blocks.warp import warp_by_ddf
from monai_deq.utils import as_flag

__all__ = ["UNetUpdate"]


class UNetUpdate(nn.Module):
    """
    Update ``f_theta(moving, fixed, ddf) -> delta`` of the displacement (paper, Eq. 3), with the input
    ``[fixed, warped moving, ddf]`` (Sec. 3, implementation details).

    Images of any spatial size are taken: the input is padded on the far side of each axis to a multiple of the
    backbone's ``divisor`` and the output is cropped back. With a :py:class:`RegistrationCNN` as backbone this is the
    step of GraDIRN without the similarity gradient, the system "Unrolling" of the paper.

    Args:
        spatial_dims: 2 or 3. Defaults to 3.
        backbone: module that maps ``(B, 2 + ndim, *spatial)``, or one channel more with ``unwarped_moving``, to
            ``(B, ndim, *spatial)``. An attribute ``divisor``
            (default 1) tells of which number the spatial sizes must be multiples. Defaults to
            :py:class:`RegistrationUNet` with as many input channels.
        autocast_dtype: run the backbone under autocast with this dtype, e.g. ``"bfloat16"``; the displacement stays
            float32. Defaults to ``None``: as the caller's autocast has it.
        unwarped_moving: the input is ``[fixed, warped moving, ddf, moving]``: with the moving image as it is, what the
            displacement ought to be can be told wherever the iteration stands, and not only what looks better nearby.
            Not in the paper. Defaults to ``False``.

    Raises:
        ValueError: When ``spatial_dims``, ``autocast_dtype`` or ``unwarped_moving`` is none of these.
    """

    def __init__(
        self,
        spatial_dims: int = 3,
        backbone: nn.Module | None = None,
        autocast_dtype: str | None = None,
        unwarped_moving: bool = False,
    ) -> None:
        super().__init__()
        if spatial_dims not in (2, 3):
            raise ValueError(f"spatial_dims must be 2 or 3, got {spatial_dims}.")
        self.spatial_dims = spatial_dims
        self.autocast_dtype = backbone_autocast_dtype(autocast_dtype)
        self.unwarped_moving = as_flag(unwarped_moving, "unwarped_moving")
        if backbone is None:
            channels = 2 + spatial_dims + int(self.unwarped_moving)
            backbone = RegistrationUNet(spatial_dims, channels, zero_inputs=range(2, 2 + spatial_dims))
        self.backbone = backbone

    def forward(self, moving: torch.Tensor, fixed: torch.Tensor, ddf: torch.Tensor) -> torch.Tensor:
        """
        Args:
            moving: ``(B, 1, *spatial)``, intensities in [0, 1].
            fixed: ``(B, 1, *spatial)``, intensities in [0, 1].
            ddf: ``(B, ndim, *spatial)``, voxels.

        Returns:
            The change of the displacement, ``(B, ndim, *spatial)``, voxels.

        Raises:
            ValueError: When the backbone returns another shape.
        """
        unwarped = [moving] if self.unwarped_moving else []
        x = torch.cat([fixed, warp_by_ddf(moving, ddf), ddf.to(fixed.dtype), *unwarped], dim=1)
        delta = run_backbone(self.backbone, x, self.autocast_dtype)
        if delta.shape != ddf.shape:
            raise ValueError(
                f"the backbone must return a displacement of shape {tuple(ddf.shape)}, got {tuple(delta.shape)}."
            )
        return delta.to(ddf.dtype)
