# SPDX-License-Identifier: Apache-2.0
"""What batches become: arguments of the network, what the loss compares with, and where pairs of a pool start."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from monai.data import DataLoader, Dataset, MetaTensor
from nets import Pull, deq_net, pair_items, rest_settings

from monai_deq.data import StatePool
from monai_deq.engines import PreparePairBatch, PreparePooledPairBatch
from monai_deq.networks.nets import IteratedNet
from monai_deq.solvers import SolverRecord, random_smooth_ddf

#: all new pairs start from a random displacement of up to 2 voxels
ANYWHERE = rest_settings(random_start_share=1.0, random_start_rms=2.0)


class WithCoarse(IteratedNet):
    """Its coarser networks would give ``solution(moving, fixed)``; counts the pairs that they have solved for."""

    coarse = True  # type: ignore[assignment]

    def __init__(self, solution: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], weight: float = 0.0) -> None:
        super().__init__()
        self.solution, self.proximal_weight, self.solved = solution, weight, 0

    def coarse_start(
        self, moving: torch.Tensor, fixed: torch.Tensor, initial_ddf: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        self.solved += len(fixed)
        return self.solution(moving, fixed).expand(-1, fixed.ndim - 2, *fixed.shape[2:]), ()

    def fixed_point_map(self, moving: torch.Tensor, fixed: torch.Tensor, **kwargs: Any) -> Any:
        raise AssertionError("not asked for")

    def solve_state(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, SolverRecord]:
        raise AssertionError("not asked for")


def numbered_batch(ndim: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Four pairs whose fixed images are 0, 1, 2, 3, each a brighter moving one; and what a value a pair looks like."""
    size = (6, 5, 4)[:ndim]
    fixed = torch.arange(4.0).view(4, 1, *[1] * ndim).expand(4, 1, *size)
    return {"moving": fixed + 1, "fixed": fixed, "slot": torch.arange(4), "ticket": torch.arange(4)}, fixed


def fields(values: list[float], like: torch.Tensor) -> torch.Tensor:
    ndim = like.ndim - 2
    return torch.tensor(values).view(-1, *[1] * (ndim + 1)).expand(len(values), ndim, *like.shape[2:])


def test_prepare_batch() -> None:
    batch = next(iter(DataLoader(Dataset(pair_items(3)[:2]), batch_size=2)))
    moving, target, args, kwargs = PreparePairBatch()(batch, "cpu", dtype=torch.float64)
    (fixed,) = args
    assert kwargs == {} and target.keys() == {"moving", "fixed"}
    assert target["moving"] is moving and target["fixed"] is fixed
    for tensor, key in ((moving, "moving"), (fixed, "fixed")):
        assert type(tensor) is torch.Tensor and tensor.dtype == torch.float64
        torch.testing.assert_close(tensor, batch[key].as_tensor().double())
    swapped, _, (other,), _ = PreparePairBatch("fixed", "moving")(batch)
    torch.testing.assert_close(swapped, batch["fixed"].as_tensor())
    torch.testing.assert_close(other, batch["moving"].as_tensor())
    start = torch.randn(2, 3, *moving.shape[2:])
    _, _, (_, ddf), _ = PreparePairBatch()({**batch, "initial_ddf": MetaTensor(start)}, dtype=torch.float64)
    assert type(ddf) is torch.Tensor and torch.equal(ddf, start.double())


@pytest.mark.parametrize("prepare", [PreparePairBatch, lambda **kwargs: PreparePooledPairBatch(StatePool(2), **kwargs)])
def test_target_has_what_else_the_loss_wants(prepare: Any) -> None:
    batch = next(iter(DataLoader(Dataset(pair_items(3)[:2]), batch_size=2)))
    points = [MetaTensor(torch.rand(4, 3)), torch.rand(7, 3)]
    batch |= {"points": points, "slot": torch.arange(2), "ticket": torch.arange(2)}
    moving, target, *_ = prepare(target_keys=("fixed_label", "points"))(batch, "cpu", dtype=torch.float64)
    assert target.keys() == {"moving", "fixed", "fixed_label", "points"} and target["moving"] is moving
    assert type(target["fixed_label"]) is torch.Tensor
    torch.testing.assert_close(target["fixed_label"], batch["fixed_label"].as_tensor().double())
    for prepared, given in zip(target["points"], points, strict=True):
        assert type(prepared) is torch.Tensor and torch.equal(prepared, torch.as_tensor(given).double())
    with pytest.raises(KeyError, match=r"target_keys: the batch has no \['lung'\]"):
        prepare(target_keys=("lung",))(batch)


@pytest.mark.parametrize("ndim", [2, 3])
def test_new_pairs_may_start_anywhere(ndim: int) -> None:
    size, count = (12, 10, 8)[:ndim], 40
    images = torch.zeros(count, 1, *size)
    batch = {"moving": images, "fixed": images, "slot": torch.arange(count), "ticket": torch.arange(count)}
    pool = StatePool(count)
    pool.put([0, 1], [0, 1], torch.full((2, ndim, *size), 0.5))
    prepare = PreparePooledPairBatch(pool, rest=rest_settings(random_start_share=0.5, random_start_rms=2.0))
    _, _, (_, ddf), settings = prepare(batch)
    # what has been met goes on from where it stood
    torch.testing.assert_close(ddf[:2], torch.full((2, ndim, *size), 0.5))
    rms = ddf[2:].square().sum(dim=1).flatten(1).mean(dim=1).sqrt()
    assert rms.max() < 2 and 0.25 < float((rms > 0).float().mean()) < 0.75
    assert 0.5 < float(rms[rms > 0].mean()) < 1.5 and len(rms.unique()) > 10
    # the start of a pair is its own: a resumed training makes the same
    torch.testing.assert_close(prepare(batch)[2][1], ddf)
    assert settings == {}
    for rest in (None, rest_settings()):
        assert len(PreparePooledPairBatch(StatePool(count), rest=rest)(batch)[2]) == 1


@pytest.mark.parametrize("ndim", [2, 3])
def test_random_starts_depend_on_the_seed(ndim: int) -> None:
    shape, tickets = (4, 1, *(12, 10, 8)[:ndim]), [0, 1, 7, 2**20]
    batch = {key: torch.zeros(shape) for key in ("moving", "fixed")}
    batch |= {"slot": torch.arange(4), "ticket": torch.tensor(tickets)}

    def starts(**kwargs: int) -> torch.Tensor:
        return PreparePooledPairBatch(StatePool(4), rest=ANYWHERE, **kwargs)(batch)[2][1]

    # those of seed 0 are seeded by the ticket itself
    lengths = [float(torch.rand(2, generator=torch.Generator().manual_seed(t))[1]) for t in tickets]
    expected = [random_smooth_ddf((1, ndim, *shape[2:]), 2 * n, seed=t) for n, t in zip(lengths, tickets, strict=True)]
    assert torch.equal(starts(), torch.cat(expected)) and torch.equal(starts(seed=0), starts())
    fields = torch.cat([starts(seed=seed) for seed in (0, 1, 2, 2**31)])
    rms = fields.square().sum(dim=1).flatten(1).mean(dim=1).sqrt()
    assert len(rms.unique()) == len(rms) and torch.equal(starts(seed=1), starts(seed=1))


@pytest.mark.parametrize("ndim", [2, 3])
def test_random_starts_are_smoothed_on_the_device_of_the_images(ndim: int, smoothed_on: list[str]) -> None:
    batch = {key: torch.zeros(2, 1, *(12, 10, 8)[:ndim]) for key in ("moving", "fixed")}
    batch |= {"slot": torch.arange(2), "ticket": torch.arange(2)}
    _, _, (_, ddf), _ = PreparePooledPairBatch(StatePool(2), rest=ANYWHERE)(batch, "meta")
    assert ddf.device.type == "meta" and smoothed_on == ["meta", "meta"]


@pytest.mark.parametrize("ndim", [2, 3])
def test_new_pairs_among_others_start_from_the_coarse_solution(ndim: int) -> None:
    batch, fixed = numbered_batch(ndim)
    pool = StatePool(4)
    pool.put([0, 2], [0, 2], fields([0.5, 0.5], fixed))
    network = WithCoarse(lambda moving, fixed: 10 * fixed + moving)
    _, target, (_, ddf), settings = PreparePooledPairBatch(pool, network)(batch)
    torch.testing.assert_close(ddf, fields([0.5, 12, 0.5, 34], fixed))
    assert network.solved == 2 and settings == {} and set(target) == {"moving", "fixed"}
    # a network without coarser ones, one that knows of none, and none at all
    for other in (deq_net(Pull(), num_states=0), torch.nn.Linear(1, 1), None):
        ddf = PreparePooledPairBatch(pool, other)(batch)[2][1]
        assert float(ddf[1::2].abs().max()) == 0 and float(ddf[::2].min()) == 0.5
    # all of them new: the network finds its start itself
    assert len(PreparePooledPairBatch(StatePool(4), network)(batch)[2]) == 1 and network.solved == 2


@pytest.mark.parametrize("ndim", [2, 3])
def test_what_a_proximal_term_pulls_to_is_kept_with_the_pair(ndim: int) -> None:
    batch, fixed = numbered_batch(ndim)
    pool = StatePool(4)
    pool.put([0, 2], [0, 2], fields([0.25, 0.25], fixed))
    network = WithCoarse(lambda moving, fixed: 2 * fixed - moving + 1.5, 0.1)
    prepare = PreparePooledPairBatch(pool, network)
    centers, starts = fields([0.5, 1.5, 2.5, 3.5], fixed), fields([0.25, 1.5, 0.25, 3.5], fixed)
    for _ in range(2):  # the second time nothing is solved
        _, target, (_, ddf), settings = prepare(batch)
        torch.testing.assert_close(ddf, starts)
        torch.testing.assert_close(settings, {"proximal_center": centers})
        torch.testing.assert_close(target["proximal_center"], centers)
        assert network.solved == 4
    # another pair in a slot: solved for anew, and that pair alone
    prepare({**batch, "ticket": torch.tensor([0, 9, 2, 3])})
    assert network.solved == 5
    # random starts begin elsewhere and are pulled to the same
    _, _, (_, ddf), settings = PreparePooledPairBatch(StatePool(4), network, ANYWHERE)(batch)
    rms = ddf.square().sum(dim=1).flatten(1).mean(dim=1).sqrt()
    assert float(rms.max()) < 2 and len(rms.unique()) == 4
    torch.testing.assert_close(settings["proximal_center"], centers)
    # without coarser networks it pulls to zero, which needs no keeping
    assert PreparePooledPairBatch(pool, deq_net(Pull(), proximal_weight=0.1)).centers is None


def test_a_batch_without_slots_is_refused() -> None:
    batch, _ = numbered_batch(2)
    del batch["ticket"]
    with pytest.raises(KeyError, match=r"a pooled batch needs \['ticket'\]: use PooledDataset with a PooledSampler"):
        PreparePooledPairBatch(StatePool(4))(batch)
