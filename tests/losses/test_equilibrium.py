# SPDX-License-Identifier: Apache-2.0
"""EquilibriumLoss on linear maps, whose residual, Jacobian and contraction are known."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from monai_deq.losses import EquilibriumLoss
from monai_deq.networks.blocks import RegistrationUNet, UNetUpdate
from monai_deq.networks.nets import DEQRegistrationNet

SIZES = {2: (24, 17), 3: (12, 9, 14)}


class Linear(torch.nn.Module):
    """``g(x) = factor * turn(x) + shift``, the turn by a right angle in the first two components."""

    hidden_channels = 0

    def __init__(self, factor: float, shift: float = 0.0) -> None:
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(factor))
        self.shift = shift

    def fixed_point_map(
        self, moving: torch.Tensor, fixed: torch.Tensor, relaxation: float = 1.0
    ) -> Callable[[torch.Tensor], torch.Tensor]:

        def g(x: torch.Tensor) -> torch.Tensor:
            turned = torch.cat([-x[:, 1:2], x[:, :1], x[:, 2:]], dim=1)
            return self.factor * turned + self.shift

        return g


class Nothing(torch.nn.Module):
    def forward(self, prediction: tuple, target: dict) -> torch.Tensor:
        return prediction[1].sum() * 0 + 5.0


def inputs(ndim: int, batch: int = 2) -> tuple[tuple, dict]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn((batch, ndim, *SIZES[ndim]), generator=generator).requires_grad_()
    image = torch.zeros(batch, 1, *SIZES[ndim])
    return (image, x, []), {"moving": image, "fixed": image}


@pytest.mark.parametrize("ndim", [2, 3])
def test_residual_is_the_mean_square_of_the_step(ndim: int) -> None:
    prediction, target = inputs(ndim)
    loss = EquilibriumLoss(Nothing(), Linear(0.0, 0.5), residual_weight=3.0)(prediction, target)
    x = prediction[1].detach().double()
    expected = sum(float((0.5 - x[:, i]).square().mean()) for i in range(ndim))
    assert float(loss) == pytest.approx(5 + 3 * expected, rel=1e-5)


@pytest.mark.parametrize("ndim", [2, 3])
def test_residual_of_a_proximal_map(ndim: int) -> None:
    prediction, target = inputs(ndim)
    update = UNetUpdate(ndim, RegistrationUNet(ndim, 2 + ndim, None, (2, 2), (2,), (2,)))
    torch.nn.init.zeros_(update.backbone.flow.weight)
    network = DEQRegistrationNet(update, num_states=0, proximal_weight=0.2)
    network.coarse = DEQRegistrationNet(update, num_states=0)
    loss = EquilibriumLoss(Nothing(), network, residual_weight=3.0)
    x = prediction[1].detach()
    # the update does nothing: the coarser solution is zero, and what remains is the pull to it, or to what is given
    for center in (None, torch.full_like(x, 0.5)):
        given = {} if center is None else {"proximal_center": center}
        expected = 0.04 * float((x - (0 if center is None else center)).square().sum(1).double().mean())
        assert float(loss(prediction, {**target, **given})) == pytest.approx(5 + 3 * expected, rel=1e-5)


@pytest.mark.parametrize("ndim", [2, 3])
def test_jacobian_is_its_square_norm_over_its_rows(ndim: int) -> None:
    prediction, target = inputs(ndim, batch=4)
    network = Linear(-0.7, 0.5)
    torch.manual_seed(0)
    loss = EquilibriumLoss(Nothing(), network, jacobian_weight=2.0)(prediction, target)
    # an orthogonal map times the factor: a mean of squares of normal numbers
    count = prediction[1].numel()
    assert float(loss) == pytest.approx(5 + 2 * 0.49, abs=2 * 0.49 * 5 * math.sqrt(2 / count))
    loss.backward()
    assert float(network.factor.grad) == pytest.approx(-4 * 0.7, rel=5 * math.sqrt(2 / count))


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("smoothness", [0.5, 8.0])
def test_contraction_is_what_remains_of_a_change(ndim: int, smoothness: float) -> None:
    prediction, target = inputs(ndim)
    network = Linear(0.8, 0.5)
    penalty = EquilibriumLoss(Nothing(), network, contraction_weight=2.0, contraction_smoothness=smoothness)
    values = [float(penalty(prediction, target).detach()) for _ in range(5)]
    assert all(v == pytest.approx(5 + 2 * 0.64, rel=1e-4) for v in values)


@pytest.mark.parametrize("ndim", [2, 3])
def test_contraction_along_the_step_meets_the_slowest_change(ndim: int) -> None:
    prediction, target = inputs(ndim)
    factors = torch.tensor([0.9] + [0.2] * (ndim - 1)).reshape(1, ndim, *[1] * ndim)
    x = prediction[1].detach()
    x[:, 1:] = 1.0  # these components have come to rest, the first one has not
    given: list[torch.Tensor] = []

    def g(y: torch.Tensor) -> torch.Tensor:
        given.append(y.detach())
        return 1 + factors * (y - 1)

    network = Linear(0.0)
    network.fixed_point_map = lambda *_, relaxation=1.0: g  # type: ignore[method-assign]
    penalty = EquilibriumLoss(Nothing(), network, contraction_weight=2.0, contraction_along_step=1.0)
    values = [float(penalty((None, x, []), target)) for _ in range(8)]
    assert values == pytest.approx([5 + 2 * 0.81] * 8, rel=1e-4)
    longest = [float((y - x).norm(dim=1).amax()) for y in given[1::2]]
    assert len(set(longest)) == 8 and min(longest) > 0.099 and max(longest) < 3.001 and max(longest) > 0.5
    other = EquilibriumLoss(Nothing(), network, contraction_weight=2.0)
    assert 5 < float(other((None, x, []), target)) < 5 + 2 * 0.7
    # at rest there is no step to go along
    assert float(penalty((None, torch.ones_like(x), []), target)) == 5


@pytest.mark.parametrize("ndim", [2, 3])
def test_agreement_is_what_remains_of_the_difference_of_two_iterations(ndim: int) -> None:
    prediction, target = inputs(ndim, batch=4)
    network = Linear(0.8, 0.5)
    loss = EquilibriumLoss(Nothing(), network, agreement_weight=2.0, agreement_rms=0.7)(prediction, target)
    x = prediction[1].detach().double()
    apart = torch.stack([(x[0] - x[1]).square().sum(0).mean(), (x[2] - x[3]).square().sum(0).mean()])
    shares = apart / (apart + 0.49)
    assert float(loss) == pytest.approx(5 + 2 * 0.64 * float(shares.mean()), rel=1e-5)
    loss.backward()
    # both iterations are drawn to one another: d(factor^2) once, not half of it
    assert float(network.factor.grad) == pytest.approx(2 * 1.6 * float(shares.mean()), rel=1e-5)
    # two iterations that have met cost nothing
    same = prediction[1].detach()[[0, 0]].requires_grad_()
    images = {key: image[:2] for key, image in target.items()}
    assert float(EquilibriumLoss(Nothing(), network, agreement_weight=2.0)((None, same, []), images)) == 5


def test_agreement_needs_each_pair_twice() -> None:
    prediction, target = inputs(2, batch=4)
    loss = EquilibriumLoss(Nothing(), Linear(0.8), agreement_weight=1.0)
    loss(prediction, target)
    for key in ("moving", "fixed"):
        other = {**target, key: target[key] + torch.tensor([0.0, 0, 0, 1]).reshape(4, 1, 1, 1)}
        with pytest.raises(ValueError, match="each pair must be in the batch twice in a row; give the PooledPairS"):
            loss(prediction, other)
    with pytest.raises(ValueError, match="an even batch size"):
        loss((None, prediction[1][:3], []), {key: image[:3] for key, image in target.items()})


def test_no_gradient_through_the_displacement_and_each_part_counts() -> None:
    prediction, target = inputs(2)
    network = Linear(0.8, 0.5)
    assert float(EquilibriumLoss(Nothing(), network)(prediction, target)) == 5
    penalty = EquilibriumLoss(Nothing(), network, 1.0, 1.0, 1.0, agreement_weight=1.0)
    assert list(penalty.parameters()) == []
    loss = penalty(prediction, target)
    loss.backward()
    assert prediction[1].grad.abs().sum() == 0 and network.factor.grad.abs() > 0
    assert float(loss) > 5 + 0.64 + 0.5


@pytest.mark.parametrize(
    "options, words",
    [
        ({"residual_weight": -1.0}, "residual_weight must not be negative, got -1.0"),
        ({"jacobian_weight": math.nan}, "jacobian_weight must not be negative, got nan"),
        ({"contraction_rms": 0.0}, "contraction_rms and contraction_smoothness must be above 0, got 0.0 and 8.0"),
        ({"contraction_along_step": 1.5}, r"contraction_along_step must be in \[0, 1\], got 1.5"),
        ({"agreement_weight": -0.1}, "agreement_weight must not be negative, got -0.1"),
        ({"agreement_rms": 0.0}, "agreement_rms must be above 0, got 0.0"),
        ({"warmup_steps": -1}, "warmup_steps must be a whole number, not negative, got -1"),
    ],
)
def test_refuses(options: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        EquilibriumLoss(Nothing(), Linear(0.5), **options)


def test_refuses_a_hidden_state_only_where_a_penalty_is_asked_for() -> None:
    network = Linear(0.5)
    network.hidden_channels = 3
    EquilibriumLoss(Nothing(), network)
    with pytest.raises(ValueError, match="network: the penalties are for maps of the displacement alone"):
        EquilibriumLoss(Nothing(), network, contraction_weight=0.1)


def test_penalties_warm_up() -> None:
    prediction, target = inputs(2)

    def new() -> EquilibriumLoss:
        return EquilibriumLoss(Nothing(), Linear(0.0, 0.5), residual_weight=3.0, warmup_steps=4)

    full = float(EquilibriumLoss(Nothing(), Linear(0.0, 0.5), residual_weight=3.0)(prediction, target)) - 5
    expected = [5 + full * share for share in (0, 0.25, 0.5, 0.75, 1, 1)]
    loss = new()
    assert [float(loss(prediction, target)) for _ in range(6)] == pytest.approx(expected, rel=1e-5)
    # a validation does not count, and a resumed training goes on
    loss, resumed = new(), new()
    for _ in range(2):
        loss(prediction, target)
    assert [float(loss.eval()(prediction, target)) for _ in range(2)] == pytest.approx([expected[2]] * 2, rel=1e-5)
    resumed.load_state_dict(loss.state_dict())
    assert [float(resumed(prediction, target)) for _ in range(2)] == pytest.approx(expected[2:4], rel=1e-5)


def test_random_changes_go_on_from_a_checkpoint() -> None:
    def bent(x: torch.Tensor) -> torch.Tensor:
        return torch.sin(3 * x)

    prediction, target = inputs(2)
    network = Linear(1.0)
    network.fixed_point_map = lambda *_, relaxation=1.0: bent  # type: ignore[method-assign]
    weights = {"contraction_weight": 1.0, "jacobian_weight": 1.0}
    whole, first, second = (EquilibriumLoss(Nothing(), network, **weights, seed=s) for s in (3, 3, 4))
    values = [float(whole(prediction, target).detach()) for _ in range(4)]
    assert len(set(values)) == 4
    torch.rand(5)  # of no matter
    assert [float(first(prediction, target).detach()) for _ in range(2)] == values[:2]
    second.load_state_dict(first.state_dict())
    assert [float(second(prediction, target).detach()) for _ in range(2)] == values[2:]


@pytest.mark.parametrize(
    "penalty",
    [
        {"contraction_weight": 1.0, "contraction_along_step": 0.0},
        {"contraction_weight": 1.0, "contraction_along_step": 1.0},
        {"jacobian_weight": 1.0},
    ],
)
def test_processes_draw_what_one_draws_for_all(monkeypatch: pytest.MonkeyPatch, penalty: dict[str, float]) -> None:
    torch.manual_seed(0)
    target = {name: torch.rand(4, 1, 9, 7) for name in ("fixed", "moving")}
    x = torch.randn(4, 2, 9, 7)
    network = Linear(1.0)
    network.fixed_point_map = lambda *_, relaxation=1.0: lambda u: torch.sin(3 * u)  # type: ignore[method-assign]

    def loss(items: slice) -> float:
        new = EquilibriumLoss(Nothing(), network, **penalty)
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
    loss = EquilibriumLoss(Nothing(), Linear(0.5).to("meta"), contraction_weight=1.0)
    loss(prediction, {"moving": image, "fixed": image})
    assert smoothed_on == ["meta", "meta"]
