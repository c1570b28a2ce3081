# SPDX-License-Identifier: Apache-2.0
"""normalize_convolutions: the same function, or singular values of one."""

from __future__ import annotations

import pytest
import torch

from monai_deq.networks import normalize_convolutions
from monai_deq.networks.blocks import RegistrationUNet, UNetUpdate


def update(ndim: int) -> UNetUpdate:
    torch.manual_seed(0)
    return UNetUpdate(ndim, RegistrationUNet(ndim, 2 + ndim, None, (4, 8), (4,), (4,), flow_std=0.05))


@pytest.mark.parametrize("ndim", [2, 3])
def test_weight_normalisation_keeps_the_function(ndim: int) -> None:
    torch.manual_seed(1)
    size = (2, 1, *(13, 8, 10)[:ndim])
    moving, fixed, ddf = torch.rand(size), torch.rand(size), torch.randn(2, ndim, *size[2:])
    before = update(ndim)(moving, fixed, ddf)
    module = normalize_convolutions(update(ndim), "weight")
    torch.testing.assert_close(module(moving, fixed, ddf), before)
    assert sum(n.endswith("weight.original0") for n, _ in module.named_parameters()) == sum(
        isinstance(m, (torch.nn.Conv2d, torch.nn.Conv3d)) for m in module.modules()
    )


@pytest.mark.parametrize("ndim", [2, 3])
def test_spectral_normalisation_leaves_no_singular_value_above_one(ndim: int) -> None:
    module = normalize_convolutions(update(ndim), "spectral").train()
    convolutions = [m for m in module.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Conv3d))]
    for _ in range(200):
        [m.weight for m in convolutions]
    for convolution in convolutions:
        values = torch.linalg.svdvals(convolution.weight.detach().double().flatten(1))
        assert float(values[0]) == pytest.approx(1, abs=1e-3)


def test_refuses() -> None:
    with pytest.raises(ValueError, match="norm must be"):
        normalize_convolutions(update(2), "layer")
    with pytest.raises(ValueError, match="a Identity has none"):
        normalize_convolutions(torch.nn.Identity(), "weight")
