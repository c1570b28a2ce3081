# SPDX-License-Identifier: Apache-2.0
"""The plain convolutional network: size, layers, start, refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import correlate

from monai_deq.networks.blocks import RegistrationCNN, RegistrationUNet


def test_number_of_parameters() -> None:
    # (5 * 27 + 1) * 32 + 3 * (32 * 27 + 1) * 32 + (32 * 27 + 1) * 3
    assert sum(p.numel() for p in RegistrationCNN(3, 5).parameters()) == 89_987
    net = RegistrationCNN(2, 3, out_channels=5, channels=(4, 6))
    assert sum(p.numel() for p in net.parameters()) == (27 + 1) * 4 + (36 + 1) * 6 + (54 + 1) * 5


def conv_by_hand(x: np.ndarray, conv: Any) -> np.ndarray:
    """Zero-padded correlation of every item, channel by channel."""
    weight, bias = conv.weight.detach().numpy(), conv.bias.detach().numpy()
    return np.stack(
        [
            [
                b + np.sum([correlate(c, k, mode="constant") for c, k in zip(item, w, strict=True)], axis=0)
                for w, b in zip(weight, bias, strict=True)
            ]
            for item in x
        ]
    )


@pytest.mark.parametrize("size", [(5, 8), (3, 4, 6)])
def test_layers_by_hand(size: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    ndim = len(size)
    net = RegistrationCNN(ndim, 3, channels=(2, 4), flow_std=0.3).double()
    for name, p in net.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(p)
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    y = x.numpy()
    for layer in net.layers:
        y = conv_by_hand(y, layer.conv)
        y = np.where(y > 0, y, 0.2 * y)
    expected = conv_by_hand(y, net.flow)
    assert expected.shape == (2, ndim, *size)
    np.testing.assert_allclose(net(x).detach(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("ndim", [2, 3])
def test_first_displacement_is_next_to_zero(ndim: int) -> None:
    torch.manual_seed(0)
    net = RegistrationCNN(ndim, 2 + ndim)
    assert net.flow.weight.std().item() == pytest.approx(1e-5, rel=0.15) and not net.flow.bias.any()
    y = net(torch.rand(2, 2 + ndim, *(7, 5, 6)[:ndim]))
    assert y.shape == (2, ndim, *(7, 5, 6)[:ndim])
    assert 0 < y.abs().max() < 1e-3
    assert net.first_conv.weight.shape == (32, 2 + ndim, *[3] * ndim)


@pytest.mark.parametrize("backbone", [RegistrationCNN, RegistrationUNet])
def test_inputs_that_are_not_looked_at_at_the_start(backbone: type[RegistrationCNN]) -> None:
    net = backbone(2, 4, flow_std=0.1, zero_inputs=range(2, 4))
    x = torch.rand(1, 4, 16, 32)
    other = x.clone()
    other[:, 2:] += 5
    assert torch.equal(net(x), net(other))
    other[:, 1] += 1
    assert not torch.allclose(net(x), net(other))
    net(x).sum().backward()
    assert net.first_conv.weight.grad[:, 2:].any()  # they are learned


def test_errors() -> None:
    with pytest.raises(ValueError, match="spatial_dims must be 2 or 3, got 4"):
        RegistrationCNN(4)
    with pytest.raises(ValueError, match="channels must have at least one entry"):
        RegistrationCNN(2, 4, channels=())
    net = RegistrationCNN(2, 4, channels=(2,))
    for shape in ((1, 3, 5, 5), (1, 4, 5, 5, 5), (4, 5, 5)):
        with pytest.raises(ValueError, match=r"\(B, 4, 2 spatial sizes\)") as error:
            net(torch.zeros(shape))
        error.match(str(shape).replace("(", r"\(").replace(")", r"\)"))
