# SPDX-License-Identifier: Apache-2.0
"""How alike two images are, item by item, and how that changes with the warped one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn as nn

from monai_deq.networks.blocks.filters import box_sum, in_slabs

__all__ = ["FeatureLoss", "LocalCorrelationLoss", "similarity_and_gradient", "standardised"]

#: of the warped image: the value of each item, ``(B,)``, and the gradient times the number of voxels
Similarity = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def standardised(image: torch.Tensor) -> torch.Tensor:
    """Each item with mean 0 and standard deviation 1; an image without contrast becomes zero."""
    values = image.flatten(1)
    shape = (-1, *[1] * (image.ndim - 1))
    mean = values.mean(dim=1).view(shape)
    std = (image - mean).flatten(1).square().mean(dim=1).sqrt().view(shape)
    return (image - mean) / torch.where(std > 1e-6 * mean.abs(), std, torch.full_like(std, float("inf")))


class LocalCorrelationLoss(nn.Module):
    """Minus the mean of the squared local normalised cross-correlation, as
    :py:class:`monai.losses.LocalNormalizedCrossCorrelationLoss`, with its gradient in closed form by running sums.
    Unlike there, windows end at the border of the image, and a window without contrast is judged by the standard
    deviation of the whole image: brightness and contrast of either image do not matter.

    Args:
        kernel_size: width of the window in voxels, odd. Defaults to 7.
        smallest_deviation: standard deviation in a window, as share of that of the image, below which it counts for
            less, and of the fixed image, below half of it, for nothing. Defaults to 3e-3.

    Raises:
        ValueError: When an argument is out of its range.
    """

    def __init__(self, kernel_size: int = 7, smallest_deviation: float = 3e-3) -> None:
        super().__init__()
        if int(kernel_size) != kernel_size or kernel_size < 3 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be an odd number of at least 3, got {kernel_size}.")
        if not smallest_deviation > 0:
            raise ValueError(f"smallest_deviation must be above zero, got {smallest_deviation}.")
        self.kernel_size = int(kernel_size)
        self.smallest_deviation = float(smallest_deviation)

    def forward(self, warped: torch.Tensor, fixed: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """The loss of two images ``(B, 1, *spatial)``, a scalar; outside a mask of the same shape it counts as zero."""
        image, similarity = self.bound(warped, fixed, mask)
        return similarity(image)[0].mean()

    def bound(
        self, moving: torch.Tensor, fixed: torch.Tensor, mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Similarity]:
        """See :py:func:`similarity_and_gradient`; what does not change with the warped image is done once."""
        fixed = standardised(fixed)
        radius = self.kernel_size // 2
        share = 1 / box_sum(torch.ones_like(fixed[:1]), radius)
        t_sum = box_sum(fixed, radius)
        t_var = box_sum(fixed * fixed, radius) - t_sum * share * t_sum
        floor = self.smallest_deviation**2 / share
        # where both have little contrast, no more than that of the fixed one is asked for: equal images are at rest
        flat, least = t_var < floor / 4, torch.minimum(torch.maximum(t_var, floor / 4), floor)
        t_var = torch.maximum(t_var, floor).masked_fill(flat, torch.inf)
        inside = [] if mask is None else [(mask > 0).to(fixed.dtype)]

        def at(p: torch.Tensor, t: torch.Tensor, *known: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            share, t_sum, t_var, least = known[:4]
            t_mean, p_sum = t_sum * share, box_sum(p, radius)
            p_mean = p_sum * share
            cross = box_sum(p * t, radius) - p_mean * t_sum
            p_var = box_sum(p * p, radius) - p_mean * p_sum
            low = p_var < least
            # cc = cross^2 / (t_var p_var), d cc / d p = 2 slope / t_var (t - t_mean - slope (p - p_mean))
            slope = cross / torch.maximum(p_var, least)
            outer = slope / t_var
            if inside:
                outer = outer * known[4]
            value = outer * cross
            outer = -2 * outer
            inner = outer * slope.masked_fill(low, 0.0)
            # one after the other, that no fused product keeps equal images from cancelling exactly
            gradient = t * box_sum(outer, radius)
            gradient = gradient - p * box_sum(inner, radius)
            return value, gradient - box_sum(outer * t_mean - inner * p_mean, radius)

        def similarity(warped: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            value, gradient = in_slabs(at, [warped, fixed, share, t_sum, t_var, least, *inside], 2 * radius)
            return -value.flatten(1).mean(dim=1), gradient

        return standardised(moving), similarity


class FeatureLoss(nn.Module):
    """A similarity of images whose first channel is the intensities and whose others are features: the loss of the
    former, and the squared differences of the latter, summed over the channels.

    Args:
        weight: of the features. Defaults to 1.
        image: loss of the intensities. Defaults to :py:class:`LocalCorrelationLoss`.
    """

    def __init__(self, weight: float = 1.0, image: LocalCorrelationLoss | None = None) -> None:
        super().__init__()
        if not weight >= 0:
            raise ValueError(f"weight must not be negative, got {weight}.")
        self.weight = float(weight)
        self.image = LocalCorrelationLoss() if image is None else image

    def forward(self, warped: torch.Tensor, fixed: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """The loss of two images ``(B, 1 + C, *spatial)``, a scalar; outside a mask of the fixed one it is zero."""
        image, similarity = self.bound(warped, fixed, mask)
        return similarity(image)[0].mean()

    def bound(
        self, moving: torch.Tensor, fixed: torch.Tensor, mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Similarity]:
        """See :py:func:`similarity_and_gradient`."""
        image, of_image = self.image.bound(moving[:, :1], fixed[:, :1], mask)
        features, inside = fixed[:, 1:], 1.0 if mask is None else (mask > 0).to(fixed.dtype)

        def similarity(warped: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            value, gradient = of_image(warped[:, :1])
            apart = (warped[:, 1:] - features) * inside
            value = value + self.weight * apart.square().sum(dim=1).flatten(1).mean(dim=1)
            return value, torch.cat([gradient, 2 * self.weight * apart], dim=1)

        return torch.cat([image, moving[:, 1:]], dim=1), similarity


def compared(loss: nn.Module, *images: torch.Tensor) -> torch.Tensor:
    """A loss of a warped image and others; ``ValueError`` when it does not depend on that, or is no scalar."""
    value: torch.Tensor = loss(*images)
    if value.numel() != 1 or not value.requires_grad:
        raise ValueError(
            f"{type(loss).__name__} must give one number that depends on the warped image, got shape "
            f"{tuple(value.shape)}{'' if value.requires_grad else ' without a gradient'}."
        )
    return value


def value_and_gradient(
    func: Callable[[torch.Tensor], Sequence[torch.Tensor]], x: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A function's value for each item of ``(B, C, *spatial)`` and its gradient times the number of voxels, by
    autograd: found also where gradients are off, and differentiable where they are on.
    """
    through = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.enable_grad():
        if not through or not x.requires_grad:
            # a copy of what inference mode made is no inference tensor
            x = (x.clone() if x.is_inference() else x).detach().requires_grad_()
        values = torch.stack([value.reshape(()) for value in func(x)])
        (gradient,) = torch.autograd.grad(values.sum() * x[0, 0].numel(), x, create_graph=through)
    return (values, gradient) if through else (values.detach(), gradient.detach())


def similarity_and_gradient(
    loss: nn.Module, moving: torch.Tensor, fixed: torch.Tensor, mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, Similarity]:
    """The image to warp, and the function of what became of it that gives the similarity to the fixed image.

    Args:
        loss: :py:class:`LocalCorrelationLoss`, or any differentiable loss of ``(warped, fixed)`` or ``(warped, fixed,
            mask)`` that is a mean over the voxels.
        moving: ``(B, 1, *spatial)``, in float32 at least.
        fixed: ``(B, 1, *spatial)``.
        mask: of the fixed image, ``(B, 1, *spatial)``. Defaults to ``None``: none.
    """
    if isinstance(loss, (FeatureLoss, LocalCorrelationLoss)):
        return loss.bound(moving, fixed, mask)

    def values(warped: torch.Tensor) -> list[torch.Tensor]:
        # as what autograd keeps, a tensor of inference mode is refused
        others = [t.clone() if t.is_inference() else t for t in (fixed, mask) if t is not None]
        return [compared(loss, *item) for item in zip(*(t.split(1) for t in (warped, *others)), strict=True)]

    return moving, partial(value_and_gradient, values)
