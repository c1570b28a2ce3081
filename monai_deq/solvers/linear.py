# SPDX-License-Identifier: Apache-2.0
"""The linear equation of an implicit gradient."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, gmres

__all__ = ["solve_linear"]


def solve_linear(
    func: Callable[[torch.Tensor], torch.Tensor], target: torch.Tensor, max_steps: int = 20, tolerance: float = 1e-4
) -> torch.Tensor:
    """Solve ``func(v) = target`` by SciPy's GMRES, on the CPU, without gradients: the ``v`` with the smallest rest that
    ``max_steps`` evaluations find.

    Args:
        func: linear, of tensors like ``target``.
        target: floating point, of any shape.
        max_steps: number of evaluations. Defaults to 20.
        tolerance: of the rest, as share of ``target``. Defaults to 1e-4.
    """

    def apply(v: np.ndarray) -> np.ndarray:
        given = torch.from_numpy(np.ascontiguousarray(v)).to(target).view_as(target)
        return func(given).detach().flatten().cpu().numpy()  # type: ignore[no-any-return]

    right = target.detach().flatten().cpu().numpy()
    operator = LinearOperator((right.size, right.size), matvec=apply, dtype=right.dtype)
    found, _ = gmres(operator, right, rtol=tolerance, restart=max_steps, maxiter=1)
    return torch.from_numpy(found).to(target).view_as(target)
