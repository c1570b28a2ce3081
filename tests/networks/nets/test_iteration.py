# SPDX-License-Identifier: Apache-2.0
"""The state and the map that the drivers share."""

from __future__ import annotations

import pytest
import torch

from monai_deq.networks.nets.iteration import check_pair, hidden_channels, initial_state, state_map

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


@pytest.mark.parametrize(
    ("moving", "fixed", "words"),
    [
        ((1, 1, 4, 5), (1, 1, 5, 4), r"\(1, 1, 4, 5\) and \(1, 1, 5, 4\)"),
        ((1, 2, 4, 5), (1, 2, 4, 5), r"\(B, 1, H, W\[, D\]\)"),
        ((1, 1, 4), (1, 1, 4), r"\(1, 1, 4\)"),
    ],
)
def test_pairs_that_do_not_fit(moving: tuple[int, ...], fixed: tuple[int, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_pair(torch.zeros(moving), torch.zeros(fixed))


def test_whole_numbers() -> None:
    image = torch.zeros(1, 1, 4, 5)
    with pytest.raises(ValueError, match=r"floating point .*torch.uint8 and torch.float32"):
        check_pair(image.byte(), image)
    with pytest.raises(ValueError, match=r"floating point .*torch.float32 and torch.int64"):
        check_pair(image, image.long())
