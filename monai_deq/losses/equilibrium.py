# SPDX-License-Identifier: Apache-2.0
"""The contraction: a penalty that makes a learned map come to rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn

from monai_deq.networks.nets import DEQRegistrationNet, RestSettings
from monai_deq.solvers import random_smooth_ddf
from monai_deq.utils import process_count, process_rank

__all__ = ["EquilibriumLoss"]

#: largest RMS length in voxels and largest smoothness of a change
_RMS, _SMOOTHNESS = 3.0, 8.0
#: smallest length of a change by the largest; of much smaller ones a map under bfloat16 autocast gives rounding errors
_SMALLEST = 1 / 30
#: smallest smoothness of a change by the largest: single voxels may alternate where smooth changes die out
_FINEST = 1 / 16


class EquilibriumLoss(nn.Module):
    """A training loss with a penalty on the map ``g`` itself, with full steps, at the displacement ``x`` that the
    network has returned: the mean over voxels of ``|g(x + e) - g(x)|^2 / |e|^2``. Two iterations that stand apart come
    together, so that they end in the same place wherever they began. Not in the paper.

    ``e`` is a random smooth displacement whose RMS length is drawn log-uniformly up to 3 voxels; a share
    ``contraction_along_step`` of the draws takes the step ``g(x) - x`` itself, made longer: after many steps it points
    along the change that dies out slowest. ``g(x)`` and ``x`` count as given. Several processes draw what one would for
    the items of all, dealt out in turn. Costs an evaluation of the map with its backward pass and one without.

    Args:
        loss: loss of ``(prediction, target)``, e.g. :py:class:`monai_deq.losses.StatesLoss`.
        network: the network that is trained; without ``rest`` any.
        rest: ``contraction_weight`` and ``contraction_along_step``. Defaults to ``None``: no penalty.
        seed: of ``e``; the generator's state is in ``state_dict()``, for a training that is resumed. Defaults to 0.

    Raises:
        ValueError: When the penalty is asked for and the network has a hidden state or is no DEQ network.
    """

    def __init__(self, loss: nn.Module, network: nn.Module, rest: RestSettings | None = None, seed: int = 0) -> None:
        super().__init__()
        rest = rest or RestSettings(enabled=False)
        if rest.contraction_weight and (not isinstance(network, DEQRegistrationNet) or network.hidden_channels):
            raise ValueError(
                "network: the contraction is for a DEQRegistrationNet of the displacement alone, "
                f"{type(network).__name__} has another map or a hidden state."
            )
        self.loss = loss
        self.rest = rest
        # not a submodule: its parameters are not this module's
        self._network: tuple[Any] = (network,)
        # not the global one, from which loaders with workers draw more than those without
        self.generator = torch.Generator().manual_seed(seed)

    def get_extra_state(self) -> dict[str, Any]:
        """State of the random numbers, for ``state_dict()``."""
        return {"generator": self.generator.get_state()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore what :py:meth:`get_extra_state` returned."""
        self.generator.set_state(state["generator"])

    def forward(self, prediction: Any, target: dict[str, torch.Tensor]) -> torch.Tensor:
        """The loss, a scalar.

        Args:
            prediction: ``(warped, ddf, ...)``, what the network returned.
            target: ``{"fixed": ..., "moving": ...}``, each ``(B, 1, *spatial)``; with a proximal term and coarser
                levels also ``"proximal_center"``, or the penalty solves for it.
        """
        total: torch.Tensor = self.loss(prediction, target)
        if not self.rest.contraction_weight:
            return total
        center = {k: target[k] for k in ("proximal_center",) if k in target}
        g = self._network[0].fixed_point_map(target["moving"], target["fixed"], relaxation=1.0, **center)
        return total + self.rest.contraction_weight * self._contraction(g, prediction[1].detach())

    def _contraction(self, g: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        low, high, kind = torch.rand(3, generator=self.generator).tolist()
        seed = int(torch.randint(2**31, (1,), generator=self.generator))
        length = _RMS * _SMALLEST**low
        with torch.no_grad():
            gx = g(x)
        if kind < self.rest.contraction_along_step:
            step = gx - x
            longest = step.norm(dim=1).flatten(1).amax(dim=1).clamp_min(torch.finfo(step.dtype).tiny)
            e = step * (length / longest).reshape(-1, *[1] * (x.ndim - 1))
        else:
            smoothness, shape = _SMOOTHNESS * _FINEST**high, (1, *x.shape[1:])
            # one for each item of the batch of all processes: they draw what one process with that batch draws
            seeds = [seed + i * process_count() + process_rank() for i in range(len(x))]
            e = torch.cat([random_smooth_ddf(shape, length, smoothness, s, x.device) for s in seeds]).to(x)
        # a map that has stopped for good takes no step
        size = _mean_square(e)
        return (_mean_square(g(x + e) - gx) / size.where(size > 0, 1.0)).mean()


def _mean_square(ddf: torch.Tensor) -> torch.Tensor:
    """Mean over voxels of the squared length, per item."""
    return ddf.square().sum(dim=1).flatten(1).mean(dim=1)
