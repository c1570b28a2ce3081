# SPDX-License-Identifier: Apache-2.0
"""Convolutions: one small volume in two halves, initial values, images of any size, the recurrent cell."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import correlate
from torch import nn

from monai_deq.networks.blocks import ConvGRUCell, SmallVolumeConv3d, convolve, with_small_volumes
from monai_deq.networks.blocks.convolutions import init_flow_, init_he_normal_, init_zero_inputs_, run_backbone

# small volumes: even and odd numbers of slices, few of them, many
SMALL = [(12, 10, 14), (11, 12, 9), (5, 20, 20), (25, 7, 8)]


def arguments(
    size: tuple[int, ...], batch: int = 1, kernel: int = 3
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(batch, 4, *size), torch.randn(6, 4, *(kernel,) * len(size)), torch.randn(6)


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Batch sizes of the convolutions that are computed."""
    seen: list[int] = []
    conv3d: Any = F.conv3d

    def counted(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(x.shape[0])
        return conv3d(x, *args, **kwargs)

    monkeypatch.setattr(F, "conv3d", counted)
    return seen


@pytest.mark.parametrize("size", SMALL)
@pytest.mark.parametrize(
    ("kernel", "padding"), [(3, (1, 1, 1)), (3, (1, 1, 0)), (3, (0, 0, 0)), (3, (2, 1, 1)), (5, (2, 2, 2))]
)
def test_one_small_volume_in_halves(
    size: tuple[int, ...], kernel: int, padding: tuple[int, ...], batches: list[int]
) -> None:
    x, weight, bias = arguments(size, kernel=kernel)
    expected = F.conv3d(x.double(), weight.double(), bias.double(), padding=padding)
    batches.clear()
    out = convolve(x, weight, bias, padding)
    assert batches == [2]
    assert out.shape == expected.shape
    torch.testing.assert_close(out.double(), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("size", [(8, 10, 14), (11, 12, 9)])
def test_gradients_of_first_and_second_order(size: tuple[int, ...]) -> None:
    def derivatives(conv: Any, *tensors: torch.Tensor) -> list[torch.Tensor]:
        inputs = [t.clone().requires_grad_() for t in tensors]
        first = torch.autograd.grad(conv(*inputs).tanh().pow(2).mean(), inputs, create_graph=True)
        total = torch.stack([g.pow(2).sum() for g in first]).sum()
        return [g.detach() for g in (*first, *torch.autograd.grad(total, inputs))]

    tensors = arguments(size)
    ours = derivatives(convolve, *tensors)
    expected = derivatives(lambda x, w, b: F.conv3d(x, w, b, padding=1), *(t.double() for t in tensors))
    for one, other in zip(ours, expected, strict=True):
        assert other.abs().max() > 0
        torch.testing.assert_close(one.double(), other, atol=1e-4 * float(other.abs().max()), rtol=1e-3)


@pytest.mark.parametrize(
    ("size", "batch"),
    [
        ((12, 10, 14), 2),
        ((80, 80, 4), 1),  # large enough for PyTorch's own choice of the faster convolution
        ((4, 4, 4), 1),  # too small to be worth it
        ((40, 40), 1),
    ],
)
def test_others_stay_whole(size: tuple[int, ...], batch: int, batches: list[int]) -> None:
    x, weight, bias = arguments(size, batch)
    conv: Any = F.conv2d if len(size) == 2 else F.conv3d
    out = convolve(x, weight, bias, (1,) * len(size))
    torch.testing.assert_close(out, conv(x, weight, bias, padding=1), atol=0, rtol=0)
    assert batches == ([] if len(size) == 2 else [batch] * 2)


def test_doubles_autocast_and_tracing_stay_whole(batches: list[int]) -> None:
    x, weight, bias = arguments((12, 10, 14))
    convolve(x.double(), weight.double(), bias.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert convolve(x, weight, bias).dtype == torch.bfloat16
    conv = with_small_volumes(nn.Sequential(nn.Conv3d(4, 6, 3, padding=1)))
    traced = torch.jit.trace(conv, (x,), check_trace=False)  # type: ignore[no-untyped-call]
    assert batches == [1, 1, 1]
    assert traced(torch.randn(2, 4, 9, 16, 7)).shape == (2, 6, 9, 16, 7)


def test_modules_keep_their_parameters_and_random_numbers() -> None:
    def layers() -> nn.Module:
        torch.manual_seed(0)
        return nn.ModuleDict({"a": nn.Conv3d(4, 6, 3, padding=1), "b": nn.Sequential(nn.Conv3d(6, 2, 3, bias=False))})

    module = with_small_volumes(layers().eval())
    drawn = torch.rand(3)
    expected = layers()
    torch.testing.assert_close(torch.rand(3), drawn, atol=0, rtol=0)
    assert isinstance(module["a"], SmallVolumeConv3d) and isinstance(module["b"][0], SmallVolumeConv3d)
    assert list(module.state_dict()) == list(expected.state_dict())
    for one, other in zip(module.parameters(), expected.parameters(), strict=True):
        assert torch.equal(one, other) and one.device == other.device
    assert not any(m.training for m in module.modules())


@pytest.mark.parametrize(
    "options",
    [
        {"padding": 1},
        {"padding": (0, 1, 2), "bias": False},
        {"padding": "same"},
        {"padding": 1, "stride": 2},
        {"padding": 2, "dilation": 2},
        {"padding": 1, "groups": 2},
        {"padding": 1, "padding_mode": "replicate"},
    ],
)
def test_modules_of_all_kinds(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    conv = nn.Conv3d(4, 6, 3, **options)
    x = torch.randn(1, 4, 13, 12, 10)
    expected = conv.double()(x.double()).float()
    module = with_small_volumes(nn.Sequential(conv.float()))
    assert isinstance(module[0], SmallVolumeConv3d)
    torch.testing.assert_close(module(x), expected, atol=1e-5, rtol=1e-4)


# --- initial values, images of any size -------------------------------------------------------------------------------


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


@pytest.mark.parametrize("size", [(5, 4), (3, 2, 4)])
def test_half_precision_inside_only(size: tuple[int, ...]) -> None:
    conv = (torch.nn.Conv2d if len(size) == 2 else torch.nn.Conv3d)(2, 3, 1)
    x = torch.rand(2, 2, *size, generator=torch.Generator().manual_seed(0))
    kinds = []
    conv.register_forward_hook(lambda module, inputs, output: kinds.append(output.dtype))
    out = run_backbone(conv, x, "bfloat16")
    assert kinds == [torch.bfloat16] and out.dtype == torch.float32
    torch.testing.assert_close(out, conv(x), rtol=0, atol=0.02)


@pytest.mark.parametrize("ndim", [2, 3])
def test_starts(ndim: int) -> None:
    torch.manual_seed(0)
    kind = torch.nn.Conv2d if ndim == 2 else torch.nn.Conv3d
    net = torch.nn.Sequential(kind(6, 40, 3), torch.nn.Sequential(kind(40, 40, 3)))
    init_he_normal_(net)
    for layer, inputs in ((net[0], 6), (net[1][0], 40)):
        # He et al. 2015 with a slope: variance 2 / ((1 + 0.2^2) * fan in)
        assert layer.weight.std().item() == pytest.approx((2 / (1.04 * inputs * 3**ndim)) ** 0.5, rel=0.05)
        assert not layer.bias.any()
    before = net[0].weight.clone()
    init_zero_inputs_(net[0], range(2, 4))
    assert not net[0].weight[:, 2:4].any()
    for kept in (slice(0, 2), slice(4, None)):
        assert torch.equal(net[0].weight[:, kept], before[:, kept])
    with pytest.raises(ValueError, match="zero_inputs must be channels from 0 to 5"):
        init_zero_inputs_(net[0], [6])
    net[0].bias.data.fill_(1.0)
    init_flow_(net[0], 1e-3)
    assert net[0].weight.std().item() == pytest.approx(1e-3, rel=0.1) and not net[0].bias.any()


# --- the recurrent cell -----------------------------------------------------------------------------------------------


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
def test_formulas_of_the_cell(size: tuple[int, ...], kernel_size: int) -> None:
    torch.manual_seed(0)
    cell = ConvGRUCell(len(size), 3, 2, kernel_size).double()
    for p in cell.parameters():
        torch.nn.init.normal_(p, std=0.7)
    x, h = torch.randn(2, 3, *size, dtype=torch.float64), torch.randn(2, 2, *size, dtype=torch.float64)
    expected = gru_by_hand(cell, x.numpy(), h.numpy())
    np.testing.assert_allclose(cell(x, h).detach(), expected, rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(cell, (x.requires_grad_(), h.requires_grad_()), fast_mode=True)


def test_hidden_state_keeps_its_precision() -> None:
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
