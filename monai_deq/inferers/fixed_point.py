# SPDX-License-Identifier: Apache-2.0
"""Inferer that solves a batch of pairs and hands the record of the solver on."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
from monai.inferers import Inferer

from monai_deq.networks.blocks import warp_by_ddf

__all__ = ["FixedPointInferer"]

_SETTINGS = ("solver", "max_steps", "tolerance", "relative_tolerance", "solver_options")


class FixedPointInferer(Inferer):
    """
    Solve a batch of pairs to equilibrium with a network's own map.

    Args:
        settings: ``max_steps``, ``tolerance``, ``relative_tolerance``, ``solver`` or ``solver_options`` in place of
            the network's own; ``None`` values are left to the network.

    Raises:
        TypeError: When there is no such setting.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        unknown = sorted(set(settings) - set(_SETTINGS))
        if unknown:
            raise TypeError(f"FixedPointInferer takes {', '.join(_SETTINGS)}, got {', '.join(unknown)}.")
        self.settings = {k: v for k, v in settings.items() if v is not None}

    def __call__(  # type: ignore[override]
        self,
        inputs: torch.Tensor,
        network: nn.Module,
        fixed: torch.Tensor,
        initial_ddf: torch.Tensor | None = None,
    ) -> dict[str, Any]:
        """
        Args:
            inputs: moving images ``(B, 1, *spatial)``.
            network: module with a method ``solve``.
            fixed: fixed images ``(B, 1, *spatial)``.
            initial_ddf: warm start ``(B, ndim, *spatial)``. Defaults to zero.

        Returns:
            ``warped`` and ``ddf``, and per item the tensors ``steps``, ``residual``, ``relative_residual`` (at the
            last step) and ``converged``, and the list ``reason``.
        """
        module = getattr(network, "module", network)  # DistributedDataParallel has no solve
        with torch.no_grad():
            ddf, record = module.solve(inputs, fixed, initial_ddf, **self.settings)  # type: ignore[operator]
            warped = warp_by_ddf(inputs, ddf)
        return {
            "warped": warped,
            "ddf": ddf,
            "steps": record.steps,
            "residual": record.final_residual,
            "relative_residual": record.final_relative_residual,
            "converged": record.converged,
            "reason": list(record.reason),
        }
