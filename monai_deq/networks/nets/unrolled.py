# SPDX-License-Identifier: Apache-2.0
"""Registration by a fixed number of steps of a learned update, coarse to fine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from operator import index
from typing import Any

import torch
import torch.nn as nn

from monai_deq.networks.blocks import UNetUpdate
from monai_deq.networks.nets.interface import IteratedNet, check_pair
from monai_deq.networks.nets.iteration import downsample, hidden_channels, initial_state, state_map, upsample_state
from monai_deq.solvers import SolverRecord, SolverSettings, solve_fixed_point

__all__ = ["UnrolledRegistrationNet"]


class UnrolledRegistrationNet(IteratedNet):
    """Deformable registration by a fixed schedule of steps of a learned update, trained by back-propagation through
    time (paper, Eq. 3-4): RIIR with one level, GraDIRN and Unrolling with three, VoxelMorph with a single step.

    From ``phi_0 = 0`` on the coarsest level the displacement is iterated by ``g(phi) = phi + f_theta(moving, fixed,
    phi)``; from level to level, each twice the size of the one before, it is interpolated and its values doubled.

    Args:
        update: module ``f(moving, fixed, ddf) -> delta``, or with an attribute ``hidden_channels`` ``f(moving, fixed,
            ddf, hidden) -> (delta, hidden)``, for all levels, or a sequence of one for each from coarse to fine.
            Defaults to :py:class:`monai_deq.networks.blocks.UNetUpdate`.
        spatial_dims: 2 or 3, for the default update. Defaults to 3.
        steps: number of steps on each level, from coarse to fine. Defaults to 6 on one level.
        all_states: return the states before the last one too in training, at full size, for a loss on all of them (Eq.
            4). Defaults to ``False``: ``states`` is empty (``w_t = 0``).

    Raises:
        ValueError: When steps and updates do not fit each other.

    Example:

    .. code-block:: python

        net = UnrolledRegistrationNet([GradientUpdate(3) for _ in range(3)], steps=[3, 3, 3]).eval()
        warped, ddf = net(moving, fixed)  # (B, 1, H, W, D) and (B, 3, H, W, D)
    """

    def __init__(
        self,
        update: nn.Module | Sequence[nn.Module] | None = None,
        spatial_dims: int = 3,
        steps: int | Sequence[int] = 6,
        all_states: bool = False,
    ) -> None:
        super().__init__()
        try:
            self.steps = tuple(index(n) for n in (steps if isinstance(steps, Sequence) else [steps]))
        except TypeError:
            self.steps = ()
        if not self.steps or min(self.steps) < 1:
            raise ValueError(
                f"steps must be a whole number of at least 1, or one for each of the levels, got {steps!r}."
            )
        update = UNetUpdate(spatial_dims) if update is None else update
        alone = isinstance(update, nn.Module) and not isinstance(update, nn.ModuleList)
        updates: list[nn.Module] = [update] if alone else list(update)  # type: ignore[list-item,arg-type]
        if len(updates) not in (1, len(self.steps)):
            raise ValueError(
                f"update must be one module or one for each of the {len(self.steps)} levels, got {len(updates)}."
            )
        widths = sorted({hidden_channels(u) for u in updates})
        if len(widths) > 1:
            raise ValueError(f"all updates must have hidden states of the same number of channels, got {widths}.")
        self.updates = nn.ModuleList(updates)
        self.hidden_channels = widths[0]
        self.all_states = all_states
        self.coarse = None
        #: of the finest level: all its steps
        self.solver = SolverSettings(max_steps=self.steps[-1], tolerance=0.0)

    def _update(self, level: int) -> nn.Module:
        return self.updates[min(level, len(self.updates) - 1)]

    def _pyramid(self, image: torch.Tensor) -> list[torch.Tensor]:
        """The image on each level, from coarse to fine."""
        images = [image]
        while len(images) < len(self.steps):
            images.insert(0, downsample(images[0]))
        return images

    def _start(
        self, movings: list[torch.Tensor], fixeds: list[torch.Tensor], initial_ddf: torch.Tensor | None
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """State from which the finest level starts, and the states of the levels before it."""
        if initial_ddf is not None:
            return initial_state(fixeds[-1], initial_ddf, self.hidden_channels), []
        state = initial_state(fixeds[0], None, self.hidden_channels)
        states = []
        for level, n in enumerate(self.steps[:-1]):
            g = state_map(self._update(level), movings[level], fixeds[level])
            for _ in range(n):
                state = g(state)
                states.append(state)
            state = upsample_state(state, fixeds[level + 1].shape[2:])
            if not getattr(self._update(level), "carries_hidden", True):
                ndim = state.ndim - 2
                state = torch.cat([state[:, :ndim], torch.zeros_like(state[:, ndim:])], dim=1)
        return state, states

    def _full_size(self, state: torch.Tensor, level: int, fixeds: list[torch.Tensor]) -> torch.Tensor:
        """Displacement of a state of a level on the full grid."""
        ddf = state[:, : state.ndim - 2]
        for fixed in fixeds[level + 1 :]:
            ddf = upsample_state(ddf, fixed.shape[2:])
        return ddf

    @property
    def update(self) -> nn.Module | list[nn.Module]:
        """The update, or those of the levels from coarse to fine."""
        return self.updates[0] if len(self.updates) == 1 else list(self.updates)

    def fixed_point_map(  # type: ignore[override]
        self, moving: torch.Tensor, fixed: torch.Tensor
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """The map of the finest level, see :py:meth:`IteratedNet.fixed_point_map`. Nothing in the training of an
        unrolled network makes its iteration come to rest; this serves to see whether it does.
        """
        check_pair(moving, fixed)
        return state_map(self._update(len(self.steps) - 1), moving, fixed)

    def solve_state(
        self, moving: torch.Tensor, fixed: torch.Tensor, initial_ddf: torch.Tensor | None = None, **changes: Any
    ) -> tuple[torch.Tensor, SolverRecord]:
        """Run the schedule, see :py:meth:`IteratedNet.solve_state`: ``changes`` and the record are of the finest level,
        whose number of steps is free. With ``initial_ddf`` the coarser levels are left out.
        """
        g = self.fixed_point_map(moving, fixed)
        with torch.no_grad():
            state, _ = self._start(self._pyramid(moving), self._pyramid(fixed), initial_ddf)
        ddf_channels = fixed.ndim - 2 if self.hidden_channels else None
        state, record = solve_fixed_point(g, state, self.solver.changed(**changes), ddf_channels)
        # a size that was left out is there with no step: records of one network are alike
        levels = [n if initial_ddf is None else 0 for n in self.steps[-2::-1]]
        return state, replace(record, coarse_steps=tuple(torch.full_like(record.steps, n) for n in levels))

    def training_states(  # type: ignore[override]
        self, moving: torch.Tensor, fixed: torch.Tensor, initial_ddf: torch.Tensor | None = None
    ) -> list[torch.Tensor]:
        """The displacements of all steps at full size, or the final one alone; see :py:meth:`solve_state`."""
        g, fixeds = self.fixed_point_map(moving, fixed), self._pyramid(fixed)
        state, states = self._start(self._pyramid(moving), fixeds, initial_ddf)
        for _ in range(self.steps[-1]):
            state = g(state)
            states.append(state)
        ddf = state[:, : fixed.ndim - 2]
        # a warm start leaves the coarser levels out
        levels = [level for level, n in enumerate(self.steps) for _ in range(n)][-len(states) :]
        earlier = zip(states[:-1], levels, strict=False) if self.all_states else ()
        return [*(self._full_size(s, level, fixeds) for s, level in earlier), ddf]
