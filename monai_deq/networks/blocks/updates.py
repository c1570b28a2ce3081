# SPDX-License-Identifier: Apache-2.0
"""The learned updates of a displacement: DEQReg and Unrolling, VoxelMorph, GraDIRN, RIIR."""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from monai.networks.blocks import DVF2DDF
from monai.networks.layers import Conv
from monai.networks.nets import VoxelMorphUNet

from monai_deq.networks.blocks.backbones import RegistrationCNN, RegistrationUNet
from monai_deq.networks.blocks.convolutions import (
    ConvGRUCell,
    init_flow_,
    init_he_normal_,
    init_zero_inputs_,
    run_backbone,
    with_small_volumes,
)
from monai_deq.networks.blocks.similarities import compared
from monai_deq.networks.blocks.warping import warp_by_ddf

__all__ = [
    "GradientUpdate",
    "RecurrentUpdate",
    "RegistrationUpdate",
    "UNetUpdate",
    "VoxelMorphUpdate",
    "similarity_gradient",
]


class RegistrationUpdate(nn.Module):
    """Base of the updates: called as ``update(moving, fixed, ddf) -> delta``, or with a hidden state as
    ``update(moving, fixed, ddf, hidden) -> (delta, hidden)``: images ``(B, 1, *spatial)`` with intensities in [0, 1],
    displacements ``(B, ndim, *spatial)`` in voxels. Another base will do: networks ask for the call and for
    ``hidden_channels``.

    Args:
        spatial_dims: 2 or 3.
        autocast_dtype: run the backbone under autocast with this dtype, ``"bfloat16"`` or ``"float16"``; the
            displacement stays float32. Defaults to ``None``: as the caller's autocast has it.

    Raises:
        ValueError: When an argument is none of these.
    """

    #: channels of the hidden state, which starts at zero
    hidden_channels = 0

    def __init__(self, spatial_dims: int, autocast_dtype: str | None = None) -> None:
        super().__init__()
        if spatial_dims not in (2, 3):
            raise ValueError(f"spatial_dims must be 2 or 3, got {spatial_dims}.")
        if autocast_dtype not in (None, "bfloat16", "float16"):
            raise ValueError(f'autocast_dtype must be None, "bfloat16" or "float16", got {autocast_dtype!r}.')
        self.spatial_dims = spatial_dims
        self.autocast_dtype = autocast_dtype

    def run_backbone(self, backbone: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """A backbone's output on images of any size, under this update's autocast, see :py:func:`run_backbone`."""
        return run_backbone(backbone, x, self.autocast_dtype)

    def displacement(self, backbone: nn.Module, x: torch.Tensor, ddf: torch.Tensor) -> torch.Tensor:
        """:py:meth:`run_backbone` where the output is a displacement; a ``ValueError`` when it has not the shape of
        ``ddf``.
        """
        delta = self.run_backbone(backbone, x)
        if delta.shape != ddf.shape:
            raise ValueError(
                f"the backbone must return a displacement of shape {tuple(ddf.shape)}, got {tuple(delta.shape)}."
            )
        return delta.to(ddf.dtype)


class UNetUpdate(RegistrationUpdate):
    """Update ``f_theta(moving, fixed, ddf) -> delta`` of DEQReg (paper, Eq. 3) with the input ``[fixed, warped moving,
    ddf]`` (Sec. 3). With a :py:class:`RegistrationCNN` as backbone it is the system "Unrolling" of the paper.

    Args:
        spatial_dims: 2 or 3. Defaults to 3.
        backbone: module that maps ``(B, 2 + ndim, *spatial)`` to ``(B, ndim, *spatial)``; the input is padded to a
            multiple of its attribute ``divisor`` (default 1). Defaults to :py:class:`RegistrationUNet`.
        autocast_dtype: see :py:class:`RegistrationUpdate`. Defaults to ``None``.
        checkpoint_parts: of the default backbone, see :py:class:`RegistrationUNet`. Defaults to 0.
    """

    def __init__(
        self,
        spatial_dims: int = 3,
        backbone: nn.Module | None = None,
        autocast_dtype: str | None = None,
        checkpoint_parts: int = 0,
    ) -> None:
        super().__init__(spatial_dims, autocast_dtype)
        if backbone is None:
            zero_inputs = range(2, 2 + spatial_dims)
            backbone = RegistrationUNet(
                spatial_dims, 2 + spatial_dims, zero_inputs=zero_inputs, checkpoint_parts=checkpoint_parts
            )
        self.backbone = backbone

    def forward(self, moving: torch.Tensor, fixed: torch.Tensor, ddf: torch.Tensor) -> torch.Tensor:
        """See :py:class:`RegistrationUpdate`."""
        x = torch.cat([fixed, warp_by_ddf(moving, ddf), ddf.to(fixed.dtype)], dim=1)
        return self.displacement(self.backbone, x, ddf)


class VoxelMorphUpdate(RegistrationUpdate):
    """VoxelMorph (Balakrishnan et al., TMI 2019) with MONAI's :py:class:`monai.networks.nets.VoxelMorphUNet`: input
    ``[moving o ddf, fixed]``, output a displacement. Taken once, from zero, it is VoxelMorph. 327,331 parameters in
    3-D; they start He-normal, as in the authors' Keras implementation, the last convolution next to zero.

    Args:
        spatial_dims: 2 or 3. Defaults to 3.
        integration_steps: steps of scaling and squaring (:py:class:`monai.networks.blocks.DVF2DDF`) that make the
            network's output, then a velocity, a diffeomorphic displacement. Defaults to 0: it is a displacement.
        flow_std: standard deviation of the initial weights of the last convolution. Defaults to 1e-5.
        autocast_dtype: see :py:class:`RegistrationUpdate`. Defaults to ``None``.

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
        super().__init__(spatial_dims, autocast_dtype)
        if integration_steps < 0:
            raise ValueError(f"integration_steps must not be negative, got {integration_steps}.")
        self.integration_steps = integration_steps
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
        init_he_normal_(self.backbone)
        flow = [m for m in self.backbone.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d))][-1]
        init_flow_(flow, flow_std)

    def forward(self, moving: torch.Tensor, fixed: torch.Tensor, ddf: torch.Tensor) -> torch.Tensor:
        """See :py:class:`RegistrationUpdate`."""
        flow = self.displacement(self.backbone, torch.cat([warp_by_ddf(moving, ddf), fixed], dim=1), ddf)
        # in half precision the integration would lose sub-voxel displacements at high voxel indices
        with torch.autocast(ddf.device.type, enabled=False):
            return self.dvf2ddf(flow)  # type: ignore[no-any-return]


def similarity_gradient(
    similarity: nn.Module, moving: torch.Tensor, fixed: torch.Tensor, ddf: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """``N * grad_ddf D(moving o ddf, fixed)`` with ``N`` the number of elements of the batch, so that a loss that is a
    mean gives steps that depend neither on the image size nor on the batch. Where gradients are on, the result can be
    differentiated itself; the gradient is found also where they are off.

    Args:
        similarity: differentiable loss ``D(warped, fixed)``, a mean over the batch; in float32 at least, autocast off.
        moving: ``(B, 1, *spatial)``.
        fixed: ``(B, 1, *spatial)``.
        ddf: ``(B, ndim, *spatial)``, voxels.

    Returns:
        The gradient, of the shape of ``ddf``, and the warped image it was taken at.

    Raises:
        ValueError: When the loss does not depend on the displacement, or is no scalar.
    """
    through = torch.is_grad_enabled()
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device_type=moving.device.type, enabled=False),
    ):
        if not through or not ddf.requires_grad:
            # a copy of what inference mode made is no inference tensor
            moving, fixed, ddf = (t.clone() if t.is_inference() else t for t in (moving, fixed, ddf))
            ddf = ddf.detach().requires_grad_()
        warped = warp_by_ddf(moving, ddf)
        exact = torch.promote_types(warped.dtype, torch.float32)
        loss = compared(similarity, warped.to(exact), fixed.to(exact))
        (gradient,) = torch.autograd.grad(loss * warped.numel(), ddf, create_graph=through)
    return (gradient, warped) if through else (gradient.detach(), warped.detach())


class GradientUpdate(RegistrationUpdate):
    """Update of GraDIRN (Qiu et al., "Embedding Gradient-based Optimization in Image Registration Networks", MICCAI
    2022): ``delta = -s * N * grad_ddf D(fixed, moving o ddf) - CNN([ddf, fixed, moving o ddf])``, with ``N`` the number
    of elements and ``s`` a learned step. In training the gradient is differentiated through. 89,988 parameters in 3-D.
    The original's normalisation of the displacement by ``2 / size`` is left out: displacements are in voxels.

    Args:
        spatial_dims: 2 or 3. Defaults to 3.
        similarity: ``D``, a differentiable loss of ``(warped, fixed)``, a mean. Defaults to the mean squared error.
        step_size: start of ``s``. Defaults to 0.5.
        backbone: maps ``(B, ndim + 2, *spatial)`` to ``(B, ndim, *spatial)``. Defaults to :py:class:`RegistrationCNN`.
        autocast_dtype: see :py:class:`RegistrationUpdate`. Defaults to ``None``.

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
        super().__init__(spatial_dims, autocast_dtype)
        if not step_size >= 0:
            raise ValueError(f"step_size must not be negative, got {step_size}.")
        self.similarity = nn.MSELoss() if similarity is None else similarity
        self.step_size = nn.Parameter(torch.tensor(float(step_size)))
        if backbone is None:
            backbone = RegistrationCNN(spatial_dims, 2 + spatial_dims, zero_inputs=range(spatial_dims))
        self.backbone = backbone

    def forward(self, moving: torch.Tensor, fixed: torch.Tensor, ddf: torch.Tensor) -> torch.Tensor:
        """See :py:class:`RegistrationUpdate`."""
        gradient, warped = similarity_gradient(self.similarity, moving, fixed, ddf)
        x = torch.cat([t.to(fixed.dtype) for t in (ddf, fixed, warped)], dim=1)
        return -self.step_size * gradient - self.displacement(self.backbone, x, ddf)


class RecurrentUpdate(RegistrationUpdate):
    """Update in the manner of RIIR (Zhang et al., "Recurrent Inference Machine for Medical Image Registration"): input
    ``[ddf, N * grad_ddf D, moving o ddf, fixed]``, two convolutional gated recurrent units. In training the gradient is
    differentiated through.

    **This is a reconstruction**: the sizes of the hidden states are not published. Ours takes the U-Net of VoxelMorph
    (:py:class:`RegistrationUNet`) with two :py:class:`ConvGRUCell` in place of its two last hidden layers, at full
    resolution.

    Args:
        spatial_dims: 2 or 3. Defaults to 3.
        similarity: see :py:class:`GradientUpdate`. Defaults to the mean squared error.
        hidden_size: channels of each of the two hidden states. Defaults to 16.
        flow_std: standard deviation of the initial weights of the last convolution. Defaults to 1e-5.
        autocast_dtype: see :py:class:`RegistrationUpdate`; the hidden state stays float32 too. Defaults to ``None``.

    Raises:
        ValueError: When an argument is out of its range.
    """

    def __init__(
        self,
        spatial_dims: int = 3,
        similarity: nn.Module | None = None,
        hidden_size: int = 16,
        flow_std: float = 1e-5,
        autocast_dtype: str | None = None,
    ) -> None:
        super().__init__(spatial_dims, autocast_dtype)
        if hidden_size < 1:
            raise ValueError(f"hidden_size must be at least 1, got {hidden_size}.")
        self.similarity = nn.MSELoss() if similarity is None else similarity
        self.hidden_size = hidden_size
        self.hidden_channels = 2 * hidden_size
        self.unet = RegistrationUNet(spatial_dims, 2 * spatial_dims + 2, out_channels=hidden_size, final_channels=())
        self.first = ConvGRUCell(spatial_dims, hidden_size, hidden_size)
        self.second = ConvGRUCell(spatial_dims, hidden_size, hidden_size)
        self.flow = Conv["CONV", spatial_dims](hidden_size, spatial_dims, kernel_size=3, padding=1)
        with_small_volumes(self)
        init_he_normal_(self.unet)  # its last layer too: it gives features here
        init_flow_(self.flow, flow_std)
        init_zero_inputs_(self.unet.first_conv, range(spatial_dims))

    def forward(
        self, moving: torch.Tensor, fixed: torch.Tensor, ddf: torch.Tensor, hidden: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See :py:class:`RegistrationUpdate`; the hidden state is ``(B, hidden_channels, *spatial)``, or a
        ``ValueError``.
        """
        expected = (ddf.shape[0], self.hidden_channels, *ddf.shape[2:])
        if tuple(hidden.shape) != expected:
            raise ValueError(f"hidden must have shape {expected}, got {tuple(hidden.shape)}.")
        gradient, warped = similarity_gradient(self.similarity, moving, fixed, ddf)
        x = torch.cat([t.to(fixed.dtype) for t in (ddf, gradient, warped, fixed)], dim=1)
        features = F.leaky_relu(self.run_backbone(self.unet, x), 0.2)
        first, second = hidden.chunk(2, dim=1)
        device = x.device.type
        dtype = None if self.autocast_dtype is None else getattr(torch, self.autocast_dtype)
        with torch.autocast(device, dtype=dtype, enabled=dtype is not None or torch.is_autocast_enabled(device)):
            first = self.first(features, first)
            second = self.second(first, second)
            delta = self.flow(second)
        return delta.to(ddf.dtype), torch.cat([first, second], dim=1)
