# SPDX-License-Identifier: Apache-2.0
"""One step down the registration energy, as an update with a hidden state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import log

import torch
import torch.nn as nn
import torch.nn.functional as F

from monai_deq.networks.blocks.filters import central_difference, gaussian_reach, gaussian_smooth, in_slabs
from monai_deq.networks.blocks.similarities import LocalCorrelationLoss, similarity_and_gradient, value_and_gradient
from monai_deq.networks.blocks.updates import RegistrationUpdate
from monai_deq.networks.blocks.warping import check_ddf, warp_by_ddf

__all__ = ["EnergyUpdate"]

#: decay of the averages of the gradient and of its square
_MOMENTS = (0.9, 0.99)
#: least root of the second moment, as share of its mean over the image: where nothing pulls, nothing runs away
_FLOOR = 0.3
#: gradients below this are none
_NOTHING = 1e-12
#: after so many steps without a lower energy the steps become half as long
_PATIENCE = 5
#: unit of counters in the hidden state, which they then do not keep from being at rest
_COUNT = 2.0**-14


def _difference_energy(ddf: torch.Tensor, spacing: Sequence[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean over the components of the squared differences of neighbours, summed over the axes, at each voxel ``(B, 1,
    *spatial)``, and the gradient of their sum; the displacement in the unit of the spacing.
    """
    value, gradient = torch.zeros_like(ddf[:, :1]), torch.zeros_like(ddf)
    for axis, size in enumerate(spacing, start=2):
        n = ddf.shape[axis]
        if n > 1:
            step = (ddf.narrow(axis, 1, n - 1) - ddf.narrow(axis, 0, n - 1)) / size
            value.narrow(axis, 0, n - 1).add_(step.square().mean(dim=1, keepdim=True))
            step = step * (2 / size / ddf.shape[1])
            gradient.narrow(axis, 1, n - 1).add_(step)
            gradient.narrow(axis, 0, n - 1).sub_(step)
    return value, gradient


class EnergyUpdate(RegistrationUpdate):
    """A step of the descent on ``similarity(moving o phi, fixed) + weight * smoothness(ddf)`` (paper, Eq. 1-2), without
    anything to learn: ``phi' = phi o (id + v)`` with ``v = -step * m / sqrt(s)``, where ``m`` and ``s`` are averages of
    ``G`` and ``|G|^2`` over the steps (Adam's moments, ``s`` one number a voxel), and ``G`` is the gradient of the
    energy with respect to a small displacement on the inside, smoothed by a Gaussian. When the energy has not fallen
    for five steps, those of the pair become half as long: the iteration comes to rest. Images alike give exactly no
    displacement.

    The hidden state has ``m``, ``s``, and a channel whose first numbers are those of the item.

    Args:
        spatial_dims: 2 or 3. Defaults to 3.
        similarity: loss of ``(warped, fixed)``, or of ``(warped, fixed, mask)`` where a mask is given, a mean. Defaults
            to :py:class:`LocalCorrelationLoss`.
        weight: ``lambda``. Defaults to 0.4, chosen for brains.
        smoothness: loss of ``ddf``, a mean. Defaults to ``None``: the diffusion energy, mean squared differences of
            neighbours, summed over the axes (MONAI's takes every other voxel).
        sigma: standard deviation of the Gaussian, in the unit of the spacing. Defaults to 1.5.
        step: longest step in the unit of the spacing. Defaults to 0.5.
        spacing: size of a voxel along each axis, in units of a typical one. Defaults to ``None``: 1.

    Raises:
        ValueError: When an argument is out of its range.
    """

    #: whether the hidden state is of use at the next size: gradients are in other units there
    carries_hidden = False

    def __init__(
        self,
        spatial_dims: int = 3,
        similarity: nn.Module | None = None,
        weight: float = 0.4,
        smoothness: nn.Module | None = None,
        sigma: float = 1.5,
        step: float = 0.5,
        spacing: Sequence[float] | None = None,
    ) -> None:
        super().__init__(spatial_dims)
        for name, value in (("weight", weight), ("sigma", sigma)):
            if not value >= 0:
                raise ValueError(f"{name} must not be negative, got {value}.")
        if not step > 0:
            raise ValueError(f"step must be above zero, got {step}.")
        if spacing is not None and (len(spacing) != spatial_dims or not min(spacing) > 0):
            raise ValueError(f"spacing must be {spatial_dims} numbers above zero, got {list(spacing)}.")
        self.similarity = LocalCorrelationLoss() if similarity is None else similarity
        self.weight, self.smoothness = float(weight), smoothness
        self.sigma, self.step = float(sigma), float(step)
        self.spacing = None if spacing is None else [float(s) for s in spacing]
        self.hidden_channels = spatial_dims + 2

    def forward(
        self,
        moving: torch.Tensor,
        fixed: torch.Tensor,
        ddf: torch.Tensor,
        hidden: torch.Tensor,
        mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See :py:class:`RegistrationUpdate`; ``mask`` ``(B, 1, *spatial)`` of the fixed image for the similarity."""
        return self.at(moving, fixed, mask)(ddf, hidden)

    def at(
        self, moving: torch.Tensor, fixed: torch.Tensor, mask: torch.Tensor | None = None
    ) -> Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
        """The update of a batch of pairs, a function of ``(ddf, hidden)``; what the steps share is done once."""
        if fixed[0].numel() < 6:
            raise ValueError(f"an image must have at least 6 voxels, got shape {tuple(fixed.shape)}.")
        bound = self._bound(moving, fixed, mask)

        def update(ddf: torch.Tensor, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            check_ddf(fixed, ddf)
            expected = (ddf.shape[0], self.hidden_channels, *ddf.shape[2:])
            if tuple(hidden.shape) != expected:
                raise ValueError(f"hidden must have shape {expected}, got {tuple(hidden.shape)}.")
            with torch.autocast(ddf.device.type, enabled=False):
                return self._move(ddf, hidden, *bound(ddf))

        return update

    def gradient_at(
        self, moving: torch.Tensor, fixed: torch.Tensor, mask: torch.Tensor | None = None
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """The smoothed gradient ``G`` of each pair, ``(B, ndim, *spatial)``, as a function of the displacement,
        differentiable; zero where the descent is at rest. For the arguments see :py:meth:`at`.
        """
        bound = self._bound(moving, fixed, mask)
        return lambda ddf: bound(ddf)[1]

    def _bound(
        self, moving: torch.Tensor, fixed: torch.Tensor, mask: torch.Tensor | None
    ) -> Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
        """The energy and its smoothed gradient as a function of the displacement, without autocast."""
        moving, fixed = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (moving, fixed))
        with torch.autocast(fixed.device.type, enabled=False):
            image, similarity = similarity_and_gradient(self.similarity, moving, fixed, mask)

        def energy_and_gradient(ddf: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            with torch.autocast(ddf.device.type, enabled=False):
                warped = self._warped(image, ddf)
                return self._gradient(ddf, *similarity(warped), warped)

        return energy_and_gradient

    def energy_at(
        self, moving: torch.Tensor, fixed: torch.Tensor, mask: torch.Tensor | None = None
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """The energy of each pair, ``(B,)``, without gradient, as a function of the displacement; see :py:meth:`at`."""
        spacing = self.spacing or [1.0] * self.spatial_dims
        with torch.no_grad(), torch.autocast(fixed.device.type, enabled=False):
            image, similarity = similarity_and_gradient(self.similarity, moving, fixed, mask)

        def energy(ddf: torch.Tensor) -> torch.Tensor:
            with torch.no_grad(), torch.autocast(fixed.device.type, enabled=False):
                value = similarity(self._warped(image, ddf))[0]
                if self.smoothness is not None:
                    return value + self.weight * torch.stack([v.reshape(()) for v in self._roughness(ddf)])
                ddf = ddf * self._per_axis(ddf, spacing)
                (rough,) = in_slabs(lambda part: _difference_energy(part, spacing)[:1], [ddf], 1)
                return value + self.weight * rough.flatten(1).mean(dim=1)

        return energy

    def _roughness(self, ddf: torch.Tensor) -> list[torch.Tensor]:
        """The smoothness loss that was given, item by item."""
        assert self.smoothness is not None
        return [self.smoothness(item) for item in ddf.split(1)]

    @staticmethod
    def _warped(image: torch.Tensor, ddf: torch.Tensor) -> torch.Tensor:
        """The warped image; where nothing moves the image itself, as sampling rounds."""
        warped = warp_by_ddf(image, ddf)
        still = (ddf == 0).all(dim=1, keepdim=True)
        return torch.where(still, warped + (image - warped).detach(), warped)

    def _gradient(
        self, ddf: torch.Tensor, energy: torch.Tensor, pull: torch.Tensor, warped: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The energy and its smoothed gradient, from the similarity and its gradient."""
        spacing = self.spacing or [1.0] * self.spatial_dims
        size = self._per_axis(ddf, spacing)
        given: list[torch.Tensor] = []
        if self.smoothness is not None:
            value, stress = value_and_gradient(self._roughness, ddf)
            energy, given = energy + self.weight * value, [stress]

        def force(
            ddf: torch.Tensor, pull: torch.Tensor, warped: torch.Tensor, *given: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor]:
            parts = [
                (pull * central_difference(warped, axis)).sum(dim=1, keepdim=True) for axis in range(self.spatial_dims)
            ]
            value = torch.zeros_like(pull[:, :1])
            if self.weight:
                if given:
                    stress = given[0]
                else:
                    value, stress = _difference_energy(ddf * size, spacing)
                    stress = stress * size
                # a displacement v on the inside changes the field by v + (grad ddf) v
                for axis, part in enumerate(parts):
                    turned = (central_difference(ddf, axis) * stress).sum(dim=1, keepdim=True)
                    parts[axis] = part + self.weight * (stress[:, axis : axis + 1] + turned)
            gradient = gaussian_smooth(torch.cat(parts, dim=1) / size, [self.sigma / s for s in spacing])
            # what is next to nothing, squared, would be a denormal number, with which processors are slow
            return value, F.hardshrink(gradient, _NOTHING)

        halo = gaussian_reach(self.sigma / spacing[0]) + 1
        value, gradient = in_slabs(force, [ddf, pull, warped, *given], halo)
        return energy + self.weight * value.flatten(1).mean(dim=1), gradient

    @staticmethod
    def _per_axis(like: torch.Tensor, values: Sequence[float]) -> torch.Tensor:
        return like.new_tensor(values).view(1, -1, *[1] * (like.ndim - 2))

    def _move(
        self, ddf: torch.Tensor, hidden: torch.Tensor, energy: torch.Tensor, gradient: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The step along a smoothed gradient, and the hidden state after it."""
        ndim, shape = self.spatial_dims, (-1, *[1] * (ddf.ndim - 1))
        first, second, control = hidden.split([ndim, 1, 1], dim=1)
        age, best, waited, lost = self._read(control)
        with torch.no_grad():
            now = energy.detach()
            # at the first step there is nothing to be lower than
            lower = (now < best) | (age == 0)
            waited = torch.where(lower, torch.zeros_like(waited), waited + 1)
            best = torch.where(lower, now, best)
            late = waited >= _PATIENCE
            lost = torch.where(late, (1 + lost) / 2, lost)
            waited = torch.where(late, torch.zeros_like(waited), waited)
            # shares of the averages that are filled: 1 - decay^k after k steps
            slow = 1 - (1 - age) * _MOMENTS[1]
            quick = 1 - (1 - slow).clamp(min=0) ** (log(_MOMENTS[0]) / log(_MOMENTS[1]))

        def average(
            gradient: torch.Tensor, first: torch.Tensor, second: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            square = gradient.square().mean(dim=1, keepdim=True)
            return torch.lerp(gradient, first, _MOMENTS[0]), torch.lerp(square, second, _MOMENTS[1]), square

        first, second, square = in_slabs(average, [gradient, first, second])
        slope = (square.detach().flatten(1).mean(dim=1) * ndim).sqrt()
        floor = _FLOOR**2 * second.flatten(1).mean(dim=1).view(shape)

        def bounded(first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor]:
            scale = (second + floor) / slow.view(shape)
            # what is zero stays zero, with its gradient
            scale = torch.where(scale > 0, scale, torch.ones_like(scale)).sqrt()
            step = first * (-(1 - lost) * self.step / quick).view(shape) / scale
            length = step.square().sum(dim=1, keepdim=True)
            step = step * (self.step / length.clamp(min=self.step**2).sqrt())
            return (step / self._per_axis(step, self.spacing or [1.0] * ndim),)

        (step,) = in_slabs(bounded, [first, second])
        delta = step + (warp_by_ddf(ddf, step) - ddf)
        control = self._write([slow, best, waited, lost, now, slope], control)
        return delta, torch.cat([first, second, control], dim=1)

    @staticmethod
    def _read(control: torch.Tensor) -> list[torch.Tensor]:
        """Share of the slow average that is filled, lowest energy, steps waited, share of the step length lost."""
        slow, best, waited, lost = control.detach().flatten(1)[:, :4].clone().unbind(dim=1)
        return [slow / _COUNT, best, waited / _COUNT, lost / _COUNT]

    @staticmethod
    def _write(numbers: list[torch.Tensor], control: torch.Tensor) -> torch.Tensor:
        slow, best, waited, lost, now, slope = numbers
        row = torch.stack([slow * _COUNT, best, waited * _COUNT, lost * _COUNT, now, slope], dim=1)
        flat = F.pad(row, (0, control[0].numel() - row.shape[1]))
        return flat.view(control.shape).to(control.dtype)

    @staticmethod
    def measured(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of a hidden state: the energy where the last step began, and its slope there, the RMS over voxels of ``|G|``;
        ``(B,)`` each.
        """
        # copies: views would keep the whole state in memory
        energy, slope = hidden[:, -1].flatten(1)[:, 4:6].clone().unbind(dim=1)
        return energy, slope
