# SPDX-License-Identifier: Apache-2.0
"""What transforms, inferers, engines and certificates ask of a registration method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn

from monai_deq.networks.blocks import warp_by_ddf
from monai_deq.solvers import SolverRecord, SolverSettings

__all__ = ["IteratedNet", "RegistrationNet", "check_pair"]


def check_pair(moving: torch.Tensor, fixed: torch.Tensor) -> None:
    """Check a batch of pairs: ``(B, 1, *spatial)`` of the same size, floating point; or else a ``ValueError``."""
    if moving.shape != fixed.shape or moving.ndim not in (4, 5) or moving.shape[1] != 1:
        raise ValueError(
            "moving and fixed must have the same shape (B, 1, H, W[, D]), "
            f"got {tuple(moving.shape)} and {tuple(fixed.shape)}."
        )
    if not (moving.is_floating_point() and fixed.is_floating_point()):
        raise ValueError(
            f"moving and fixed must have floating point intensities in [0, 1], got {moving.dtype} and {fixed.dtype}."
        )


class RegistrationNet(nn.Module, ABC):
    """A registration method. ``net(moving, fixed)`` gives ``(warped, ddf)``, as
    :py:class:`monai.networks.nets.VoxelMorph`, in training mode ``(warped, ddf, states)``, ``states`` the displacements
    before the last one. ``net(pair)``, both images as the two channels of one tensor, gives the ddf alone, for tools
    that know networks of one argument only.
    """

    #: settings of :py:meth:`solve`
    solver = SolverSettings()

    @abstractmethod
    def solve(
        self, moving: torch.Tensor, fixed: torch.Tensor, initial_ddf: torch.Tensor | None = None, **changes: Any
    ) -> tuple[torch.Tensor, SolverRecord]:
        """Register without gradients.

        Args:
            moving: ``(B, 1, *spatial)``, intensities in [0, 1].
            fixed: ``(B, 1, *spatial)``, intensities in [0, 1].
            initial_ddf: displacement to start from, ``(B, ndim, *spatial)`` in voxels. Defaults to the method's own.
            changes: settings of :py:class:`monai_deq.solvers.SolverSettings` in place of ``self.solver``'s.

        Returns:
            The displacement ``(B, ndim, *spatial)`` and the record of the solve.
        """

    def training_states(
        self, moving: torch.Tensor, fixed: torch.Tensor, initial_ddf: torch.Tensor | None = None, **kwargs: Any
    ) -> list[torch.Tensor]:
        """The displacements that a training supervises, each ``(B, ndim, *spatial)`` with its gradient, the final one
        last; arguments as :py:meth:`solve`.
        """
        raise NotImplementedError(f"{type(self).__name__} has nothing to train.")

    def forward(
        self,
        moving: torch.Tensor,
        fixed: torch.Tensor | None = None,
        initial_ddf: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor | tuple[torch.Tensor, ...] | tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        """Register as the class says; arguments as :py:meth:`solve`, with ``moving`` alone ``(B, 2, *spatial)``, in
        training mode with ``kwargs`` of :py:meth:`training_states`.

        Raises:
            ValueError: When the shapes do not fit.
        """
        if fixed is None:
            if moving.ndim not in (4, 5) or moving.shape[1] != 2:
                raise ValueError(
                    f"a pair must have the shape (B, 2, H, W[, D]), moving and fixed, got {tuple(moving.shape)}."
                )
            moving, fixed = moving[:, :1], moving[:, 1:]
            return self.forward(moving, fixed, initial_ddf, **kwargs)[1]
        if not self.training:
            ddf, _ = self.solve(moving, fixed, initial_ddf, **kwargs)
            return warp_by_ddf(moving, ddf), ddf
        *states, ddf = self.training_states(moving, fixed, initial_ddf, **kwargs)
        return warp_by_ddf(moving, ddf), ddf, states


class IteratedNet(RegistrationNet):
    """A method that iterates a map ``g`` of the displacement, and may have a hidden state behind it."""

    #: channels of the hidden state
    hidden_channels = 0
    #: weight of the pull to the proximal centre
    proximal_weight = 0.0
    #: network of the same kind for half the size
    coarse: IteratedNet | None

    @abstractmethod
    def fixed_point_map(
        self, moving: torch.Tensor, fixed: torch.Tensor, **kwargs: Any
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """The map of a batch of pairs ``(B, 1, *spatial)``, a function of a state ``(B, ndim + hidden_channels,
        *spatial)``.
        """

    @abstractmethod
    def solve_state(
        self, moving: torch.Tensor, fixed: torch.Tensor, initial_ddf: torch.Tensor | None = None, **changes: Any
    ) -> tuple[torch.Tensor, SolverRecord]:
        """As :py:meth:`solve`, but the hidden state, which starts at zero, stays behind the displacement returned:
        ``(B, ndim + hidden_channels, *spatial)``.
        """

    def coarse_start(
        self, moving: torch.Tensor, fixed: torch.Tensor, initial_ddf: torch.Tensor | None = None
    ) -> tuple[torch.Tensor | None, tuple[torch.Tensor, ...]]:
        """Where the iteration starts, without gradients: the solutions of the coarser networks, each the start of the
        next.

        Args:
            moving: moving images.
            fixed: fixed images.
            initial_ddf: start of the coarsest network, with a proximal term of each, at full size. Defaults to zero.

        Returns:
            ``(B, ndim, *spatial)`` in voxels at full size, without a coarser network the argument itself; and the steps
            of the coarser solves, ``(B,)`` each, from the finest to the coarsest.
        """
        return initial_ddf, ()

    def solve(
        self, moving: torch.Tensor, fixed: torch.Tensor, initial_ddf: torch.Tensor | None = None, **changes: Any
    ) -> tuple[torch.Tensor, SolverRecord]:
        """See :py:meth:`RegistrationNet.solve`."""
        state, record = self.solve_state(moving, fixed, initial_ddf, **changes)
        # without the hidden state, which a view would keep in memory
        return state[:, : fixed.ndim - 2].clone() if self.hidden_channels else state, record
