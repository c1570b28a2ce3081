# SPDX-License-Identifier: Apache-2.0
"""Inferer that solves a batch of pairs and hands the record of the solver on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn as nn
from monai.inferers import Inferer
from torch.nn.parallel import DistributedDataParallel

from monai_deq.certificates import certified_solve, check_certificate
from monai_deq.networks.blocks import warp_by_ddf
from monai_deq.networks.nets import RegistrationNet

__all__ = ["FixedPointInferer"]


class FixedPointInferer(Inferer):
    """
    Solve a batch of pairs to equilibrium with a network's own map.

    Args:
        certificate: examine each solution, see :py:func:`monai_deq.certificates.check_certificate`; an empty
            dictionary for what costs one step. Defaults to None: not examined.
        max_steps: step limit. Defaults, as the next four, to the network's own.
        tolerance: RMS residual in voxels at which a pair stops.
        relative_tolerance: relative residual at which a pair stops.
        solver: ``"plain"`` or ``"anderson"``.
        solver_options: further options of the solver.
        finish: method that goes on from the solution, as :py:func:`monai_deq.networks.nets.energy_finish`. Defaults to
            None: none.
    """

    def __init__(
        self,
        certificate: Mapping[str, Any] | None = None,
        max_steps: int | None = None,
        tolerance: float | None = None,
        relative_tolerance: float | None = None,
        solver: str | None = None,
        solver_options: Mapping[str, Any] | None = None,
        finish: RegistrationNet | None = None,
    ) -> None:
        super().__init__()
        self.changes: dict[str, Any] = dict(
            name=solver, max_steps=max_steps, tolerance=tolerance, options=solver_options
        )
        self.changes["relative_tolerance"] = relative_tolerance
        self.certificate, self.finish = check_certificate(certificate), finish

    def __call__(  # type: ignore[override]
        self, inputs: torch.Tensor, network: nn.Module, fixed: torch.Tensor, initial_ddf: torch.Tensor | None = None
    ) -> dict[str, Any]:
        """
        Args:
            inputs: moving images ``(B, 1, *spatial)``.
            network: a :py:class:`monai_deq.networks.nets.RegistrationNet`.
            fixed: fixed images ``(B, 1, *spatial)``.
            initial_ddf: warm start ``(B, ndim, *spatial)``. Defaults to zero.

        Returns:
            ``warped`` and ``ddf``, and per item the tensors ``steps``, ``evaluations`` (those at smaller sizes by their
            share of the voxels), ``residual``, ``relative_residual`` (at the last step) and ``converged``, and the list
            ``reason``. With a certificate the residuals are those at the solution itself, and there are the list
            ``verdict`` (of a classical method its ``reason``) and, where asked for, the tensors ``spectral_radius`` and
            ``start_distance``, and of the answers what :py:meth:`monai_deq.certificates.Certificate.as_dict` calls so.
            What else the method measured is there by name, see
            :py:meth:`monai_deq.solvers.SolverRecord.measured`.
        """
        module: Any = network.module if isinstance(network, DistributedDataParallel) else network
        solved = certified_solve(module, inputs, fixed, initial_ddf, self.certificate, self.finish, **self.changes)
        ddf, record, certificates = solved
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
            **record.measured(),
        }
        if self.certificate is not None:
            output["verdict"] = [c.verdict for c in certificates] if certificates else list(record.reason)
        for name in ("residual", "relative_residual", "spectral_radius", "start_distance"):
            values = [getattr(c, name) for c in certificates or ()]
            if values and values[0] is not None:
                output[name] = torch.tensor(values)
        answered = [c.as_dict() for c in certificates or () if c.answers]
        for name in answered[0] if answered else ():
            if name == "sensitive_to":
                output[name] = [words[name] for words in answered]
            elif name.startswith("answer_"):
                output[name] = torch.tensor([words[name] for words in answered])
        return output
