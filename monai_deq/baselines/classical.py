# SPDX-License-Identifier: Apache-2.0
"""Systems without anything to train: their base, and the images as they come."""

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
    Base of the baselines: a module without parameters that takes the place of a registration network in eval mode. A
    subclass gives ``solve`` and ``reason``, the word in its records for why an item stopped.
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
            initial_ddf: displacement to start from, ``(B, ndim, *spatial)`` in voxels. Defaults to none.
            kwargs: settings of a fixed-point solver, ignored: there is none.

        Returns:
            The displacement ``(B, ndim, *spatial)`` in voxels, float32 at least, and a record.
        """

    def forward(
        self, moving: torch.Tensor, fixed: torch.Tensor, initial_ddf: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Register as :py:meth:`solve` does; ``RuntimeError`` in training mode.

        Returns:
            ``(warped, ddf)``.
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
    No deformation at all: the images as they come, or under a given displacement. On data that was affinely aligned
    beforehand this is the row "Affine" of the paper's Table 1. The records say ``"not iterated"``.
    """

    reason = "not iterated"

    def solve(
        self, moving: torch.Tensor, fixed: torch.Tensor, initial_ddf: torch.Tensor | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, SolverRecord]:
        """See :py:meth:`ClassicalRegistration.solve`; ``initial_ddf`` or zero is handed back."""
        check_pair(moving, fixed)
        return initial_state(fixed, initial_ddf), self._record(fixed.shape[0])
