# SPDX-License-Identifier: Apache-2.0
"""Systems without anything to train: their base, and the images as they come."""

from __future__ import annotations

from typing import Any

import torch

from monai_deq.networks.nets import RegistrationNet, check_pair
from monai_deq.networks.nets.iteration import initial_state
from monai_deq.solvers import SolverRecord

__all__ = ["ClassicalRegistration", "InitialAlignment"]


class ClassicalRegistration(RegistrationNet):
    """
    Base of the baselines: no parameters, and no fixed-point solver, whose settings are ignored. A subclass gives
    ``solve`` and ``reason``, the word in its records for why an item stopped.
    """

    reason: str

    def training_states(self, *args: Any, **kwargs: Any) -> list[torch.Tensor]:
        """
        Raises:
            RuntimeError: Always.
        """
        raise RuntimeError(f"{type(self).__name__} has nothing to train: call eval() before using it.")

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
        """See :py:meth:`monai_deq.networks.nets.RegistrationNet.solve`; ``initial_ddf`` or zero is handed back."""
        check_pair(moving, fixed)
        return initial_state(fixed, initial_ddf), self._record(fixed.shape[0])
