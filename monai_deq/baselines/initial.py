# SPDX-License-Identifier: Apache-2.0
"""The images as they come: what any registration has to improve on."""

from __future__ import annotations

from typing import Any

import torch

from monai_deq.baselines.classical import ClassicalRegistration
from monai_deq.networks.nets.iteration import check_pair, initial_state
from monai_deq.solvers import SolverRecord

__all__ = ["InitialAlignment"]


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
