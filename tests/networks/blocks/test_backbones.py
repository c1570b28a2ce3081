# SPDX-License-Identifier: Apache-2.0
"""The U-Net against MONAI's VoxelMorphUNet, the plain network against SciPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from monai.networks.nets import VoxelMorphUNet
from scipy.ndimage import correlate

from monai_deq.networks.blocks import RegistrationCNN, RegistrationUNet


def monai_unet(spatial_dims: int, in_channels: int) -> VoxelMorphUNet:
    return VoxelMorphUNet(
        spatial_dims=spatial_dims,
        in_channels=in_channels,
        unet_out_channels=32,
        channels=(16, 32, 32, 32, 32, 32, 32, 32),
        final_conv_channels=(16, 16),
    )


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_number_of_parameters_of_the_unet() -> None:
    assert count(RegistrationUNet(3, 5)) == 328_627
    assert count(monai_unet(3, 2)) == count(RegistrationUNet(3, 2)) == 327_331
    assert count(monai_unet(2, 4)) == count(RegistrationUNet(2, 4))


@pytest.mark.parametrize(("size", "in_channels"), [((16, 32), 4), ((32, 16), 2), ((16, 32, 16), 2)])
def test_same_architecture_as_monai(size: tuple[int, ...], in_channels: int) -> None:
    torch.manual_seed(0)
    theirs = monai_unet(len(size), in_channels).double()
    ours = RegistrationUNet(len(size), in_channels).double()
    skip_channels = {f"decoder.{i}.conv.weight": n for i, n in enumerate((32, 32, 32, 16))}
    with torch.no_grad():
        for (name, own), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            # MONAI puts the skip connection before the upsampled features, RegistrationUNet after them
            n = skip_channels.get(name, 0)
            own.copy_(torch.cat([other[:, n:], other[:, :n]], dim=1) if n else other)
    x = torch.randn(2, in_channels, *size, dtype=torch.float64)
    with torch.no_grad():
        expected, y = theirs(x), ours(x)
    assert expected.std() > 1e-3
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_first_displacement_of_the_unet(spatial_dims: int) -> None:
    torch.manual_seed(0)
    net = RegistrationUNet(spatial_dims, 2 + spatial_dims)
    assert net.flow.weight.std().item() == pytest.approx(1e-5, rel=0.15)
    assert not net.flow.bias.any()
    y = net(torch.rand(2, 2 + spatial_dims, *[16] * spatial_dims))
    assert y.shape == (2, spatial_dims, *[16] * spatial_dims)
    assert 0 < y.abs().max() < 1e-3


def test_other_channels() -> None:
    net = RegistrationUNet(
        2, 3, 5, encoder_channels=(4, 6, 8), decoder_channels=(7, 9), final_channels=(), flow_std=1.0
    )
    assert net.divisor == 4
    assert net(torch.rand(1, 3, 8, 12)).shape == (1, 5, 8, 12)
    # encoder, decoder over [below, skip], flow: (inputs * 9 + 1) * outputs
    expected = (27 + 1) * 4 + (36 + 1) * 6 + (54 + 1) * 8 + ((8 + 6) * 9 + 1) * 7 + ((7 + 4) * 9 + 1) * 9 + (81 + 1) * 5
    assert count(net) == expected


@pytest.mark.parametrize(
    ("size", "parts"), [((8, 24), 3), ((16, 8), 50), ((8, 8, 8), 1), ((4, 8, 4), 2), ((4, 4, 32), 4)]
)
def test_parts_that_are_computed_again_are_the_whole(size: tuple[int, ...], parts: int) -> None:
    torch.manual_seed(0)
    ndim = len(size)
    narrow = {"encoder_channels": (3, 4, 5), "decoder_channels": (5, 4), "final_channels": (4, 3)}
    whole = RegistrationUNet(ndim, 2 + ndim, flow_std=1.0, **narrow).double()
    in_parts = RegistrationUNet(ndim, 2 + ndim, checkpoint_parts=parts, **narrow).double()
    in_parts.load_state_dict(whole.state_dict())
    x = torch.randn(2, 2 + ndim, *size, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, ndim, *size, dtype=torch.float64)
    results = []
    for net in (whole, in_parts):
        y = net(x)
        results.append([y, *torch.autograd.grad((y * weights).sum(), [x, *net.parameters()])])
    for got, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12 * float(expected.detach().abs().max()))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"spatial_dims": 4}, "spatial_dims must be 2 or 3, got 4"),
        ({"encoder_channels": (4,), "decoder_channels": ()}, "at least 2"),
        ({"encoder_channels": (4, 4, 4)}, "4 and 3"),
        ({"checkpoint_parts": -1}, "checkpoint_parts must be a whole number, not negative, got -1"),
        ({"checkpoint_parts": 1.5}, "checkpoint_parts must be a whole number, not negative, got 1.5"),
        ({"zero_inputs": [5]}, "zero_inputs must be channels from 0 to 4"),
    ],
)
def test_wrong_arguments_of_the_unet(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        RegistrationUNet(**arguments)


@pytest.mark.parametrize(
    ("shape", "expected", "received"),
    [
        ((1, 4, 16, 16, 16), r"\(B, 5, 3 spatial sizes\)", r"\(1, 4, 16, 16, 16\)"),
        ((1, 5, 16, 16), r"\(B, 5, 3 spatial sizes\)", r"\(1, 5, 16, 16\)"),
        ((1, 5, 16, 24, 16), "multiples of 16", r"\(16, 24, 16\)"),
    ],
)
def test_wrong_inputs_of_the_unet(shape: tuple[int, ...], expected: str, received: str) -> None:
    with pytest.raises(ValueError, match=expected) as error:
        RegistrationUNet(3, 5)(torch.zeros(shape))
    error.match(received)


# --- the plain network ------------------------------------------------------------------------------------------------


def test_number_of_parameters_of_the_cnn() -> None:
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
def test_layers_of_the_cnn_by_hand(size: tuple[int, ...]) -> None:
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
def test_first_displacement_of_the_cnn(ndim: int) -> None:
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


def test_errors_of_the_cnn() -> None:
    with pytest.raises(ValueError, match="spatial_dims must be 2 or 3, got 4"):
        RegistrationCNN(4)
    with pytest.raises(ValueError, match="channels must have at least one entry"):
        RegistrationCNN(2, 4, channels=())
    net = RegistrationCNN(2, 4, channels=(2,))
    for shape in ((1, 3, 5, 5), (1, 4, 5, 5, 5), (4, 5, 5)):
        with pytest.raises(ValueError, match=r"\(B, 4, 2 spatial sizes\)") as error:
            net(torch.zeros(shape))
        error.match(str(shape).replace("(", r"\(").replace(")", r"\)"))
