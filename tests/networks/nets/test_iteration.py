# SPDX-License-Identifier: Apache-2.0
"""What the drivers share: state, map, and displacements at half and at twice the size."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from monai_deq.networks.nets.iteration import (
    checkpointed_map,
    downsample_ddf,
    hidden_channels,
    initial_state,
    proximal_map,
    relaxed_map,
    state_map,
    upsample_state,
)

SIZES = [(3, 5), (2, 4, 3)]


class Mixed(torch.nn.Module):
    """Computes in double precision, whatever it is given."""

    def forward(self, moving: torch.Tensor, fixed: torch.Tensor, ddf: torch.Tensor) -> torch.Tensor:
        return 1.5 * ddf.double() + (fixed - moving)


class Counting(torch.nn.Module):
    """Adds what the hidden state holds to the displacement, and an item's number to the hidden state."""

    hidden_channels = 2

    def forward(
        self, moving: torch.Tensor, fixed: torch.Tensor, ddf: torch.Tensor, hidden: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert ddf.shape[1] == ddf.ndim - 2 and hidden.shape[1] == 2
        return hidden.sum(1, keepdim=True).expand_as(ddf).double(), hidden + fixed.double()


def images(size: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    fixed = torch.tensor([1.0, 2.0], dtype=dtype).view(2, 1, *[1] * len(size)).expand(2, 1, *size)
    return torch.zeros_like(fixed), fixed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", SIZES)
def test_map_keeps_the_type_of_the_state(size: tuple[int, ...], dtype: torch.dtype) -> None:
    moving, fixed = images(size)
    state = state_map(Mixed(), moving, fixed)(torch.ones(2, len(size), *size, dtype=dtype))
    assert state.dtype == dtype
    torch.testing.assert_close(state, (2.5 + fixed).to(dtype).expand_as(state))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", SIZES)
def test_map_with_hidden_state(size: tuple[int, ...], dtype: torch.dtype) -> None:
    ndim = len(size)
    moving, fixed = images(size)
    assert hidden_channels(Counting()) == 2 and hidden_channels(Mixed()) == 0
    g = state_map(Counting(), moving, fixed)
    state = initial_state(fixed.to(dtype), torch.full((2, ndim, *size), 10.0), 2)
    assert state.dtype == dtype and state.shape == (2, ndim + 2, *size)
    for steps in (1, 2, 3):
        state = g(state)
        assert state.dtype == dtype and state.shape == (2, ndim + 2, *size)
        item = fixed.to(dtype)
        # hidden: n i; displacement: 10 + 2 i (0 + 1 + ... + (n - 1))
        torch.testing.assert_close(state[:, ndim:], (steps * item).expand(2, 2, *size))
        torch.testing.assert_close(state[:, :ndim], (10 + item * steps * (steps - 1)).expand(2, ndim, *size))


class Once(torch.nn.Module):
    """Does for a pair what its steps share, and counts how often."""

    hidden_channels = 0

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[torch.Tensor | None, ...]] = []

    def at(self, moving: torch.Tensor, fixed: torch.Tensor, mask: torch.Tensor | None = None) -> Any:
        self.seen.append((moving, fixed, mask))
        target = fixed - moving if mask is None else mask * (fixed - moving)
        return lambda ddf: 0.5 * (target - ddf)


def test_what_the_steps_share_is_done_once() -> None:
    moving, fixed = images((5, 4))
    mask = torch.zeros_like(fixed)
    mask[1] = 1
    for given in (None, mask):
        update = Once()
        g = state_map(update, moving, fixed, given)
        state = torch.zeros(2, 2, 5, 4)
        for _ in range(3):
            state = g(state)
        expected = 0.875 * fixed * (1 if given is None else given)
        torch.testing.assert_close(state, expected.expand_as(state))
        assert len(update.seen) == 1 and update.seen[0][2] is given


@pytest.mark.parametrize("image", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("hidden", [0, 3])
def test_initial_state(size: tuple[int, ...], image: torch.dtype, hidden: int) -> None:
    _, fixed = images(size, image)
    expected = torch.float64 if image == torch.float64 else torch.float32
    zero = initial_state(fixed, None, hidden)
    assert zero.dtype == expected and zero.shape == (2, len(size) + hidden, *size) and not zero.any()
    start = torch.rand(2, len(size), *size, requires_grad=True)
    state = initial_state(fixed, start, hidden)
    assert state.dtype == expected and not state.requires_grad
    assert torch.equal(state[:, : len(size)], start.detach().to(expected)) and not state[:, len(size) :].any()
    with pytest.raises(ValueError, match="ddf must have shape"):
        initial_state(fixed, torch.zeros(1, len(size), *size), hidden)


def test_relaxed_and_proximal_maps() -> None:
    x, center = torch.rand(2, 5, 3, 4, dtype=torch.float64), torch.rand(2, 2, 3, 4)

    def g(x: torch.Tensor) -> torch.Tensor:
        return 3 * x - 1

    assert relaxed_map(g, 1.0) is g
    torch.testing.assert_close(relaxed_map(g, 0.25)(x), x + 0.25 * (2 * x - 1))
    pulled = proximal_map(g, 0.2, center)
    # a hidden part is left as it is
    torch.testing.assert_close(pulled(x)[:, 2:], 3 * x[:, 2:] - 1)
    for state in (x, x[:, :2]):
        expected = 3 * x[:, :2] - 1 - 0.2 * (x[:, :2] - center.double())
        torch.testing.assert_close(pulled(state)[:, :2], expected)
        assert pulled(state).shape == state.shape and pulled(state).dtype == torch.float64


def test_checkpointed_map_keeps_its_argument_alone() -> None:
    calls = []

    def g(x: torch.Tensor) -> torch.Tensor:
        calls.append(torch.is_grad_enabled())
        return torch.sin(x).exp()

    x = torch.rand(1, 2, 3, requires_grad=True)
    with torch.no_grad():
        expected = checkpointed_map(g)(x)
    assert calls == [False] and torch.equal(expected, g(x).detach())
    calls.clear()
    y = checkpointed_map(g)(x)
    assert len(calls) == 1 and torch.equal(y, expected)
    y.sum().backward()
    # evaluated again
    assert len(calls) == 2
    torch.testing.assert_close(x.grad, (torch.cos(x) * expected).detach())


@pytest.mark.parametrize("size", [(9, 14), (16, 12), (5, 8, 7), (1, 6), (4, 1, 3)])
def test_displacements_halve_and_double(size: tuple[int, ...]) -> None:
    ndim = len(size)
    values = torch.arange(1.0, 1 + ndim).view(1, ndim, *[1] * ndim)
    shift = values.expand(2, ndim, *size)
    coarse = downsample_ddf(shift)
    assert coarse.shape[2:] == tuple(-(-n // 2) for n in size)
    # an axis of one voxel is not halved
    halves = torch.tensor([1.0 if n == 1 else 0.5 for n in size]).view(1, ndim, *[1] * ndim)
    torch.testing.assert_close(coarse, (values * halves).expand_as(coarse))
    torch.testing.assert_close(upsample_state(coarse, size), shift)


@pytest.mark.parametrize("size", [(16, 12), (8, 6, 4)])
def test_a_linear_displacement_is_that_of_the_coarse_points(size: tuple[int, ...]) -> None:
    ndim = len(size)
    grid = torch.stack(torch.meshgrid(*[torch.arange(n, dtype=torch.float64) for n in size], indexing="ij"))
    matrix = torch.randn(ndim, ndim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ddf = torch.einsum("ij,j...->i...", matrix, grid)[None]
    coarse_grid = torch.stack(torch.meshgrid(*[torch.arange(n // 2, dtype=torch.float64) for n in size], indexing="ij"))
    # the centre of coarse voxel i lies at 2 i + 1/2
    expected = torch.einsum("ij,j...->i...", matrix, 2 * coarse_grid + 0.5)[None] / 2
    torch.testing.assert_close(downsample_ddf(ddf), expected)
