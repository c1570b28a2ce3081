# SPDX-License-Identifier: Apache-2.0
"""The equilibrium network: what it returns, from where it starts, what it refuses."""

from __future__ import annotations

import io
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from monai.data import MetaTensor
from monai.networks.blocks import Warp
from nets import Pull, deq_net, pair, tiny_recurrent_update, tiny_update

from monai_deq.networks.blocks import UNetUpdate
from monai_deq.networks.nets import DEQRegistrationNet, GradientSettings, RestSettings
from monai_deq.solvers import SolverSettings

SIZES = [(9, 7), (5, 3, 4)]


class Push(torch.nn.Module):
    """``g(ddf) = rate * ddf + 1``: the residual grows where ``rate > 1``."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = torch.nn.Parameter(torch.tensor(rate, dtype=torch.float64))

    def forward(self, moving: torch.Tensor, fixed: torch.Tensor, ddf: torch.Tensor) -> torch.Tensor:
        return (self.rate - 1) * ddf + 1


class Counter(torch.nn.Module):
    """Moves the displacement by one voxel, and its hidden state counts the steps."""

    hidden_channels = 2

    def forward(
        self, moving: torch.Tensor, fixed: torch.Tensor, ddf: torch.Tensor, hidden: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.ones_like(ddf), hidden + 1


def tiny_net(spatial_dims: int, **kwargs: Any) -> DEQRegistrationNet:
    return deq_net(tiny_update(spatial_dims), **{"max_steps": 8, "num_states": 1, "tolerance": 0.0, **kwargs})


def iterate(g: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, steps: int) -> torch.Tensor:
    for _ in range(steps):
        x = g(x)
    return x


@pytest.mark.parametrize("size", SIZES)
def test_builds_from_spatial_dims_alone(size: tuple[int, ...]) -> None:
    net = DEQRegistrationNet(spatial_dims=len(size), solver=SolverSettings(max_steps=4))
    moving, fixed = pair(size)
    warped, ddf = net.eval()(moving, fixed)
    assert warped.shape == moving.shape and ddf.shape == (2, len(size), *size)
    assert 0 < ddf.abs().max() < 1e-3  # untrained: next to no displacement


def test_default_settings() -> None:
    net = DEQRegistrationNet()
    assert net.solver == SolverSettings() and net.gradient == GradientSettings()
    assert net.rest == RestSettings(enabled=False) and net.coarse is None
    assert sum(p.numel() for p in net.parameters()) == 328_627
    warped, ddf, states = tiny_net(2, max_steps=48, num_states=3).train()(*pair((5, 4)))
    assert len(states) == 3 and isinstance(states, list)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("phantom", [(1, 1.0), (3, 0.5)])
@pytest.mark.parametrize(("max_steps", "num_states", "at"), [(8, 3, [2, 4, 6]), (8, 0, []), (10, 3, [4, 6, 8])])
def test_states_in_training(
    size: tuple[int, ...], phantom: tuple[int, float], max_steps: int, num_states: int, at: list[int]
) -> None:
    steps, damping = phantom
    net = tiny_net(
        len(size), max_steps=max_steps, num_states=num_states, phantom_steps=steps, phantom_damping=damping
    ).double()
    moving, fixed = (image.double() for image in pair(size))
    warped, ddf, states = net.train()(moving, fixed)

    def g(ddf: torch.Tensor) -> torch.Tensor:
        return ddf + net.update(moving, fixed, ddf)

    def damped(ddf: torch.Tensor) -> torch.Tensor:
        return damping * g(ddf) + (1 - damping) * ddf

    zero = torch.zeros(2, len(size), *size, dtype=torch.float64)
    with torch.no_grad():
        expected = [iterate(damped, iterate(g, zero, k), steps) for k in [*at, max_steps]]
    assert len(states) == num_states
    assert expected[-1].std() > 0.01  # it moves
    for state, value in zip([*states, ddf], expected, strict=True):
        torch.testing.assert_close(state, value, rtol=0, atol=1e-12)
        assert state.requires_grad
    torch.testing.assert_close(warped, Warp()(moving, ddf), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("solver", "options"), [("plain", {}), ("anderson", {"window": 1})])
def test_final_state_where_the_residual_grows(solver: str, options: dict[str, Any]) -> None:
    # phi_n = (rate^n - 1) / (rate - 1): the first state has the lowest residual
    net = deq_net(Push(1.5), max_steps=8, num_states=3, phantom_steps=2, solver=solver, solver_options=options)
    moving, fixed = (image.double() for image in pair((3, 4)))
    _, ddf, states = net.train()(moving, fixed)
    for state, n in zip([*states, ddf], (4, 6, 8, 10), strict=True):
        torch.testing.assert_close(state, torch.full_like(state, (1.5**n - 1) / 0.5))
    _, ddf = net.eval()(moving, fixed)
    torch.testing.assert_close(ddf, torch.full_like(ddf, (1.5**8 - 1) / 0.5))


def test_states_where_all_stop_early() -> None:
    moving, fixed = pair((3, 4))
    net = deq_net(Pull(1.0), max_steps=48, num_states=3, phantom_steps=1)
    _, ddf, states = net.train()(moving, fixed)
    assert len(states) == 3
    for state in (*states, ddf):
        torch.testing.assert_close(state, (fixed - moving).expand(-1, 2, -1, -1))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("solver", ["plain", "anderson"])
def test_known_fixed_point(size: tuple[int, ...], solver: str) -> None:
    moving, fixed = pair(size)
    net = deq_net(Pull(), solver=solver, tolerance=1e-5).eval()
    warped, ddf = net(moving, fixed)
    expected = (fixed - moving).expand(-1, len(size), *size)
    torch.testing.assert_close(ddf, expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(warped, Warp()(moving, ddf), rtol=0, atol=1e-5)
    assert not ddf.requires_grad


@pytest.mark.parametrize("size", SIZES)
def test_batch_is_its_items(size: tuple[int, ...]) -> None:
    moving, fixed = pair(size)
    net = tiny_net(len(size), tolerance=1e-2).eval()
    ddf, record = net.solve(moving, fixed)
    alone = [net.solve(moving[i : i + 1], fixed[i : i + 1]) for i in range(2)]
    torch.testing.assert_close(ddf, torch.cat([a[0] for a in alone]), rtol=0, atol=1e-6)
    assert record.steps.tolist() == [int(a[1].steps) for a in alone]


@pytest.mark.parametrize("training", [False, True])
def test_warm_start(training: bool) -> None:
    moving, fixed = pair((5, 4))
    net = deq_net(Pull(), tolerance=1e-4, phantom_steps=1).train(training)
    solution, cold = net.solve(moving, fixed)
    assert cold.steps.min() > 5
    again, warm = net.solve(moving, fixed, solution)
    assert warm.steps.tolist() == [1, 1] and warm.converged.all()
    torch.testing.assert_close(again, solution, rtol=0, atol=1e-4)
    # one step from elsewhere: the start is really used
    start = torch.ones(2, 2, 5, 4, dtype=torch.float16)
    net = deq_net(Pull(), max_steps=1, num_states=0, tolerance=0.0, phantom_steps=1).train(training)
    ddf = net(moving, fixed, start)[1]
    steps = 2 if training else 1
    expected = iterate(lambda x: 0.5 * (x + fixed - moving), start.float(), steps)
    torch.testing.assert_close(ddf, expected)


def test_settings_of_one_solve() -> None:
    moving, fixed = (image.double() for image in pair((5, 4)))
    net = deq_net(Pull(), solver="plain", solver_options={"damping": 0.5}, tolerance=0.0, max_steps=3, num_states=0)
    net = net.double()
    target = (fixed - moving).expand(-1, 2, -1, -1)
    # share 0.5, damping 0.5: a quarter of the way at each step
    torch.testing.assert_close(net.solve(moving, fixed)[0], (1 - 0.75**3) * target)
    torch.testing.assert_close(net.solve(moving, fixed, max_steps=5)[0], (1 - 0.75**5) * target)
    # another solver does not get the options of the first
    ddf, record = net.solve(moving, fixed, name="anderson", max_steps=20, tolerance=1e-12)
    assert record.converged.all()
    torch.testing.assert_close(ddf, target, rtol=0, atol=1e-10)
    ddf, record = net.solve(moving, fixed, options={}, relative_tolerance=0.2, max_steps=20)
    # |g - x| / |g| = 0.5^k / (1 - 0.5^k) is 1/3 at the second step and 1/7 at the third
    assert record.reason == ("relative tolerance",) * 2 and record.steps.tolist() == [3, 3]
    with pytest.raises(TypeError, match="max_iter"):
        net.solve(moving, fixed, max_iter=3)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("solver", ["plain", "anderson"])
def test_relaxed_steps_lead_to_the_same_fixed_point(size: tuple[int, ...], solver: str) -> None:
    moving, fixed = (image.double() for image in pair(size))
    target = (fixed - moving).expand(-1, len(size), *size)
    # full steps overshoot by their own length and more: they never come to rest
    overshooting = deq_net(Pull(2.1), max_steps=60, tolerance=1e-9).double().eval()
    assert overshooting.solve(moving, fixed)[1].residual[:, -1].min() > 1
    network = deq_net(Pull(2.1), max_steps=60, tolerance=1e-9, relaxation=0.6, solver=solver)
    network = network.double().eval()
    ddf, record = network.solve(moving, fixed)
    assert record.converged.all()
    torch.testing.assert_close(ddf, target, rtol=0, atol=1e-7)
    if solver == "plain":
        # the distance shrinks to 1 - 0.6 * 2.1 = -0.26 of itself
        torch.testing.assert_close(network.solve(moving, fixed, max_steps=3)[0], (1 + 0.26**3) * target)
    start = torch.zeros_like(target)
    torch.testing.assert_close(network.fixed_point_map(moving, fixed)(start), 1.26 * target)
    torch.testing.assert_close(network.fixed_point_map(moving, fixed, relaxation=1.0)(start), 2.1 * target)


@pytest.mark.parametrize("size", SIZES)
def test_proximal_term_bounds_what_a_step_leaves(size: tuple[int, ...]) -> None:
    """Where the update says nothing, a step leaves 1 - weight of the displacement; the hidden state is its own."""
    moving, fixed = (image.double() for image in pair(size))
    start = torch.randn(2, len(size), *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    settings: dict[str, Any] = {"num_states": 0, "tolerance": 0.0, "proximal_weight": 0.3}
    silent = deq_net(Pull(0.0), max_steps=5, **settings).double().eval()
    torch.testing.assert_close(silent.solve(moving, fixed, start)[0], 0.7**5 * start)
    torch.testing.assert_close(silent.fixed_point_map(moving, fixed)(start), 0.7 * start)
    hidden = deq_net(Counter(), max_steps=3, **settings).double().eval()
    state, _ = hidden.solve_state(moving, fixed, start)
    ndim = len(size)
    torch.testing.assert_close(state[:, :ndim], 0.7**3 * start + 0.7**2 + 0.7 + 1)
    torch.testing.assert_close(state[:, ndim:], torch.full_like(state[:, ndim:], 3.0))


@pytest.mark.parametrize("size", SIZES)
def test_phantom_steps_are_full_steps(size: tuple[int, ...]) -> None:
    moving, fixed = (image.double() for image in pair(size))
    target = (fixed - moving).expand(-1, len(size), *size)
    network = deq_net(Pull(0.5), max_steps=4, num_states=1, tolerance=0.0, phantom_steps=2, relaxation=0.4).double()
    warped, ddf, states = network.train()(moving, fixed)
    # 0.8 of the distance is left by a short step, 0.5 by a full one
    torch.testing.assert_close(ddf, (1 - 0.8**4 * 0.5**2) * target)
    torch.testing.assert_close(states[0], (1 - 0.8**2 * 0.5**2) * target)
    # and the gradient is that of the full steps: d/ds of 1 - 0.8^4 (1 - s)^2
    ddf.sum().backward()
    expected = 0.8**4 * 2 * 0.5 * target.sum()
    torch.testing.assert_close(network.update.share.grad, expected.to(torch.float32).to(network.update.share.dtype))


def test_steps_of_one_call() -> None:
    moving, fixed = (image.double() for image in pair((5, 4)))
    network = deq_net(Pull(), max_steps=6, num_states=1, tolerance=0.0, phantom_steps=1).double().eval()
    _, ddf = network(moving, fixed, max_steps=4)
    torch.testing.assert_close(ddf, (1 - 0.5**4) * (fixed - moving).expand(-1, 2, -1, -1))
    with pytest.raises(ValueError, match="max_steps must be a whole number of at least 1, got 0"):
        network(moving, fixed, max_steps=0)


@pytest.mark.parametrize("image_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [False, True])
def test_state_is_float32_under_autocast(training: bool, image_dtype: torch.dtype) -> None:
    moving, fixed = (image.to(image_dtype) for image in pair((6, 4)))
    net = tiny_net(2, max_steps=4).train(training)
    kinds = []
    assert isinstance(net.update, UNetUpdate)
    net.update.backbone.register_forward_hook(lambda module, inputs, output: kinds.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        warped, ddf, *states = net(moving, fixed)
    assert set(kinds) == {torch.bfloat16}  # autocast was at work
    assert ddf.dtype == torch.float32 and all(s.dtype == torch.float32 for s in sum(states, []))
    assert warped.dtype == image_dtype
    with torch.no_grad():
        expected = net.float()(moving.float(), fixed.float())[1]
    torch.testing.assert_close(ddf, expected, rtol=0, atol=0.02 * float(expected.abs().max()))
    # not a sum of numbers rounded to bfloat16
    assert not torch.equal(ddf, ddf.bfloat16().float())


@pytest.mark.parametrize("gradient", ["phantom", "implicit"])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_gradients_reach_all_parameters(size: tuple[int, ...], autocast: bool, gradient: str) -> None:
    moving, fixed = pair(size)
    net = tiny_net(len(size), max_steps=4, gradient=gradient, implicit_max_steps=3).train()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        warped, ddf, states = net(moving, fixed)
    for loss in (warped.sum(), ddf.square().mean(), states[0].square().mean()):
        net.zero_grad()
        loss.backward(retain_graph=True)
        for name, parameter in net.named_parameters():
            assert parameter.grad is not None and bool(parameter.grad.abs().max() > 0), name
            assert bool(parameter.grad.isfinite().all()), name


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("phantom", [(1, 1.0), (3, 0.5)])
def test_hidden_state_in_training(size: tuple[int, ...], phantom: tuple[int, float]) -> None:
    ndim = len(size)
    steps, damping = phantom
    update = tiny_recurrent_update(ndim).double()
    net = deq_net(update, max_steps=6, num_states=2, tolerance=0.0, phantom_steps=steps, phantom_damping=damping)
    moving, fixed = (image.double() for image in pair(size))
    start = 0.3 * torch.ones(2, ndim, *size, dtype=torch.float64)
    warped, ddf, states = net.train()(moving, fixed, start)

    def g(state: torch.Tensor) -> torch.Tensor:
        delta, hidden = update(moving, fixed, state[:, :ndim], state[:, ndim:])
        return torch.cat([state[:, :ndim] + delta, hidden], dim=1)

    zero = torch.cat([start, torch.zeros(2, 4, *size, dtype=torch.float64)], dim=1)
    with torch.no_grad():
        expected = [
            iterate(lambda x: damping * g(x) + (1 - damping) * x, iterate(g, zero, k), steps)[:, :ndim]
            for k in (2, 4, 6)
        ]
    assert expected[-1].std() > 0.01
    for state, value in zip([*states, ddf], expected, strict=True):
        torch.testing.assert_close(state, value, rtol=0, atol=1e-12)
    torch.testing.assert_close(warped, Warp()(moving, ddf), rtol=0, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(net.eval()(moving, fixed, start)[1], iterate(g, zero, 6)[:, :ndim])


@pytest.mark.parametrize("gradient", ["phantom", "implicit"])
@pytest.mark.parametrize("size", SIZES)
def test_gradients_of_a_recurrent_update(size: tuple[int, ...], gradient: str) -> None:
    moving, fixed = pair(size)
    net = deq_net(
        tiny_recurrent_update(len(size)), max_steps=4, num_states=1, gradient=gradient, implicit_max_steps=3
    ).train()
    warped, ddf, states = net(moving, fixed)
    assert ddf.shape == states[0].shape == (2, len(size), *size)
    for loss in (warped.sum(), ddf.square().mean(), states[0].square().mean()):
        net.zero_grad()
        loss.backward(retain_graph=True)
        for name, parameter in net.named_parameters():
            assert parameter.grad is not None and bool(parameter.grad.any()), name
            assert bool(parameter.grad.isfinite().all()), name


@pytest.mark.parametrize("solver", ["plain", "anderson"])
@pytest.mark.parametrize("size", SIZES)
def test_solve_with_hidden_state(size: tuple[int, ...], solver: str) -> None:
    moving, fixed = pair(size)
    net = deq_net(tiny_recurrent_update(len(size)), solver=solver, max_steps=5, tolerance=0.0)
    ddf, record = net.solve(moving, fixed)
    assert ddf.shape == (2, len(size), *size) and record.steps.tolist() == [5, 5]
    # a result holds no memory of the hidden state
    assert ddf.untyped_storage().nbytes() == ddf.numel() * 4
    # the first residual is the first displacement
    first, _ = net.solve(moving, fixed, max_steps=1)
    torch.testing.assert_close(record.residual[:, 0], first.square().sum(1).flatten(1).mean(1).sqrt())
    with torch.autocast("cpu", torch.bfloat16):
        half, _ = net.solve(moving, fixed)
    assert half.dtype == torch.float32 and not torch.equal(half, half.bfloat16().float())


@pytest.mark.parametrize("training", [False, True])
def test_large_hidden_state_hides_no_motion(training: bool) -> None:
    class PullBeside(torch.nn.Module):
        hidden_channels = 1

        def forward(self, moving: Any, fixed: Any, ddf: Any, hidden: Any) -> tuple[torch.Tensor, torch.Tensor]:
            return 0.5 * (fixed - moving - ddf), torch.full_like(hidden, 1e3)

    moving, fixed = (image.double() for image in pair((3, 4)))
    net = deq_net(PullBeside(), tolerance=0.0, relative_tolerance=0.01, num_states=0, phantom_steps=1)
    ddf = net.train(training)(moving, fixed)[1]
    # 0.5^k / (1 - 0.5^k) <= 0.01 first at k = 7; in training one more step follows
    torch.testing.assert_close(ddf, ((1 - 0.5 ** (8 if training else 7)) * (fixed - moving)).expand_as(ddf))


def test_nothing_is_hidden_in_training() -> None:
    moving, fixed = pair((3, 4))
    fixed[1] = float("nan")
    net = deq_net(Pull(), max_steps=4, num_states=1)
    _, ddf, states = net.train()(moving, fixed)
    for state in (*states, ddf):
        assert bool(state[0].isfinite().all()) and bool(state[1].isnan().all())
    _, record = net.solve(moving, fixed)
    assert record.reason == ("step limit", "non-finite")


def test_meta_tensors() -> None:
    moving, fixed = pair((6, 4))
    net = tiny_net(2).eval()
    expected = net(moving, fixed)
    for got, value in zip(net(MetaTensor(moving), MetaTensor(fixed)), expected, strict=True):
        torch.testing.assert_close(torch.Tensor(got), value)


@pytest.mark.parametrize("size", SIZES)
def test_state_dict_and_copies(size: tuple[int, ...]) -> None:
    moving, fixed = pair(size)
    net = tiny_net(len(size)).eval()
    expected = net(moving, fixed)[1]
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    other = tiny_net(len(size)).eval()
    for p in other.parameters():
        torch.nn.init.normal_(p, std=0.1)
    assert not torch.equal(other(moving, fixed)[1], expected)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(moving, fixed)[1], expected)

    twin = deepcopy(net)
    assert torch.equal(twin(moving, fixed)[1], expected)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert not torch.equal(twin(moving, fixed)[1], expected)
    assert torch.equal(net(moving, fixed)[1], expected)
    twin.train()(moving, fixed)[1].sum().backward()
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"spatial_dims": 1}, "spatial_dims must be 2 or 3, got 1"),
        ({"num_states": -1}, "num_states must not be negative, got -1"),
        ({"max_steps": 3}, "num_states must be between 0 and max_steps - 1, got num_states=3, max_steps=3"),
        ({"max_steps": 0, "num_states": 0}, "max_steps must be a whole number of at least 1, got 0"),
        ({"phantom_steps": 0}, "gradient steps must be at least 1, got 0"),
        ({"phantom_damping": 0.0}, r"gradient damping must be in \(0, 1\], got 0.0"),
        ({"phantom_damping": 1.1}, r"gradient damping must be in \(0, 1\], got 1.1"),
        ({"checkpointed": "false"}, "checkpointed must be True or False, got 'false'"),
        ({"enabled": "false"}, "enabled must be True or False, got 'false'"),
        ({"gradient": "exact"}, 'gradient kind must be "phantom" or "implicit", got \'exact\''),
        ({"implicit_max_steps": 0}, "implicit_max_steps must be at least 1, got 0"),
        ({"implicit_tolerance": float("nan")}, "implicit_tolerance must not be negative, got nan"),
        ({"relaxation": 0.0}, r"relaxation must be in \(0, 1\], got 0.0"),
        ({"relaxation": 1.1}, r"relaxation must be in \(0, 1\], got 1.1"),
        ({"proximal_weight": 1.0}, r"proximal_weight must be in \[0, 1\), got 1.0"),
        ({"proximal_weight": -0.1}, r"proximal_weight must be in \[0, 1\), got -0.1"),
        ({"contraction_weight": -1.0}, "contraction_weight must not be negative, got -1.0"),
        ({"contraction_weight": float("nan")}, "contraction_weight must not be negative, got nan"),
        ({"contraction_along_step": 1.5}, r"contraction_along_step must be in \[0, 1\], got 1.5"),
        ({"pool_slots": 0}, "pool_slots must be a whole number of at least 1, got 0"),
        ({"pool_slots": 1.5}, "pool_slots must be a whole number of at least 1, got 1.5"),
        ({"pool_renewal": 0.0}, r"pool_renewal must be in \(0, 1\], got 0.0"),
        ({"random_start_share": 1.5}, r"random_start_share must be in \[0, 1\], got 1.5"),
        ({"random_start_rms": -1.0}, "random_start_rms must not be negative, got -1.0"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        deq_net(**{"spatial_dims": 2, **arguments})


def test_rest_that_is_not_enabled_is_the_papers_recipe() -> None:
    rest = RestSettings(enabled=False)
    assert (rest.relaxation, rest.proximal_weight, rest.contraction_weight) == (1, 0, 0)
    assert (rest.pool_renewal, rest.random_start_share) == (1, 0) and rest.enabled is False
    own = RestSettings()
    assert (own.relaxation, own.proximal_weight, own.contraction_weight) == (0.5, 0.1, 0.03)
    assert (own.pool_renewal, own.random_start_share) == (0.2, 0.4) and own.enabled is True
    # again from what it says of itself, and nothing that it would pass over
    assert RestSettings(**vars(rest)) == rest and RestSettings(**vars(own)) == own
    for name, value in (("relaxation", 0.3), ("proximal_weight", 0.2), ("random_start_share", 1.0)):
        with pytest.raises(ValueError, match=f"{name} {value} does nothing unless rest is enabled: leave it out, or"):
            RestSettings(**{name: value}, enabled=False)
    # g(phi) = phi + f(phi), from where it is
    moving, fixed = pair((5, 4))
    network = DEQRegistrationNet(Pull(0.5), solver=SolverSettings(max_steps=4, tolerance=0.0), rest=rest).eval()
    torch.testing.assert_close(network(moving, fixed)[1], (1 - 0.5**4) * (fixed - moving).expand(-1, 2, -1, -1))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        (((1, 1, 4, 5), (1, 1, 5, 4), None), [r"\(1, 1, 4, 5\)", r"\(1, 1, 5, 4\)"]),
        (((1, 2, 4, 5), (1, 2, 4, 5), None), [r"\(B, 1, H, W\[, D\]\)", r"\(1, 2, 4, 5\)"]),
        (((1, 4, 5), (1, 4, 5), None), [r"\(B, 1, H, W\[, D\]\)", r"\(1, 4, 5\)"]),
        (((2, 1, 4, 5), (2, 1, 4, 5), (1, 2, 4, 5)), [r"\(2, 2, 4, 5\)", r"\(1, 2, 4, 5\)"]),
        (((2, 1, 4, 5), (2, 1, 4, 5), (2, 4, 5, 2)), [r"\(2, 2, 4, 5\)", r"\(2, 4, 5, 2\)"]),
    ],
)
def test_wrong_shapes(shapes: tuple[Any, ...], words: list[str], training: bool) -> None:
    net = deq_net(Pull()).train(training)
    with pytest.raises(ValueError) as error:
        net(*(None if shape is None else torch.zeros(shape) for shape in shapes))
    for word in words:
        error.match(word)


def test_wrong_types() -> None:
    image = torch.zeros(1, 1, 4, 5, dtype=torch.uint8)
    for training in (False, True):
        net = deq_net(Pull()).train(training)
        with pytest.raises(ValueError, match=r"floating point .*torch.uint8 and torch.float32"):
            net(image, image.float())
        with pytest.raises(ValueError, match=r"floating point .*torch.float32 and torch.uint8"):
            net(image.float(), image)


class Step(torch.nn.Module):
    """The map of a network as a module."""

    def __init__(self, network: DEQRegistrationNet) -> None:
        super().__init__()
        self.network = network

    def forward(self, moving: torch.Tensor, fixed: torch.Tensor, ddf: torch.Tensor) -> torch.Tensor:
        return self.network.fixed_point_map(moving, fixed)(ddf)


@pytest.mark.parametrize("size", [(17, 18), (9, 10, 8)])
def test_the_map_is_exported(size: tuple[int, ...]) -> None:
    network = deq_net(tiny_update(len(size)), relaxation=0.5, proximal_weight=0.1, num_states=0).eval()
    start = torch.zeros(1, len(size), *size)
    with torch.no_grad():
        program = torch.export.export(Step(network), (*pair(size, batch=1), start)).module()
        # other images, to where the network's own solver comes
        moving, fixed = pair(size, batch=1, seed=9)
        ddf = start
        for _ in range(5):
            ddf = program(moving, fixed, ddf)
    expected, _ = network.solve(moving, fixed, max_steps=5, tolerance=0.0)
    assert float(expected.abs().max()) > 1e-2
    torch.testing.assert_close(ddf, expected, rtol=1e-5, atol=1e-5)
