# SPDX-License-Identifier: Apache-2.0
"""What the updates share: call at any size, half precision, starts of the weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from monai_deq.networks.blocks.backbone import (
    backbone_autocast_dtype,
    run_backbone,
    start_he_normal,
    start_small,
    start_without,
)


class Neighbour(torch.nn.Module):
    """Every voxel takes the value of the next one along each axis, so that what was padded behind the end is seen."""

    def __init__(self, divisor: int | None) -> None:
        super().__init__()
        self.sizes: list[tuple[int, ...]] = []
        if divisor is not None:
            self.divisor = divisor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.sizes.append(tuple(x.shape[2:]))
        axes = tuple(range(2, x.ndim))
        return x.roll([-1] * len(axes), axes)


@pytest.mark.parametrize("divisor", [None, 1, 2, 4])
@pytest.mark.parametrize("size", [(8, 5), (3, 9), (5, 4, 6)])
def test_padding_to_a_multiple(size: tuple[int, ...], divisor: int | None) -> None:
    x = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    backbone = Neighbour(divisor)
    out = run_backbone(backbone, x)
    d = divisor or 1
    padded = np.pad(x.numpy(), [(0, 0), (0, 0), *((0, -n % d) for n in size)])
    assert backbone.sizes == [padded.shape[2:]]
    axes = tuple(range(2, x.ndim))
    expected = np.roll(padded, [-1] * len(axes), axes)[(..., *(slice(n) for n in size))]
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [(5, 4), (3, 2, 4)])
def test_half_precision_inside_only(size: tuple[int, ...], dtype: torch.dtype) -> None:
    conv = (torch.nn.Conv2d if len(size) == 2 else torch.nn.Conv3d)(2, 3, 1)
    x = torch.rand(2, 2, *size, generator=torch.Generator().manual_seed(0))
    kinds = []
    conv.register_forward_hook(lambda module, inputs, output: kinds.append(output.dtype))
    out = run_backbone(conv, x, torch.bfloat16)
    assert kinds == [torch.bfloat16] and out.dtype == torch.float32
    torch.testing.assert_close(out, conv(x), rtol=0, atol=0.02)


def test_names_of_types() -> None:
    assert backbone_autocast_dtype(None) is None
    assert backbone_autocast_dtype("bfloat16") == torch.bfloat16
    assert backbone_autocast_dtype("float16") == torch.float16
    for name in ("float32", "half", ""):
        with pytest.raises(ValueError, match=f"got {name!r}"):
            backbone_autocast_dtype(name)


@pytest.mark.parametrize("ndim", [2, 3])
def test_starts(ndim: int) -> None:
    torch.manual_seed(0)
    kind = torch.nn.Conv2d if ndim == 2 else torch.nn.Conv3d
    net = torch.nn.Sequential(kind(6, 40, 3), torch.nn.Sequential(kind(40, 40, 3)))
    start_he_normal(net)
    for layer, inputs in ((net[0], 6), (net[1][0], 40)):
        # He et al. 2015 with a slope: variance 2 / ((1 + 0.2^2) * fan in)
        assert layer.weight.std().item() == pytest.approx((2 / (1.04 * inputs * 3**ndim)) ** 0.5, rel=0.05)
        assert not layer.bias.any()
    before = net[0].weight.clone()
    start_without(net[0], range(2, 4))
    assert not net[0].weight[:, 2:4].any()
    for kept in (slice(0, 2), slice(4, None)):
        assert torch.equal(net[0].weight[:, kept], before[:, kept])
    with pytest.raises(ValueError, match="zero_inputs must be channels from 0 to 5"):
        start_without(net[0], [6])
    net[0].bias.data.fill_(1.0)
    start_small(net[0], 1e-3)
    assert net[0].weight.std().item() == pytest.approx(1e-3, rel=0.1) and not net[0].bias.any()
