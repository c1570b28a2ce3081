# SPDX-License-Identifier: Apache-2.0
"""The images as they come: what any registration has to improve on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn as nn

from monai_deq.networks.blocks import warp_by_ddf
from monai_deq.networks.nets.iteration import check_pair, initial_state
from monai_deq.solvers import SolverRecord

__all__ = ["ClassicalRegistration", "InitialAlignment"]


class ClassicalRegistration(nn.Module, ABC):
    """
    Base of the baselines: a module without parameters that takes the place of a registration network in eval mode, so
    that the same inferer, metrics and tables serve it.

    A subclass gives ``solve`` and ``reason``, the word that its records carry for why an item stopped.
    """

    reason: str

    @abstractmethod
    def solve(
        self, moving: torch.Tensor, fixed: torch.Tensor, initial_ddf: torch.Tensor | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, SolverRecord]:
        """
        Register a batch of pairs.

        Args:
            moving: ``(B, 1, *spatial)``.
            fixed: ``(B, 1, *spatial)``.
            initial_ddf: displacement to start from, ``(B, ndim, *spatial)`` in voxels.
            kwargs: settings of a fixed-point solver (``solver``, ``max_steps``, ``tolerance``, ``relative_tolerance``,
                ``solver_options``). There is none here: they are ignored.

        Returns:
            The displacement ``(B, ndim, *spatial)`` in voxels and a record.
        """

    def forward(
        self, moving: torch.Tensor, fixed: torch.Tensor, initial_ddf: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            moving: ``(B, 1, *spatial)``, intensities in [0, 1].
            fixed: ``(B, 1, *spatial)``, intensities in [0, 1].
            initial_ddf: displacement to start from, ``(B, ndim, *spatial)`` in voxels. Defaults to none.

        Returns:
            ``(warped, ddf)``.

        Raises:
            RuntimeError: In training mode.
        """
        if self.training:
            raise RuntimeError(f"{type(self).__name__} has nothing to train: call eval() before using it.")
        ddf, _ = self.solve(moving, fixed, initial_ddf)
        return warp_by_ddf(moving, ddf), ddf

    def _record(self, batch_size: int) -> SolverRecord:
        """Record without a step of a fixed-point solver, and so without a residual."""
        nan = torch.full((batch_size, 1), float("nan"))
        return SolverRecord(
            steps=torch.zeros(batch_size, dtype=torch.long),
            residual=nan,
            relative_residual=nan.clone(),
            converged=torch.zeros(batch_size, dtype=torch.bool),
            reason=(self.reason,) * batch_size,
        )


class InitialAlignment(ClassicalRegistration):
    """
    No deformation at all: the images as they come, or under a given displacement.

    On data that was affinely aligned beforehand, as both data sets of the paper are, this is the row "Affine" of
    its Table 1. The records say ``"not iterated"``, with 0 steps and a residual of NaN.
    """

    reason = "not iterated"

    def solve(
        self, moving: torch.Tensor, fixed: torch.Tensor, initial_ddf: torch.Tensor | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, SolverRecord]:
        """
        Args:
            moving: ``(B, 1, *spatial)``.
            fixed: ``(B, 1, *spatial)``.
            initial_ddf: the displacement to hand back, ``(B, ndim, *spatial)`` in voxels. Defaults to zero.
            kwargs: settings of a fixed-point solver, ignored.

        Returns:
            The displacement ``(B, ndim, *spatial)``, in float32 at least, and the record.

        Raises:
            ValueError: When the images or the field do not fit each other.
        """
        check_pair(moving, fixed)
        return initial_state(fixed, initial_ddf), self._record(fixed.shape[0])
