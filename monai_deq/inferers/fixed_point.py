# SPDX-License-Identifier: Apache-2.0
"""Inferer that solves a batch of pairs and hands the record of the solver on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn as nn
from monai.inferers import Inferer

from monai_deq.networks.blocks import warp_by_ddf
from monai_deq.solvers import certified_solve, check_certificate

__all__ = ["FixedPointInferer"]

_SETTINGS = ("solver", "max_steps", "tolerance", "relative_tolerance", "solver_options")


class FixedPointInferer(Inferer):
    """
    Solve a batch of pairs to equilibrium with a network's own map.

    Args:
        certificate: examine each solution: arguments of :py:func:`monai_deq.solvers.certify`, such as
            ``{"spectral_iterations": 40, "random_starts": 1}``; an empty dictionary for what costs one step.
            Defaults to ``None``: not examined.
        settings: ``max_steps``, ``tolerance``, ``relative_tolerance``, ``solver`` or ``solver_options`` in place of
            the network's own; ``None`` values are left to the network.

    Raises:
        TypeError: When there is no such setting.
    """

    def __init__(self, certificate: Mapping[str, Any] | None = None, **settings: Any) -> None:
        super().__init__()
        unknown = sorted(set(settings) - set(_SETTINGS))
        if unknown:
            raise TypeError(f"FixedPointInferer takes {', '.join(_SETTINGS)}, got {', '.join(unknown)}.")
        self.settings = {k: v for k, v in settings.items() if v is not None}
        self.certificate = check_certificate(certificate)

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
            ``warped`` and ``ddf``, and per item the tensors ``steps``, ``evaluations`` (those at smaller sizes by their
            share of the voxels), ``residual``, ``relative_residual`` (at the
            last step) and ``converged``, and the list ``reason``. With a certificate the residuals are those at the
            solution itself, and there are the list ``verdict`` (of a classical method its ``reason``) and, where asked
            for, the tensors ``spectral_radius`` and ``start_distance``.
        """
        module = getattr(network, "module", network)  # DistributedDataParallel has no solve
        ddf, record, certificates = certified_solve(
            module, inputs, fixed, initial_ddf, self.certificate, **self.settings
        )
        with torch.no_grad():
            warped = warp_by_ddf(inputs, ddf)
        output = {
            "warped": warped,
            "ddf": ddf,
            "steps": record.steps,
            "evaluations": record.evaluations(fixed.ndim - 2),
            "residual": record.final_residual,
            "relative_residual": record.final_relative_residual,
            "converged": record.converged,
            "reason": list(record.reason),
        }
        if self.certificate is not None:
            output["verdict"] = [c.verdict for c in certificates] if certificates else list(record.reason)
        for name in ("residual", "relative_residual", "spectral_radius", "start_distance"):
            values = [getattr(c, name) for c in certificates or ()]
            if values and values[0] is not None:
                output[name] = torch.tensor(values)
        return output
