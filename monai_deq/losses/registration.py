# SPDX-License-Identifier: Apache-2.0
"""Similarity plus smoothness, and its weighted sum over the states of an iteration."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn as nn
from monai.losses import DiffusionLoss, LocalNormalizedCrossCorrelationLoss
from torch.utils.checkpoint import checkpoint

from monai_deq.networks.blocks import warp_by_ddf

__all__ = ["MaskedSimilarityLoss", "RegistrationLoss", "StatesLoss"]


def _cross_correlation(spatial_dims: int, reduction: str = "mean") -> nn.Module:
    return LocalNormalizedCrossCorrelationLoss(spatial_dims=spatial_dims, kernel_size=5, reduction=reduction)


class RegistrationLoss(nn.Module):
    """``similarity(warped, fixed) + weight * smoothness(ddf)`` (paper, Eq. 1), in float32 with autocast off: local
    cross-correlation in half precision gives NaN.

    Args:
        spatial_dims: 2 or 3, for the default similarity. Defaults to 3.
        weight: ``lambda``. Defaults to 0.1 (paper, OASIS).
        similarity: loss of ``(warped, fixed)``, or of ``(warped, fixed, mask)`` where a mask is given. Defaults to
            MONAI's local normalised cross-correlation with window 5.
        smoothness: loss of ``ddf``. Defaults to MONAI's diffusion loss, not divided by number of axes or image size.
        masked: whether the default similarity is a :py:class:`MaskedSimilarityLoss`. Defaults to ``False``.

    Raises:
        ValueError: When ``weight`` is negative.
    """

    def __init__(
        self,
        spatial_dims: int = 3,
        weight: float = 0.1,
        similarity: nn.Module | None = None,
        smoothness: nn.Module | None = None,
        masked: bool = False,
    ) -> None:
        super().__init__()
        if weight < 0:
            raise ValueError(f"weight must not be negative, got {weight}.")
        self.weight = float(weight)
        if similarity is None:
            similarity = MaskedSimilarityLoss(spatial_dims) if masked else _cross_correlation(spatial_dims)
        self.similarity = similarity
        self.smoothness = DiffusionLoss() if smoothness is None else smoothness

    def forward(
        self, warped: torch.Tensor, fixed: torch.Tensor, ddf: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The loss, a scalar.

        Args:
            warped: moving image pulled back by ``ddf``, ``(B, 1, *spatial)``.
            fixed: ``(B, 1, *spatial)``.
            ddf: ``(B, ndim, *spatial)``, voxels.
            mask: ``(B, 1, *spatial)`` of the fixed image, for the similarity alone. Defaults to ``None``: none.
        """
        with torch.autocast(device_type=ddf.device.type, enabled=False):
            # float64 stays, for checks of gradients
            warped, fixed, ddf = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (warped, fixed, ddf))
            images = (warped, fixed) if mask is None else (warped, fixed, mask)
            return self.similarity(*images) + self.weight * self.smoothness(ddf)


class MaskedSimilarityLoss(nn.Module):
    """Mean of a similarity over the voxels inside a mask, e.g. over the lungs of a chest CT, in float32 with autocast
    off. Every image of a batch counts the same, whatever the size of its mask. The similarity of a voxel may look
    beyond the mask: the window of the local cross-correlation sees the border of the lung from inside.

    Args:
        spatial_dims: 2 or 3, for the default similarity. Defaults to 3.
        similarity: loss of ``(warped, fixed)`` that is not reduced (``reduction="none"``). Defaults to MONAI's local
            normalised cross-correlation with window 5.
    """

    def __init__(self, spatial_dims: int = 3, similarity: nn.Module | None = None) -> None:
        super().__init__()
        self.similarity = _cross_correlation(spatial_dims, reduction="none") if similarity is None else similarity

    def forward(self, warped: torch.Tensor, fixed: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The loss, a scalar, of three tensors ``(B, 1, *spatial)``; inside is where the fixed image's mask is above
        zero.

        Raises:
            ValueError: When the mask has another shape or is empty, or the similarity is reduced.
        """
        if mask.shape != fixed.shape:
            raise ValueError(f"mask must have the shape of fixed, {tuple(fixed.shape)}, got {tuple(mask.shape)}.")
        inside = (mask > 0).flatten(1)
        count = inside.sum(dim=1)
        if not (count > 0).all():
            empty = torch.nonzero(count == 0).flatten().tolist()
            raise ValueError(f"mask must hold a voxel of every image, it is empty for batch item(s) {empty}.")
        with torch.autocast(device_type=fixed.device.type, enabled=False):
            # float64 stays, for checks of gradients
            warped, fixed = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (warped, fixed))
            values = self.similarity(warped, fixed)
            if values.shape != fixed.shape:
                raise ValueError(
                    f"similarity must give a value for each voxel, shape {tuple(fixed.shape)}, got "
                    f'{tuple(values.shape)}; build it with reduction="none".'
                )
            # not a product: what is not finite outside must not come in
            return (values.flatten(1).where(inside, 0.0).sum(dim=1) / count).mean()


class StatesLoss(nn.Module):
    """Loss at the final state plus the weighted sum of the losses at the intermediate states (paper, Eq. 4 and Eq. 9).

    Args:
        loss: loss of ``(warped, fixed, ddf)``, e.g. :py:class:`RegistrationLoss`.
        gamma: weight of each intermediate state: one number for all (Eq. 9), one number for each, or ``"exponential"``:
            ``w_t = 10^((t - 1) / (T - 1))`` of RIIR (Eq. 4), divided by that of the final state, which is one here.
            Defaults to 0.5.
        checkpointed: keep only the arguments of each loss for the backward pass, and evaluate it again there: the
            memory of one loss instead of that of all states. Defaults to ``False``.
        mask_key: key of the fixed image's mask in the target, a fourth argument of ``loss``. Defaults to ``None``:
            none.

    Raises:
        ValueError: When a weight is negative, or a text other than ``"exponential"``.
    """

    def __init__(
        self,
        loss: nn.Module,
        gamma: float | Sequence[float] | str = 0.5,
        checkpointed: bool = False,
        mask_key: str | None = None,
    ) -> None:
        super().__init__()
        self.loss = loss
        self.mask_key = mask_key
        #: keys of what the target must have beside the images
        self.target_keys = () if mask_key is None else (mask_key,)
        if isinstance(gamma, str) and gamma != "exponential":
            raise ValueError(f'gamma must be numbers or "exponential", got {gamma!r}.')
        self.gamma = gamma
        self.checkpointed = checkpointed
        if any(w < 0 for w in self.weights(len(gamma) if isinstance(gamma, Sequence) else 1)):
            raise ValueError(f"gamma must not be negative, got {gamma}.")

    def weights(self, num_states: int) -> list[float]:
        """Weights of so many intermediate states; a ``ValueError`` when ``gamma`` is a sequence of another length."""
        if isinstance(self.gamma, str):
            return [10.0 ** (t / num_states - 1) for t in range(num_states)]
        if not isinstance(self.gamma, Sequence):
            return [float(self.gamma)] * num_states
        if len(self.gamma) != num_states:
            raise ValueError(f"gamma has {len(self.gamma)} weights for {num_states} intermediate states.")
        return [float(w) for w in self.gamma]

    def forward(
        self, prediction: tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]], target: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """The loss, a scalar.

        Args:
            prediction: ``(warped, ddf, states)`` as a registration network in training mode returns it.
            target: ``{"fixed": ..., "moving": ...}``, each ``(B, 1, *spatial)``, with the mask where ``mask_key`` says.

        Raises:
            ValueError: When the prediction is not of that form.
            KeyError: When the target lacks the mask.
        """
        if len(prediction) != 3:
            raise ValueError(
                f"prediction must be (warped, ddf, states), got {len(prediction)} parts: is the network in eval mode?"
            )
        warped, ddf, states = prediction
        fixed, moving = target["fixed"], target["moving"]
        if self.mask_key is not None and self.mask_key not in target:
            raise KeyError(f"StatesLoss finds no mask {self.mask_key!r} in the target, which has {sorted(target)}.")
        mask = () if self.mask_key is None else (target[self.mask_key],)
        total = self._run(self.loss, warped, fixed, ddf, *mask)
        for weight, state in zip(self.weights(len(states)), states, strict=True):
            total = total + weight * self._run(self._at_state, moving, fixed, state, *mask)
        return total

    def _at_state(
        self, moving: torch.Tensor, fixed: torch.Tensor, ddf: torch.Tensor, *mask: torch.Tensor
    ) -> torch.Tensor:
        return self.loss(warp_by_ddf(moving, ddf), fixed, ddf, *mask)  # type: ignore[no-any-return]

    def _run(self, func: Callable[..., torch.Tensor], *args: torch.Tensor) -> torch.Tensor:
        if self.checkpointed and torch.is_grad_enabled():
            return checkpoint(func, *args, use_reentrant=False)  # type: ignore[no-any-return]
        return func(*args)
