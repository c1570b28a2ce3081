# SPDX-License-Identifier: Apache-2.0
"""Base of the systems without anything to train."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn as nn

from monai_deq.networks.blocks import warp_by_ddf
from monai_deq.solvers import SolverRecord

__all__ = ["ClassicalRegistration"]


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
