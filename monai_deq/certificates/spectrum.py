# SPDX-License-Identifier: Apache-2.0
"""How a map acts near a state: the spectral radius of its Jacobian."""

from __future__ import annotations

from collections.abc import Callable

import torch

__all__ = ["spectral_radius"]


def _norm(x: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(x.flatten(1).double(), dim=1)


def spectral_radius(
    func: Callable[[torch.Tensor], torch.Tensor], state: torch.Tensor, iterations: int = 40, seed: int = 0
) -> torch.Tensor:
    """Largest modulus of an eigenvalue of the Jacobian of a map at a state, item by item, by power iteration.

    The estimate is the mean growth of the norm, ``(|v_n| / |v_m|)^(1 / (n - m))``, over the last half of the
    iterations: right also where the largest eigenvalues are a complex pair and the vectors turn for ever. The vectors
    are multiplied by the transposed Jacobian, which has the same eigenvalues and needs but a backward pass. An estimate
    from few iterations can be off to both sides when eigenvalues lie close together or the Jacobian is far from normal;
    see how it changes with ``iterations``.

    Costs one evaluation of the map with its backward memory and ``iterations`` backward passes.

    Args:
        func: the map ``g``, ``(B, C, ...) -> (B, C, ...)``, that does not mix items of the batch; differentiable.
        state: ``(B, C, ...)``.
        iterations: number of products, at least 2. Defaults to 40.
        seed: of the random vector to start from, the same for all items. Defaults to 0.

    Returns:
        ``(B,)``, float64; NaN where a product is not finite, 0 where the vector vanishes.

    Raises:
        ValueError: When there are fewer than 2 iterations.
        RuntimeError: In inference mode.
    """
    if iterations < 2:
        raise ValueError(f"iterations must be at least 2, got {iterations}.")
    if torch.is_inference_mode_enabled():
        raise RuntimeError("the spectral radius needs gradients: examine solutions under no_grad, not inference_mode.")
    with torch.enable_grad():
        x = state.detach().clone().requires_grad_(True)
        y = func(x)
    if not y.requires_grad:  # a map to a constant
        return torch.zeros(len(state), dtype=torch.float64, device=state.device)
    generator = torch.Generator().manual_seed(seed)
    # the same for each item, so that its estimate does not depend on its batch
    v = torch.randn((1, *state.shape[1:]), generator=generator).to(device=state.device, dtype=y.dtype)
    v = v.expand_as(state)
    shape = (-1, *[1] * (state.ndim - 1))
    skipped = iterations // 2
    growth = torch.zeros(state.shape[0], dtype=torch.float64, device=state.device)
    for k in range(iterations + 1):
        # of RMS 1, whatever the number of voxels: a vector of length 1 would vanish in half precision
        norm = _norm(v) / max(v[0].numel(), 1) ** 0.5
        if k > skipped:
            growth += norm.log()
        v = v / torch.where(norm > 0, norm, torch.ones_like(norm)).view(shape).to(v.dtype)
        if k < iterations:
            (v,) = torch.autograd.grad(y, x, v.to(y.dtype), retain_graph=k + 1 < iterations, allow_unused=False)
    return (growth / (iterations - skipped)).exp()
