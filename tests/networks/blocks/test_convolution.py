# SPDX-License-Identifier: Apache-2.0
"""Convolutions: one small volume in two halves, everything else as PyTorch does it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from monai_deq.networks.blocks.convolution import SmallVolumeConv3d, convolve, with_small_volumes

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


@pytest.mark.parametrize("size", SMALL)
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
