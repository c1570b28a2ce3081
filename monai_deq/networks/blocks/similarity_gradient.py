# SPDX-License-Identifier: Apache-2.0
"""Gradient of an image similarity with respect to the displacement."""

from __future__ import annotations

import torch
import torch.nn as nn

from monai_deq.networks.blocks.warp import warp_by_ddf

__all__ = ["similarity_gradient"]


def similarity_gradient(
    similarity: nn.Module, moving: torch.Tensor, fixed: torch.Tensor, ddf: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    ``N * grad_ddf D(moving o ddf, fixed)`` with ``N`` the number of elements of the batch, so that a loss that is a
    mean gives steps that depend neither on the image size nor on the batch. Where gradients are on, the result can be
    differentiated itself (GraDIRN and RIIR are trained through it); the gradient is found also where they are off.

    Args:
        similarity: loss ``D(warped, fixed)``, differentiable, a mean over the items of the batch such as those of
            :py:mod:`monai.losses`. It is computed in float32 at least, with autocast off.
        moving: ``(B, 1, *spatial)``.
        fixed: ``(B, 1, *spatial)``.
        ddf: ``(B, ndim, *spatial)``, voxels.

    Returns:
        The gradient ``(B, ndim, *spatial)``, and the warped image it was taken at.

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
        loss = similarity(warped.to(exact), fixed.to(exact))
        if loss.numel() != 1 or not loss.requires_grad:
            raise ValueError(
                f"{type(similarity).__name__} must give one number that depends on the warped image, "
                f"got shape {tuple(loss.shape)}{'' if loss.requires_grad else ' without a gradient'}."
            )
        (gradient,) = torch.autograd.grad(loss * warped.numel(), ddf, create_graph=through)
    return (gradient, warped) if through else (gradient.detach(), warped.detach())
