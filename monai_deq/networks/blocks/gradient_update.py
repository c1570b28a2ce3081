# SPDX-License-Identifier: Apache-2.0
"""The update of GraDIRN: a step down the gradient of the similarity, and a learned step."""

from __future__ import annotations

import torch
import torch.nn as nn

from monai_deq.networks.blocks.backbone import backbone_autocast_dtype, run_backbone
from monai_deq.networks.blocks.cnn import RegistrationCNN
from monai_deq.networks.blocks.similarity_gradient import similarity_gradient

__all__ = ["GradientUpdate"]


class GradientUpdate(nn.Module):
    """
    Update of GraDIRN (Qiu et al., "Embedding Gradient-based Optimization in Image Registration Networks", MICCAI
    2022): ``delta = -s * N * grad_ddf D(fixed, moving o ddf) - CNN([ddf, fixed, moving o ddf])``, with ``N`` the number
    of elements and ``s`` a learned step. In training the gradient is differentiated through.

    With defaults 89,988 parameters in 3-D (three levels with weights of their own: 269,964). The original's
    normalisation of the displacement by ``2 / size`` is left out: displacements are in voxels.

    Args:
        spatial_dims: 2 or 3. Defaults to 3.
        similarity: ``D``, loss of ``(warped, fixed)``, a mean over the batch: any differentiable one of
            :py:mod:`monai.losses`. Defaults to the mean squared error.
        step_size: start of ``s``. Defaults to 0.5.
        backbone: module that maps ``(B, ndim + 2, *spatial)`` to ``(B, ndim, *spatial)``, with ``divisor`` as in
            :py:class:`UNetUpdate`. Defaults to :py:class:`RegistrationCNN`.
        autocast_dtype: run the backbone under autocast with this dtype, e.g. ``"bfloat16"``. Defaults to ``None``.

    Raises:
        ValueError: When an argument is out of its range.
    """

    def __init__(
        self,
        spatial_dims: int = 3,
        similarity: nn.Module | None = None,
        step_size: float = 0.5,
        backbone: nn.Module | None = None,
        autocast_dtype: str | None = None,
    ) -> None:
        super().__init__()
        if spatial_dims not in (2, 3):
            raise ValueError(f"spatial_dims must be 2 or 3, got {spatial_dims}.")
        if not step_size >= 0:
            raise ValueError(f"step_size must not be negative, got {step_size}.")
        self.spatial_dims = spatial_dims
        self.similarity = nn.MSELoss() if similarity is None else similarity
        self.step_size = nn.Parameter(torch.tensor(float(step_size)))
        self.autocast_dtype = backbone_autocast_dtype(autocast_dtype)
        if backbone is None:
            backbone = RegistrationCNN(spatial_dims, 2 + spatial_dims, zero_inputs=range(spatial_dims))
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
        gradient, warped = similarity_gradient(self.similarity, moving, fixed, ddf)
        x = torch.cat([ddf.to(fixed.dtype), fixed, warped.to(fixed.dtype)], dim=1)
        learned = run_backbone(self.backbone, x, self.autocast_dtype)
        if learned.shape != ddf.shape:
            raise ValueError(
                f"the backbone must return a displacement of shape {tuple(ddf.shape)}, got {tuple(learned.shape)}."
            )
        return -self.step_size * gradient - learned
