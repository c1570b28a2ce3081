# SPDX-License-Identifier: Apache-2.0
"""The convolutional gated recurrent unit against its formulas in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import correlate

from monai_deq.networks.blocks import ConvGRUCell


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def gru_by_hand(cell: ConvGRUCell, x: np.ndarray, h: np.ndarray) -> np.ndarray:
    """``z = sigmoid(W_z [x, h])``, ``r = sigmoid(W_r [x, h])``, ``h' = (1 - z) h + z tanh(W_h [x, r h])``."""

    def conv(weight: torch.Tensor, bias: torch.Tensor, inputs: np.ndarray) -> np.ndarray:
        rows = [
            [
                float(b) + sum(correlate(c, k, mode="constant") for c, k in zip(item, w.numpy(), strict=True))
                for w, b in zip(weight.detach(), bias.detach(), strict=True)
            ]
            for item in inputs
        ]
        return np.asarray(rows)

    n = h.shape[1]
    gates, bias = cell.gates.weight, cell.gates.bias
    both = np.concatenate([x, h], axis=1)
    z, r = sigmoid(conv(gates[:n], bias[:n], both)), sigmoid(conv(gates[n:], bias[n:], both))
    candidate = np.tanh(conv(cell.candidate.weight, cell.candidate.bias, np.concatenate([x, r * h], axis=1)))
    return (1 - z) * h + z * candidate


@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize("size", [(1, 1), (4, 7), (3, 2, 5)])
def test_formulas(size: tuple[int, ...], kernel_size: int) -> None:
    torch.manual_seed(0)
    cell = ConvGRUCell(len(size), 3, 2, kernel_size).double()
    for p in cell.parameters():
        torch.nn.init.normal_(p, std=0.7)
    x, h = torch.randn(2, 3, *size, dtype=torch.float64), torch.randn(2, 2, *size, dtype=torch.float64)
    expected = gru_by_hand(cell, x.numpy(), h.numpy())
    np.testing.assert_allclose(cell(x, h).detach(), expected, rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(cell, (x.requires_grad_(), h.requires_grad_()), fast_mode=True)


def test_state_keeps_its_precision() -> None:
    torch.manual_seed(0)
    cell = ConvGRUCell(2, 3, 2)
    torch.nn.init.constant_(cell.gates.bias, -20.0)  # nothing is let in
    h = 1 + 1e-4 * torch.rand(2, 2, 4, 5)
    with torch.autocast("cpu", torch.bfloat16):
        out = cell(torch.rand(2, 3, 4, 5).bfloat16(), h)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, h, rtol=0, atol=1e-6)


def test_even_kernel() -> None:
    with pytest.raises(ValueError, match="kernel_size must be odd, got 2"):
        ConvGRUCell(2, 3, 2, kernel_size=2)
