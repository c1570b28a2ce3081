# SPDX-License-Identifier: Apache-2.0
"""Registration as the equilibrium of the energy itself: nothing to train."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from operator import index
from typing import Any

import torch
import torch.nn as nn

from monai_deq.networks.blocks import EnergyUpdate, LocalCorrelationLoss, remove_folds
from monai_deq.networks.nets.interface import IteratedNet, check_pair
from monai_deq.networks.nets.iteration import downsample, initial_state, state_map, upsample_state
from monai_deq.solvers import SolverRecord, SolverSettings, solve_fixed_point, solve_linear

__all__ = ["EnergyRegistrationNet", "energy_finish"]

#: voxels along the shortest axis that the coarsest size has at least
_LEAST_SIZE = 8


class EnergyRegistrationNet(IteratedNet):
    """Deformable registration by descent on the energy (paper, Eq. 1-2), from coarse to fine, without training: on each
    size the map of an :py:class:`monai_deq.networks.blocks.EnergyUpdate` is iterated, from zero on the smallest one and
    then from the solution of the one before; what folds at the end of a size is smoothed away
    (:py:func:`monai_deq.networks.blocks.remove_folds`).

    Its records have as ``measures`` the ``energy`` and its ``slope`` at each step of the full size, the number of
    voxels ``unfolded`` at the end and what that cost: ``energy_before_unfolding`` and ``energy_unfolded``.

    Args:
        update: the step. Defaults to ``EnergyUpdate(spatial_dims)``, whose settings were chosen for brains.
        spatial_dims: 2 or 3, for the default update. Defaults to 3.
        steps: step limit of each size, from the smallest, each half of the next; a size with an axis shorter than 8
            voxels is left out. Defaults to ``(60, 40, 6)`` in 3-D, where steps at full size are dear, and ``(60, 60,
            40)`` in 2-D.
        tolerance: RMS displacement of a step, in voxels of each size, at which a pair stops there. Defaults to 1e-3.
        least_jacobian: share of its value at rest that each one-sided Jacobian determinant of the result keeps at
            least: there are no folds, neither of central nor of one-sided differences. Defaults to 0.01; ``None``
            leaves the result as it is.
        features: network of an image ``(B, 1, *spatial)`` that gives further channels to compare, ``(B, C, *spatial)``,
            e.g. :py:class:`FeatureUNet`; the same for both images, at full size. Needs an update whose similarity takes
            them, :py:class:`monai_deq.networks.blocks.FeatureLoss`. Defaults to ``None``: images alone.
        gradient_steps: steps of the linear solve in the backward pass, by which a training of the features goes through
            the solution (implicit gradient: paper, Eq. 6; features learned so: Jena et al., Medical Image Analysis
            2025). Memory does not depend on the steps of the solver. Defaults to 20.

    Raises:
        ValueError: When an argument is out of its range.

    Example:

    .. code-block:: python

        net = EnergyRegistrationNet(spatial_dims=3).eval()
        warped, ddf = net(moving, fixed)  # (B, 1, H, W, D) and (B, 3, H, W, D)
    """

    def __init__(
        self,
        update: EnergyUpdate | None = None,
        spatial_dims: int = 3,
        steps: Sequence[int] | None = None,
        tolerance: float = 1e-3,
        least_jacobian: float | None = 0.01,
        features: nn.Module | None = None,
        gradient_steps: int = 20,
    ) -> None:
        super().__init__()
        self.features = features
        if not gradient_steps >= 1:
            raise ValueError(f"gradient_steps must be at least 1, got {gradient_steps}.")
        self.gradient_steps = int(gradient_steps)
        self.update = EnergyUpdate(spatial_dims) if update is None else update
        self.spatial_dims = self.update.spatial_dims
        if features is not None and isinstance(self.update.similarity, LocalCorrelationLoss):
            raise ValueError("features need an update whose similarity takes their channels, such as FeatureLoss().")
        if steps is None:
            steps = (60, 40, 6) if self.spatial_dims == 3 else (60, 60, 40)
        try:
            self.steps = tuple(index(n) for n in steps)
        except TypeError:
            self.steps = ()
        if not self.steps or min(self.steps) < 1:
            raise ValueError(f"steps must be a whole number of at least 1 for each size, got {steps!r}.")
        if least_jacobian is not None and not 0 <= least_jacobian < 1:
            raise ValueError(f"least_jacobian must be None or in [0, 1), got {least_jacobian}.")
        self.tolerance, self.least_jacobian = float(tolerance), least_jacobian
        self.hidden_channels = self.update.hidden_channels
        self.coarse = None
        #: of the full size
        self.solver = SolverSettings(max_steps=self.steps[-1], tolerance=self.tolerance)

    def fixed_point_map(  # type: ignore[override]
        self, moving: torch.Tensor, fixed: torch.Tensor, mask: torch.Tensor | None = None
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """The map of the full size, see :py:meth:`IteratedNet.fixed_point_map`.

        Args:
            moving: moving images.
            fixed: fixed images.
            mask: where the fixed images are compared, ``(B, 1, *spatial)``. Defaults to ``None``: everywhere.
        """
        self._check(moving, fixed, mask)
        return state_map(self.update, self._channels(moving), self._channels(fixed), mask)

    def training_states(  # type: ignore[override]
        self,
        moving: torch.Tensor,
        fixed: torch.Tensor,
        initial_ddf: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
    ) -> list[torch.Tensor]:
        """The solution, with its gradient with respect to the features; arguments as :py:meth:`solve_state`."""
        if self.features is None:
            return super().training_states(moving, fixed, initial_ddf)
        with torch.no_grad():
            state, _ = self.solve_state(moving, fixed, initial_ddf, mask)
        # once more: what the features keep for the backward pass is not there beside the memory of the solve
        pair = [self._channels(moving), self._channels(fixed), state[:, : self.spatial_dims]]
        items = zip(*(t.split(1) for t in (pair if mask is None else [*pair, mask])), strict=True)
        return [torch.cat([self._implicit(*item) for item in items])]

    def _implicit(
        self, moving: torch.Tensor, fixed: torch.Tensor, ddf: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The solution of one pair, with its gradient with respect to the channels ``c``: where ``G(ddf, c) = 0``, that
        of a loss is ``-v dG/dc`` with ``v dG/d ddf = d loss/d ddf``.
        """
        ddf = ddf.clone().requires_grad_()
        gradient = self.update.gradient_at(moving, fixed, mask)(ddf)

        def pulled_back(v: torch.Tensor) -> torch.Tensor:
            return torch.autograd.grad(gradient, ddf, v, retain_graph=True)[0]

        change = gradient - gradient.detach()
        change.register_hook(lambda grad: solve_linear(pulled_back, grad, self.gradient_steps))
        return ddf.detach() - change

    def _channels(self, image: torch.Tensor) -> torch.Tensor:
        """What is compared: the image, and its features behind it."""
        return image if self.features is None else torch.cat([image, self.features(image)], dim=1)

    def _check(self, moving: torch.Tensor, fixed: torch.Tensor, mask: torch.Tensor | None) -> None:
        """Refuse images that the network is not for."""
        check_pair(moving, fixed)
        if fixed.ndim - 2 != self.spatial_dims:
            raise ValueError(f"the network is for {self.spatial_dims}-D images, got shape {tuple(fixed.shape)}.")
        if mask is not None and mask.shape != fixed.shape:
            raise ValueError(f"mask must have the shape of fixed, {tuple(fixed.shape)}, got {tuple(mask.shape)}.")

    def solve_state(  # type: ignore[override]
        self,
        moving: torch.Tensor,
        fixed: torch.Tensor,
        initial_ddf: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        **changes: Any,
    ) -> tuple[torch.Tensor, SolverRecord]:
        """See :py:meth:`IteratedNet.solve_state`: ``changes`` and the record are of the full size. With ``initial_ddf``
        the smaller sizes are left out. For ``mask`` see :py:meth:`fixed_point_map`.
        """
        self._check(moving, fixed, mask)
        with torch.no_grad():
            images = [(self._channels(moving), self._channels(fixed), mask)]
            while initial_ddf is None and len(images) < len(self.steps):
                smaller = tuple(None if t is None else downsample(t) for t in images[0])
                if min(smaller[1].shape[2:]) < _LEAST_SIZE:  # type: ignore[union-attr]
                    break
                images.insert(0, smaller)  # type: ignore[arg-type]
        ddf, steps = initial_ddf, list[torch.Tensor]()
        for level, pair in enumerate(images):
            last = level == len(images) - 1
            settings = self.solver.changed(max_steps=self.steps[level - len(images)])
            state, record = self._solve_size(*pair, ddf, settings.changed(**changes) if last else settings)
            if not last:
                steps.insert(0, record.steps)
                ddf = upsample_state(state[:, : self.spatial_dims], images[level + 1][1].shape[2:])
        # a size that was left out is there with no step: records of one network are alike
        left_out = [torch.zeros_like(record.steps)] * (len(self.steps) - len(images))
        return state, replace(record, coarse_steps=(*steps, *left_out))

    def _solve_size(
        self,
        moving: torch.Tensor,
        fixed: torch.Tensor,
        mask: torch.Tensor | None,
        ddf: torch.Tensor | None,
        settings: SolverSettings,
    ) -> tuple[torch.Tensor, SolverRecord]:
        """The solution on one size, without folds, and its record."""
        g, ndim = state_map(self.update, moving, fixed, mask), self.spatial_dims
        measured = list[tuple[torch.Tensor, torch.Tensor]]()

        def noted(state: torch.Tensor) -> torch.Tensor:
            state = g(state)
            measured.append(self.update.measured(state[:, ndim:]))
            return state

        state, record = solve_fixed_point(noted, initial_state(fixed, ddf, self.hidden_channels), settings, ndim)
        # of the states that were left, not of the last one
        energy, slope = (torch.stack(values, dim=1).cpu() for values in zip(*measured, strict=True))
        stopped = torch.arange(energy.shape[1]) >= record.steps[:, None]
        measures = {"energy": energy.masked_fill(stopped, torch.nan), "slope": slope.masked_fill(stopped, torch.nan)}
        if self.least_jacobian is not None:
            flat, counts = remove_folds(state[:, :ndim], self.least_jacobian)
            measures["unfolded"] = counts
            before = after = torch.full_like(record.final_residual, torch.nan)
            if bool(counts.any()):
                energy_at = self.update.energy_at(moving, fixed, mask)
                before, after = energy_at(state[:, :ndim]), energy_at(flat)
                state = torch.cat([flat, state[:, ndim:]], dim=1)
            measures.update(energy_before_unfolding=before.cpu(), energy_unfolded=after.cpu())
        return state, replace(record, measures=measures)


def energy_finish(spatial_dims: int = 3, steps: int = 40, weight: float = 0.4) -> EnergyRegistrationNet | None:
    """What goes on by the energy from the solution of another method, at its size.

    Args:
        spatial_dims: 2 or 3. Defaults to 3.
        steps: step limit; ``None`` is returned for 0. Defaults to 40.
        weight: of the smoothness. Defaults to 0.4.
    """
    return EnergyRegistrationNet(EnergyUpdate(spatial_dims, weight=weight), steps=(steps,)).eval() if steps else None
