# SPDX-License-Identifier: Apache-2.0
"""Penalties that make a learned map come to rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn

from monai_deq.networks import is_compiled
from monai_deq.solvers import random_smooth_ddf
from monai_deq.utils import process_count, process_rank

__all__ = ["EquilibriumLoss"]

#: smallest length of a change by the largest; of much smaller ones a map under bfloat16 autocast gives rounding errors
_SMALLEST = 1 / 30
#: smallest smoothness of a change by the largest: single voxels may alternate where smooth changes die out
_FINEST = 1 / 16


class EquilibriumLoss(nn.Module):
    """
    A training loss with penalties on the map ``g`` itself, with full steps (``relaxation`` 1), at the displacement
    ``x`` that the network has returned:

    - residual: mean over voxels of ``|g(x) - x|^2``, in squared voxels: the map stands still there.
    - Jacobian: Hutchinson's estimate of ``|dg/dx|_F^2`` over the number of its rows, as TorchDEQ's: small changes
      die out, in all directions alike.
    - contraction: mean over voxels of ``|g(x + e) - g(x)|^2 / |e|^2`` for a random smooth displacement ``e`` whose RMS
      length is drawn log-uniformly between a thirtieth of ``contraction_rms`` and itself. Two iterations that stand
      apart come together, so that they end in the same place wherever they began. Hutchinson's white noise says little
      of smooth changes, which are those that an iteration is slow to forget. ``g(x)`` counts as given. A share
      ``contraction_along_step`` of the draws takes for ``e`` the step ``g(x) - x`` itself, made longer: after many
      steps it points along the change that dies out slowest, which random ones seldom meet.
    - agreement: mean over voxels of ``|g(x) - g(y)|^2 / (|x - y|^2 + agreement_rms^2)`` for the displacements ``x``
      and ``y`` that the iterations of one pair have come to from different starts. Random changes seldom meet the few
      directions in which a map has two solutions; the difference of two iterations that have settled there is such a
      direction. Differences far below ``agreement_rms`` count little. The items ``2 i`` and ``2 i + 1`` of a batch must
      be the same pair, see ``starts`` of :py:class:`monai_deq.data.PooledPairSampler`.

    Of several processes each draws the same lengths, and displacements and noise of its own, those that one process
    would draw for the items of all, dealt out in turn.

    The map is evaluated aside from the network's ``forward``. With ``DistributedDataParallel`` around the network that
    is called, the gradients of both are averaged: the loss is one graph with one backward pass, in which PyTorch hands
    each parameter the sum of all its gradients at once, and that is when they are sent.

    No gradient goes through ``x``. Each penalty costs one more evaluation of the map with its backward pass; residual,
    Jacobian and agreement share one, the Jacobian needs a backward pass of second order, and the contraction a further
    evaluation without gradients. The paper has none of these.

    Args:
        loss: loss of ``(prediction, target)``, e.g. :py:class:`monai_deq.losses.StatesLoss`.
        network: the network that is trained; for the penalties a
            :py:class:`monai_deq.networks.nets.DEQRegistrationNet` without a hidden state.
        residual_weight: weight of the residual. Defaults to 0.
        jacobian_weight: weight of the Jacobian. Defaults to 0.
        contraction_weight: weight of the contraction. Defaults to 0.
        contraction_rms: largest RMS length of ``e`` in voxels. Defaults to 3.
        contraction_along_step: share of the draws, in [0, 1], in which ``e`` is parallel to the step; then it is the
            longest displacement of ``e`` whose length is drawn. Defaults to 0.
        contraction_smoothness: largest smoothness of ``e``, see :py:func:`monai_deq.solvers.random_smooth_ddf`; it is
            drawn log-uniformly between a sixteenth of this number and itself. Defaults to 8.
        agreement_weight: weight of the agreement. Defaults to 0.
        agreement_rms: RMS length in voxels of a difference that counts half. Defaults to 0.3.
        warmup_steps: number of calls in training mode over which the weights of the penalties rise linearly from
            zero. A network that has learned nothing yet meets all of them best by staying where it is. Defaults to 0.
        seed: of ``e`` and of the noise of the Jacobian. The state of its generator is in ``state_dict()`` with the
            number of calls, for a training that is resumed. Defaults to 0.

    Raises:
        ValueError: When a number is out of its range, a penalty is asked for and the network has a hidden state, or
            that on the Jacobian and the network is compiled.
    """

    def __init__(
        self,
        loss: nn.Module,
        network: nn.Module,
        residual_weight: float = 0.0,
        jacobian_weight: float = 0.0,
        contraction_weight: float = 0.0,
        contraction_rms: float = 3.0,
        contraction_smoothness: float = 8.0,
        contraction_along_step: float = 0.0,
        agreement_weight: float = 0.0,
        agreement_rms: float = 0.3,
        warmup_steps: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        weights = {
            "residual_weight": residual_weight,
            "jacobian_weight": jacobian_weight,
            "contraction_weight": contraction_weight,
            "agreement_weight": agreement_weight,
        }
        for name, value in weights.items():
            if not value >= 0:
                raise ValueError(f"{name} must not be negative, got {value}.")
        if not (contraction_rms > 0 and contraction_smoothness > 0):
            raise ValueError(
                "contraction_rms and contraction_smoothness must be above 0, got "
                f"{contraction_rms} and {contraction_smoothness}."
            )
        if not 0 <= contraction_along_step <= 1:
            raise ValueError(f"contraction_along_step must be in [0, 1], got {contraction_along_step}.")
        if not agreement_rms > 0:
            raise ValueError(f"agreement_rms must be above 0, got {agreement_rms}.")
        if int(warmup_steps) != warmup_steps or warmup_steps < 0:
            raise ValueError(f"warmup_steps must be a whole number, not negative, got {warmup_steps}.")
        if any(weights.values()) and int(getattr(network, "hidden_channels", 0)):
            raise ValueError(
                "network: the penalties are for maps of the displacement alone, this one has a hidden state."
            )
        self.loss = loss
        if jacobian_weight and is_compiled(network):
            raise ValueError(
                f"jacobian_weight {jacobian_weight} takes second derivatives, which torch.compile does not have: set "
                "compile to false, or jacobian_weight to 0."
            )
        # not a submodule: its parameters are not this module's
        self._network: tuple[Any] = (network,)
        self.residual_weight = residual_weight
        self.jacobian_weight = jacobian_weight
        self.contraction_weight = contraction_weight
        self.contraction_rms = contraction_rms
        self.contraction_smoothness = contraction_smoothness
        self.contraction_along_step = contraction_along_step
        self.agreement_weight = agreement_weight
        self.agreement_rms = agreement_rms
        self.warmup_steps = int(warmup_steps)
        #: number of calls in training mode
        self.calls = 0
        # not the global one, from which loaders with workers draw more than those without
        self.generator = torch.Generator().manual_seed(seed)

    def get_extra_state(self) -> dict[str, Any]:
        """State of the random numbers and number of calls, for ``state_dict()``."""
        return {"generator": self.generator.get_state(), "calls": self.calls}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """
        Args:
            state: what :py:meth:`get_extra_state` returned.
        """
        self.generator.set_state(state["generator"])
        self.calls = state["calls"]

    def _seeds(self, items: int) -> list[int]:
        """One for each item of the batch of all processes: they draw what one process with that batch draws."""
        seed = int(torch.randint(2**31, (1,), generator=self.generator))
        return [seed + i * process_count() + process_rank() for i in range(items)]

    def _jacobian(self, gx: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        noise = [torch.randn(x.shape[1:], generator=torch.Generator().manual_seed(s)) for s in self._seeds(len(x))]
        (product,) = torch.autograd.grad(gx, x, torch.stack(noise).to(gx), create_graph=True)
        return product.square().mean()

    def _contraction(self, g: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        low, high, kind = torch.rand(3, generator=self.generator).tolist()
        seeds = self._seeds(len(x))
        length = self.contraction_rms * _SMALLEST**low
        with torch.no_grad():
            gx = g(x)
        if kind < self.contraction_along_step:
            step = gx - x
            longest = step.norm(dim=1).flatten(1).amax(dim=1).clamp_min(torch.finfo(step.dtype).tiny)
            e = step * (length / longest).reshape(-1, *[1] * (x.ndim - 1))
        else:
            smoothness, shape = self.contraction_smoothness * _FINEST**high, (1, *x.shape[1:])
            e = torch.cat([random_smooth_ddf(shape, length, smoothness, s, x.device) for s in seeds]).to(x)
        # a map that has stopped for good takes no step
        size = _mean_square(e)
        return (_mean_square(g(x + e) - gx) / size.where(size > 0, 1.0)).mean()

    def forward(self, prediction: Any, target: dict[str, torch.Tensor]) -> torch.Tensor:
        """
        Args:
            prediction: ``(warped, ddf, ...)``, what the network returned.
            target: ``{"fixed": ..., "moving": ...}``, each ``(B, 1, *spatial)``; where the network has a proximal term
                and coarser levels also ``"proximal_center"``, or the penalties solve for it.

        Returns:
            The loss, a scalar.

        Raises:
            ValueError: When the agreement is asked for and the batch is not made of pairs given twice.
        """
        total = self.loss(prediction, target)
        at_x = (self.residual_weight, self.jacobian_weight, self.agreement_weight)
        if not (any(at_x) or self.contraction_weight):
            return total
        warmth = min(self.calls / self.warmup_steps, 1.0) if self.warmup_steps else 1.0
        self.calls += int(self.training)
        return total + warmth * self._penalties(prediction[1].detach(), target)

    def _penalties(self, x: torch.Tensor, target: dict[str, torch.Tensor]) -> torch.Tensor:
        total: Any = 0
        moving, fixed = target["moving"], target["fixed"]
        if self.agreement_weight and not (
            len(fixed) % 2 == 0 and torch.equal(fixed[::2], fixed[1::2]) and torch.equal(moving[::2], moving[1::2])
        ):
            raise ValueError(
                "agreement_weight: each pair must be in the batch twice in a row; give the PooledPairSampler 2 starts "
                "and the loader an even batch size."
            )
        center = {k: target[k] for k in ("proximal_center",) if k in target}
        g = self._network[0].fixed_point_map(moving, fixed, relaxation=1.0, **center)
        if self.jacobian_weight:
            x.requires_grad_()
        if self.residual_weight or self.jacobian_weight or self.agreement_weight:
            gx = g(x)
            total = total + self.residual_weight * _mean_square(gx - x.detach()).mean()
            if self.jacobian_weight:
                total = total + self.jacobian_weight * self._jacobian(gx, x)
            if self.agreement_weight:
                apart = _mean_square(x.detach()[::2] - x.detach()[1::2]) + self.agreement_rms**2
                total = total + self.agreement_weight * (_mean_square(gx[::2] - gx[1::2]) / apart).mean()
        if self.contraction_weight:
            total = total + self.contraction_weight * self._contraction(g, x.detach())
        return total  # type: ignore[no-any-return]


def _mean_square(ddf: torch.Tensor) -> torch.Tensor:
    """Mean over voxels of the squared length, per item."""
    return ddf.square().sum(dim=1).flatten(1).mean(dim=1)
