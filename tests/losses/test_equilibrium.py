# SPDX-License-Identifier: Apache-2.0
"""EquilibriumLoss on linear maps, whose contraction is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from nets import deq_net, rest_settings, tiny_recurrent_update

from monai_deq.losses import EquilibriumLoss
from monai_deq.networks.nets import RestSettings, UnrolledRegistrationNet

SIZES = {2: (14, 9), 3: (8, 6, 9)}


class Linear(torch.nn.Module):
    """``g(x) = factor * turn(x) + shift``, the turn by a right angle in the first two components."""

    def __init__(self, factor: float, shift: float = 0.0) -> None:
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(factor))
        self.shift = shift

    def forward(self, moving: torch.Tensor, fixed: torch.Tensor, ddf: torch.Tensor) -> torch.Tensor:
        turned = torch.cat([-ddf[:, 1:2], ddf[:, :1], ddf[:, 2:]], dim=1)
        return self.factor * turned + self.shift - ddf


class Given(torch.nn.Module):
    """A map that is a function, and what it was given."""

    def __init__(self, g: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.g = g
        self.given: list[torch.Tensor] = []

    def forward(self, moving: torch.Tensor, fixed: torch.Tensor, ddf: torch.Tensor) -> torch.Tensor:
        self.given.append(ddf.detach())
        return self.g(ddf) - ddf


class Nothing(torch.nn.Module):
    def forward(self, prediction: tuple, target: dict) -> torch.Tensor:
        return prediction[1].sum() * 0 + 5.0


def inputs(ndim: int, batch: int = 2) -> tuple[tuple, dict]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn((batch, ndim, *SIZES[ndim]), generator=generator).requires_grad_()
    image = torch.zeros(batch, 1, *SIZES[ndim])
    return (image, x, []), {"moving": image, "fixed": image}


def penalty(update: torch.nn.Module, weight: float = 2.0, seed: int = 0, **rest: Any) -> EquilibriumLoss:
    network = deq_net(update, relaxation=0.5)
    return EquilibriumLoss(Nothing(), network, rest_settings(contraction_weight=weight, **rest), seed)


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("along_step", [0.0, 1.0])
def test_contraction_is_what_remains_of_a_change(ndim: int, along_step: float) -> None:
    prediction, target = inputs(ndim)
    # of full steps, however the network takes them
    loss = penalty(Linear(0.8, 0.5), contraction_along_step=along_step)
    values = [float(loss(prediction, target).detach()) for _ in range(5)]
    assert values == pytest.approx([5 + 2 * 0.64] * 5, rel=1e-4)


@pytest.mark.parametrize("ndim", [2, 3])
def test_contraction_of_a_proximal_map(ndim: int) -> None:
    prediction, target = inputs(ndim)
    solved: list[int] = []
    silent = Given(lambda x: x)
    coarse = deq_net(Given(lambda x: x), num_states=0)
    coarse.update.register_forward_pre_hook(lambda *_: solved.append(1))
    network = deq_net(silent, coarse=coarse, proximal_weight=0.2)
    loss = EquilibriumLoss(Nothing(), network, rest_settings(contraction_weight=2.0))
    # the update does nothing: what remains is the pull, to what is given or to the coarser solution
    for center, solves in ((torch.full_like(prediction[1], 0.5), 0), (None, 1)):
        given = {} if center is None else {"proximal_center": center}
        assert float(loss(prediction, {**target, **given})) == pytest.approx(5 + 2 * 0.64, rel=1e-4)
        assert len(solved) == solves


@pytest.mark.parametrize("ndim", [2, 3])
def test_contraction_along_the_step_meets_the_slowest_change(ndim: int) -> None:
    prediction, target = inputs(ndim)
    factors = torch.tensor([0.9] + [0.2] * (ndim - 1)).reshape(1, ndim, *[1] * ndim)
    x = prediction[1].detach()
    x[:, 1:] = 1.0  # these components have come to rest, the first one has not
    update = Given(lambda y: 1 + factors * (y - 1))
    loss = penalty(update, contraction_along_step=1.0)
    values = [float(loss((None, x, []), target)) for _ in range(8)]
    assert values == pytest.approx([5 + 2 * 0.81] * 8, rel=1e-4)
    longest = [float((y - x).norm(dim=1).amax()) for y in update.given[1::2]]
    assert len(set(longest)) == 8 and min(longest) > 0.099 and max(longest) < 3.001 and max(longest) > 0.5
    # at rest there is no step to go along
    assert float(loss((None, torch.ones_like(x), []), target)) == 5
    other = penalty(update, contraction_along_step=0.0)
    assert 5 < float(other((None, x, []), target)) < 5 + 2 * 0.7


@pytest.mark.parametrize("ndim", [2, 3])
def test_random_changes_are_smooth_and_of_many_lengths(ndim: int) -> None:
    prediction, target = inputs(ndim)
    x = prediction[1].detach()
    update = Given(lambda y: 0.5 * y)
    loss = penalty(update, contraction_along_step=0.0)
    for _ in range(12):
        loss((None, x, []), target)
    changes = [y - x for y in update.given[1::2]]
    rms = torch.stack([e.square().sum(1).flatten(1).mean(1).sqrt() for e in changes])
    # one length for the items of a batch, log-uniform between 0.1 and 3 voxels
    torch.testing.assert_close(rms[:, 0], rms[:, 1], rtol=1e-4, atol=1e-6)
    assert 0.0999 < float(rms.min()) < 0.4 and 0.9 < float(rms.max()) < 3.001 and len(rms[:, 0].unique()) == 12
    assert not torch.allclose(changes[0][0], changes[0][1])
    # from single voxels that are on their own to fields of one piece
    alike = [float((e[..., 1:] * e[..., :-1]).mean() / e.square().mean()) for e in changes]
    assert min(alike) < 0.5 and max(alike) > 0.8


def test_share_of_the_draws_along_the_step() -> None:
    prediction, target = inputs(2)
    update = Given(lambda y: 0.5 * y)
    loss, x = penalty(update, contraction_along_step=0.25), prediction[1].detach()
    for _ in range(60):
        loss((None, x, []), target)
    steps = [e / e.norm() for e in (y[0] - x[0] for y in update.given[1::2])]
    along = sum(bool((e + x[0] / x[0].norm()).abs().max() < 1e-4) for e in steps)
    assert 60 * 0.25 / 2 < along < 60 * 0.25 * 1.6


def test_no_gradient_through_the_displacement_and_none_of_it_unasked() -> None:
    prediction, target = inputs(2)
    torch.nn.init.zeros_(prediction[1])
    network = deq_net(Linear(0.8, 0.5))
    for rest in (None, RestSettings(enabled=False), rest_settings()):
        assert float(EquilibriumLoss(Nothing(), network, rest)(prediction, target)) == 5
    loss = penalty(network.update, 1.0)
    assert list(loss.parameters()) == []
    value = loss(prediction, target)
    value.backward()
    assert prediction[1].grad.abs().sum() == 0
    # d/d factor of factor^2, at a state of zero, where g(x) does not depend on it
    assert float(network.update.factor.grad) == pytest.approx(2 * 0.8, rel=1e-4)
    assert float(value) == pytest.approx(5.64, rel=1e-4)


def test_refuses_other_maps_only_where_the_penalty_is_asked_for() -> None:
    others = deq_net(tiny_recurrent_update(2)), UnrolledRegistrationNet(spatial_dims=2), torch.nn.Linear(1, 1)
    for network in others:
        EquilibriumLoss(Nothing(), network)
        with pytest.raises(ValueError, match=f"network: the contraction is for a DEQ.*, {type(network).__name__} has"):
            EquilibriumLoss(Nothing(), network, RestSettings())


@pytest.mark.parametrize("along_step", [0.0, 0.5, 1.0])
def test_random_changes_go_on_from_a_checkpoint(along_step: float) -> None:
    prediction, target = inputs(2)
    bent = Given(lambda x: torch.sin(3 * x))
    whole, first, second = (penalty(bent, seed=s, contraction_along_step=along_step) for s in (3, 3, 4))
    values = [float(whole(prediction, target).detach()) for _ in range(4)]
    assert len(set(values)) == 4
    torch.rand(5)  # of no matter
    assert [float(first(prediction, target).detach()) for _ in range(2)] == values[:2]
    second.load_state_dict(first.state_dict())
    assert [float(second(prediction, target).detach()) for _ in range(2)] == values[2:]


@pytest.mark.parametrize("along_step", [0.0, 1.0])
def test_processes_draw_what_one_draws_for_all(monkeypatch: pytest.MonkeyPatch, along_step: float) -> None:
    torch.manual_seed(0)
    target = {name: torch.rand(4, 1, 9, 7) for name in ("fixed", "moving")}
    x = torch.randn(4, 2, 9, 7)

    def loss(items: slice) -> float:
        new = penalty(Given(lambda u: torch.sin(3 * u)), 1.0, contraction_along_step=along_step)
        part = {name: image[items] for name, image in target.items()}
        return float(new((part["moving"], x[items], []), part))

    whole = loss(slice(None))
    monkeypatch.setattr("monai_deq.losses.equilibrium.process_count", lambda: 2)
    parts = []
    for rank in range(2):
        monkeypatch.setattr("monai_deq.losses.equilibrium.process_rank", lambda rank=rank: rank)
        parts.append(loss(slice(rank, None, 2)))
    assert sum(parts) / 2 == pytest.approx(whole, rel=1e-5) and parts[0] != pytest.approx(parts[1], rel=1e-3)


@pytest.mark.parametrize("ndim", [2, 3])
def test_random_changes_are_smoothed_on_the_device_of_the_displacement(ndim: int, smoothed_on: list[str]) -> None:
    image = torch.zeros(2, 1, *SIZES[ndim], device="meta")
    prediction = (image, torch.zeros(2, ndim, *SIZES[ndim], device="meta"), [])
    loss = penalty(Linear(0.5).to("meta"), contraction_along_step=0.0)
    loss(prediction, {"moving": image, "fixed": image})
    assert smoothed_on == ["meta", "meta"]
