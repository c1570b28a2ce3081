# SPDX-License-Identifier: Apache-2.0
"""StatePool: what comes back is what was put, by slot and ticket, in memory and in a file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from monai_deq.data import StatePool

SIZES = {2: (7, 6), 3: (5, 4, 6)}


def fields(ndim: int, batch: int, seed: int = 0) -> torch.Tensor:
    return torch.randn((batch, ndim, *SIZES[ndim]), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("in_file", [False, True])
def test_hands_back_what_was_put(ndim: int, in_file: bool, tmp_path: Path) -> None:
    pool = StatePool(4, tmp_path if in_file else None)
    like = torch.zeros(3, 1, *SIZES[ndim])
    assert pool.get([0, 1, 2], [0, 1, 2], like).abs().sum() == 0 and len(pool) == 0
    first, second = fields(ndim, 3), fields(ndim, 2, seed=1)
    pool.put([2, 0, 3], [5, 6, 7], first.clone().requires_grad_(True).double())
    assert len(pool) == 3
    torch.testing.assert_close(pool.get([3, 2, 0], [7, 5, 6], like), first[[2, 0, 1]])
    assert not pool.get([3], [7], like[:1]).requires_grad
    pool.put([0, 1], [6, 8], second)
    torch.testing.assert_close(pool.get([0, 1, 2], [6, 8, 5], like), torch.stack([*second, first[0]]))
    # what was handed out is a copy
    pool.get([0], [6], like[:1]).zero_()
    torch.testing.assert_close(pool.get([0], [6], like[:1]), second[:1])
    assert list(tmp_path.iterdir()) == []


def test_a_slot_given_to_another_pair_starts_anew() -> None:
    pool, like = StatePool(2), torch.zeros(1, 1, *SIZES[2])
    old, new = fields(2, 1), fields(2, 1, seed=1)
    pool.put([1], [3], old)
    assert pool.get([1], [4], like).abs().sum() == 0
    pool.put([1], [4], new)
    # a batch of the old pair that was under way: neither handed out nor taken
    assert pool.get([1], [3], like).abs().sum() == 0
    pool.put([1], [3], old)
    torch.testing.assert_close(pool.get([1], [4], like), new)


def test_lets_go_of_what_is_not_finite() -> None:
    pool, like = StatePool(2), torch.zeros(2, 1, *SIZES[2])
    good, bad = fields(2, 2), fields(2, 2, seed=1)
    pool.put([0, 1], [0, 1], good)
    bad[1, 0, 2, 3] = float("nan")
    pool.put([0, 1], [0, 1], bad)
    # a displacement longer than the image is lost too
    far = torch.zeros(1, 2, *SIZES[2])
    far[0, 1, 0, 0] = max(SIZES[2]) + 1
    other = StatePool(1)
    other.put([0], [0], far)
    assert len(other) == 0
    torch.testing.assert_close(pool.get([0, 1], [0, 1], like), torch.stack([bad[0], torch.zeros_like(bad[1])]))
    assert len(pool) == 1


def test_checkpoint(tmp_path: Path) -> None:
    pool, like = StatePool(3), torch.zeros(1, 1, *SIZES[3])
    state = fields(3, 1)
    pool.put([1], [9], state)
    torch.save(pool.state_dict(), tmp_path / "pool.pt")
    loaded = torch.load(tmp_path / "pool.pt", weights_only=True)
    for folder in (None, tmp_path):
        other = StatePool(3, folder)
        other.load_state_dict(loaded)
        torch.testing.assert_close(other.get([1], [9], like), state)
        assert len(other) == 1
    # of a pool in a file the displacements are left out, and the pairs start anew
    again = StatePool(3)
    again.load_state_dict(other.state_dict())
    assert len(again) == 0 and again.get([1], [9], like).abs().sum() == 0
    with pytest.raises(ValueError, match="a pool of 3 slots, this one has 2"):
        StatePool(2).load_state_dict(loaded)


def test_refuses(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="slots must be a whole number of at least 1, got 0"):
        StatePool(0)
    with pytest.raises(NotADirectoryError, match="an existing folder"):
        StatePool(2, tmp_path / "absent")
    pool, like = StatePool(2), torch.zeros(1, 1, *SIZES[2])
    for call in (lambda: pool.get([0], [0], torch.zeros(2, 1, 7, 6)), lambda: pool.put([0, 1], [0, 1], fields(2, 1))):
        with pytest.raises(ValueError, match="needs as many slots and tickets"):
            call()
    pool.put([0], [0], fields(2, 1))
    with pytest.raises(ValueError, match="displacements of one size: it has .2, 7, 6., got .3, 5, 4, 6."):
        pool.put([0], [0], fields(3, 1))
    with pytest.raises(ValueError, match="displacements of one size"):
        pool.get([0], [0], torch.zeros(1, 1, 8, 8))
    for slot, ticket in ((2, 0), (-1, 0), (0, -1)):
        with pytest.raises(ValueError, match="expected slots 0 to 1 and tickets from 0"):
            pool.get([slot], [ticket], like)
