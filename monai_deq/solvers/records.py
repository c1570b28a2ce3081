# SPDX-License-Identifier: Apache-2.0
"""What a fixed-point solver hands back beside the state."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

__all__ = ["MEASURES", "SolverRecord", "StopReason"]

#: names of what :py:meth:`SolverRecord.measured` may give
MEASURES: tuple[str, ...] = ("energy", "slope", "unfolded", "energy_before_unfolding", "energy_unfolded")
MEASURES += ("finish_steps", "energy_before_finish")


class StopReason:
    """Why the solver stopped working on an item."""

    TOLERANCE = "tolerance"
    RELATIVE_TOLERANCE = "relative tolerance"
    STEP_LIMIT = "step limit"
    NON_FINITE = "non-finite"


@dataclass(frozen=True)
class SolverRecord:
    """Record of a solve, one entry per item of the batch, on the CPU and without gradient.

    Attributes:
        steps: ``(B,)``, evaluations of the map for the item; one that gave a non-finite result is not counted.
        residual: ``(B, N)``, RMS over voxels of ``|g(x_k) - x_k|`` in voxels at the state that step ``k + 1`` started
            from; NaN after the item had stopped. The state returned is one application of the map further on.
        relative_residual: ``(B, N)``, ``|g(x_k) - x_k| / |g(x_k)|``; NaN after the item had stopped.
        converged: ``(B,)``, whether the item met a tolerance.
        reason: why each item stopped, one of the values of :py:class:`StopReason`.
        coarse_steps: ``(B,)`` each, evaluations at the smaller sizes that gave the start, each half the size of the one
            before; 0 at one that was left out. Empty for a method of one size.
        finish: record of the second method that went on from the solution. Defaults to ``None``: none did.
        measures: what else the method measured, by name: ``(B,)``, or ``(B, N)`` for each step. Empty by default.
    """

    steps: torch.Tensor
    residual: torch.Tensor
    relative_residual: torch.Tensor
    converged: torch.Tensor
    reason: tuple[str, ...]
    coarse_steps: tuple[torch.Tensor, ...] = ()
    finish: SolverRecord | None = None
    measures: dict[str, torch.Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.reason)

    @property
    def final_residual(self) -> torch.Tensor:
        """``(B,)``, the last residual measured for each item, in voxels (NaN when there is none)."""
        return self._last(self.residual)

    @property
    def final_relative_residual(self) -> torch.Tensor:
        """``(B,)``, the last relative residual measured for each item (NaN when there is none)."""
        return self._last(self.relative_residual)

    def evaluations(self, spatial_dims: int) -> torch.Tensor:
        """Cost of the solve, ``(B,)``: evaluations of the map, those at a smaller size by their share of the voxels."""
        total = self.steps.double()
        for level, steps in enumerate(self.coarse_steps, start=1):
            total = total + steps / 2.0 ** (spatial_dims * level)
        return total

    def _last(self, trace: torch.Tensor) -> torch.Tensor:
        last = self.steps.clamp(1, max(trace.shape[1], 1)) - 1
        return trace.gather(1, last[:, None])[:, 0]

    def measured(self) -> dict[str, torch.Tensor]:
        """The measures, ``(B,)`` each: of one for each step the last; and of a finish with what it began from."""
        values = {name: self._last(v) if v.ndim > 1 else v for name, v in self.measures.items()}
        if self.finish is not None:
            values.update(self.finish.measured(), finish_steps=self.finish.steps)
            if "energy" in self.finish.measures:
                values["energy_before_finish"] = self.finish.measures["energy"][:, 0]
        return values

    def item(self, index: int, length: int = 0) -> dict[str, Any]:
        """The record of one item: plain Python values, NaN where there is no number, and tensors, which are
        ``coarse_steps`` and the traces. For JSON see :py:func:`monai_deq.utils.json_ready`.

        Args:
            index: of the item.
            length: with fewer steps the traces, those of a finish too, are padded with NaN to it: data loaders put
                items together whose traces are of one length. Defaults to 0: as many as steps.
        """
        n = int(self.steps[index])
        traces = {"residual": self.residual, "relative_residual": self.relative_residual}
        traces |= {k: v for k, v in self.measures.items() if v.ndim > 1}
        return {
            "steps": n,
            "residual": self.final_residual[index].item(),
            "relative_residual": self.final_relative_residual[index].item(),
            "converged": bool(self.converged[index]),
            "reason": self.reason[index],
            "coarse_steps": torch.tensor([int(steps[index]) for steps in self.coarse_steps], dtype=torch.long),
            **{f"{k}_trace": F.pad(v[index, :n], (0, max(length - n, 0)), value=torch.nan) for k, v in traces.items()},
            **({} if self.finish is None else {"finish": self.finish.item(index, length)}),
            **{k: v[index].item() for k, v in self.measured().items()},
        }
