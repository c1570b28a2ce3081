# SPDX-License-Identifier: Apache-2.0
"""Equilibrium networks one behind the other: grids, starts, weights, and what is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from nets import Pull, deq_net, pair, tiny_update

from monai_deq.certificates import certified_solve, certify, starting_point
from monai_deq.networks.nets import DEQRegistrationNet, UnrolledRegistrationNet, coarse_to_fine, set_coarse_solver
from monai_deq.networks.nets.iteration import downsample, downsample_ddf, upsample_state
from monai_deq.solvers import SolverSettings

SIZES = [(9, 14), (16, 12), (5, 8, 7)]


def net(share: float, coarse: DEQRegistrationNet | None = None, **kwargs: Any) -> DEQRegistrationNet:
    settings = {"max_steps": 60, "tolerance": 1e-6, "num_states": 0, **kwargs}
    return deq_net(Pull(share), coarse=coarse, **settings)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_starts_where_the_coarser_networks_come_to_rest(size: tuple[int, ...], training: bool) -> None:
    ndim = len(size)
    moving, fixed = pair(size)
    network = net(0.0, net(0.5), phantom_steps=1).train(training)
    expected = upsample_state(
        (downsample(fixed) - downsample(moving)).expand(-1, ndim, *downsample(fixed).shape[2:]), size
    )
    torch.testing.assert_close(network(moving, fixed)[1], expected, rtol=0, atol=1e-5)
    # a third level: its solution is the start of the second, which does not move
    network = net(0.0, net(0.0, net(0.5)), phantom_steps=1).train(training)
    small = downsample(downsample(fixed)) - downsample(downsample(moving))
    small = small.expand(-1, ndim, *small.shape[2:])
    expected = upsample_state(upsample_state(small, downsample(fixed).shape[2:]), size)
    torch.testing.assert_close(network(moving, fixed)[1], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_a_given_start_leaves_the_coarser_networks_out(size: tuple[int, ...], training: bool) -> None:
    moving, fixed = pair(size)
    start = torch.randn(2, len(size), *size, generator=torch.Generator().manual_seed(1))
    network = net(0.0, net(0.5), phantom_steps=1).train(training)
    torch.testing.assert_close(network(moving, fixed, start)[1], start)


@pytest.mark.parametrize("size", SIZES)
def test_a_start_for_the_coarsest(size: tuple[int, ...]) -> None:
    moving, fixed = pair(size)
    start = torch.randn(2, len(size), *size, generator=torch.Generator().manual_seed(1))
    assert net(0.0).coarse_start(moving, fixed, start) == (start, ())
    assert net(0.0).coarse_start(moving, fixed) == (None, ())
    kept = net(0.5, net(0.0, net(0.0))).coarse_start(moving, fixed, start)[0]
    coarse = downsample_ddf(start)
    torch.testing.assert_close(kept, upsample_state(upsample_state(downsample_ddf(coarse), coarse.shape[2:]), size))
    with pytest.raises(ValueError, match="shape"):
        net(0.5, net(0.0)).coarse_start(moving, fixed, start[:, :1])


def test_random_starts_of_a_certificate_begin_with_the_coarsest() -> None:
    moving, fixed = pair((16, 12))
    for network, low, high in ((net(0.0), 2.9, 3.1), (net(0.0, net(0.5)), 0.0, 1e-4)):
        state, record = network.solve_state(moving, fixed)
        certificates = certify(network, moving, fixed, state, record, {"tolerance": 0.01, "random_starts": 1})
        assert all(low <= c.start_distance <= high for c in certificates)  # type: ignore[operator]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("solver", ["plain", "anderson"])
@pytest.mark.parametrize("size", SIZES)
def test_proximal_term_pulls_to_the_coarser_solution(size: tuple[int, ...], solver: str, training: bool) -> None:
    ndim, (share, weight) = len(size), (0.5, 0.2)
    moving, fixed = pair(size)
    settings = {"proximal_weight": weight, "solver": solver, "phantom_steps": 1}
    network = net(share, net(share, net(share, **settings), **settings), **settings).train(training)
    levels = [(moving, fixed)]
    for _ in range(2):
        levels.append((downsample(levels[-1][0]), downsample(levels[-1][1])))
    center: Any = 0.0
    for k in (2, 1, 0):
        target = levels[k][1] - levels[k][0]
        # share * (target - ddf) = weight * (ddf - center)
        solution = (share * target + weight * center) / (share + weight)
        solution = solution.expand(-1, ndim, *target.shape[2:])
        if k:
            center = upsample_state(solution, levels[k - 1][0].shape[2:])
    torch.testing.assert_close(network(moving, fixed)[1], solution, rtol=0, atol=2e-5)
    torch.testing.assert_close(network.coarse_start(moving, fixed)[0], center, rtol=0, atol=2e-5)
    # a start of its own changes the way, and not where it ends; what it is pulled to may be given
    start = torch.randn(2, ndim, *size, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(network(moving, fixed, start)[1], solution, rtol=0, atol=2e-5)
    other = (share * (fixed - moving) + weight * start) / (share + weight)
    torch.testing.assert_close(network(moving, fixed, proximal_center=start)[1], other, rtol=0, atol=2e-5)
    torch.testing.assert_close(network(moving, fixed, -start, proximal_center=start)[1], other, rtol=0, atol=2e-5)
    # the map at a state, with full and with relaxed steps, with the coarser solution and with another
    for factor in (1.0, 0.5):
        for given, pulled_to in ((None, center), (start, start)):
            g = network.fixed_point_map(moving, fixed, factor, given)
            step = share * (fixed - moving - 2 * start) - weight * (2 * start - pulled_to)
            torch.testing.assert_close(g(2 * start), 2 * start + factor * step, rtol=0, atol=2e-5)


@pytest.mark.parametrize("size", SIZES)
def test_a_start_for_all_levels_of_a_proximal_network(size: tuple[int, ...]) -> None:
    moving, fixed = pair(size)
    start = torch.randn(2, len(size), *size, generator=torch.Generator().manual_seed(1))
    # the updates do nothing: one step at each level, from the start towards what the level before has left
    single = {"proximal_weight": 0.25, "max_steps": 1}
    network = net(0.0, net(0.0, net(0.0, **single), **single), **single)
    half = downsample_ddf(start)
    quarter = 0.75 * downsample_ddf(half)
    half = 0.75 * half + 0.25 * upsample_state(quarter, half.shape[2:])
    center = upsample_state(half, size)
    initial, given = starting_point(network, moving, fixed, start)
    assert initial is start
    torch.testing.assert_close(given, {"proximal_center": center})
    state, _ = network.solve_state(moving, fixed, initial, **given)
    torch.testing.assert_close(state, 0.75 * start + 0.25 * center)
    # and with none of its own at the coarser solution
    initial, given = starting_point(net(0.0, net(0.5, **single), **single), moving, fixed)
    assert initial is given["proximal_center"]
    torch.testing.assert_close(initial, net(0.0, net(0.5, **single)).coarse_start(moving, fixed)[0])
    # without the proximal term the start is the coarsest network's alone, and without coarser ones its own
    plain = net(0.0, net(0.0, net(0.0)))
    initial, given = starting_point(plain, moving, fixed, start)
    torch.testing.assert_close(initial, plain.coarse_start(moving, fixed, start)[0])
    assert given == {} and starting_point(net(0.0, **single), moving, fixed, start) == (start, {})


def test_random_starts_of_a_certificate_enter_at_each_level_with_a_proximal_term() -> None:
    moving, fixed = pair((16, 12))
    # the finest moves to its solution by a third in each step, and the start is far: it is not forgotten in two
    settings = {"proximal_weight": 0.2, "relaxation": 0.5}
    for steps, low, high in ((2, 0.3, 3.0), (60, 0.0, 1e-4)):
        network = net(0.5, net(0.5, **settings), max_steps=steps, **settings)
        state, record = network.solve_state(moving, fixed)
        certificates = certify(network, moving, fixed, state, record, {"tolerance": 0.01, "random_starts": 1})
        assert all(low <= c.start_distance <= high for c in certificates)  # type: ignore[operator]


@pytest.mark.parametrize("start", [None, 3.0])
def test_a_certified_solve_solves_the_coarser_levels_once(start: float | None) -> None:
    moving, fixed = pair((16, 12))
    settings = {"proximal_weight": 0.2}
    network = net(0.5, net(0.5, **settings), **settings)
    initial = None if start is None else torch.full((2, 2, 16, 12), start)
    expected, record = network.solve_state(moving, fixed, initial)
    counted: list[int] = []
    network.coarse.update.register_forward_pre_hook(lambda *_: counted.append(1))
    ddf, certified, certificates = certified_solve(network, moving, fixed, initial, {})
    assert len(counted) == int(certified.coarse_steps[0].max()) > 5
    torch.testing.assert_close(ddf, expected)
    torch.testing.assert_close(certified.coarse_steps, record.coarse_steps)
    assert certificates is not None
    # at rest, and so the map that was examined is that of the solve
    assert all(c.verdict == "converged" and c.residual < 1e-6 for c in certificates)


def unet(ndim: int, **settings: Any) -> DEQRegistrationNet:
    return deq_net(tiny_update(ndim), **{"max_steps": 4, "num_states": 0, **settings})


@pytest.mark.parametrize("size", SIZES)
def test_the_finest_network_alone_is_trained(size: tuple[int, ...]) -> None:
    network = coarse_to_fine(unet(len(size)), 3, 5).train()
    assert network.coarse.solver.max_steps == network.coarse.coarse.solver.max_steps == 5
    assert network.coarse.coarse.coarse is None and network.solver.max_steps == 4
    assert all(p.requires_grad == (not n.startswith("coarse.")) for n, p in network.named_parameters())
    moving, fixed = pair(size)
    _, ddf, _ = network(moving, fixed)
    assert ddf.shape == (2, len(size), *size)
    ddf.square().mean().backward()
    assert all((p.grad is not None) == p.requires_grad for p in network.parameters())


@pytest.mark.parametrize("ndim", [2, 3])
def test_weights_of_the_size_before(ndim: int, tmp_path: Path) -> None:
    trained = coarse_to_fine(unet(ndim), 2)
    torch.manual_seed(1)
    for parameter in trained.parameters():
        torch.nn.init.normal_(parameter)
    torch.save(trained.state_dict(), tmp_path / "half.pt")
    network = coarse_to_fine(unet(ndim), 3, weights=tmp_path / "half.pt")
    for name, value in trained.state_dict().items():
        torch.testing.assert_close(network.coarse.state_dict()[name], value, rtol=0, atol=0)
    for name, value in trained.update.state_dict().items():
        torch.testing.assert_close(network.update.state_dict()[name], value, rtol=0, atol=0)
    # tensors of its own: training the finest leaves the coarser as it is
    with torch.no_grad():
        next(network.update.parameters()).add_(1)
    first = next(iter(trained.update.state_dict()))
    torch.testing.assert_close(network.coarse.update.state_dict()[first], trained.update.state_dict()[first])
    with pytest.raises(ValueError, match="of another architecture"):
        coarse_to_fine(unet(ndim), 2, weights=tmp_path / "half.pt")


@pytest.mark.parametrize("size", SIZES)
def test_steps_of_all_sizes_are_counted(size: tuple[int, ...]) -> None:
    moving, fixed = pair(size)
    # halves what is missing at each step, until a step is at most the tolerance
    network = net(0.0, net(0.5, net(0.5, max_steps=4, tolerance=0.0), tolerance=1e-3), max_steps=7, tolerance=0.0)
    _, record = network.solve(moving, fixed)
    # nothing moves at full size: there the first step ends it
    assert record.steps.tolist() == [1, 1]
    half, quarter = record.coarse_steps
    assert quarter.tolist() == [4, 4]
    for i, steps in enumerate(half.tolist()):
        single = net(0.5, net(0.5, max_steps=4, tolerance=0.0), tolerance=1e-3)
        pairs = downsample(moving[i : i + 1]), downsample(fixed[i : i + 1])
        assert single.solve(*pairs)[1].steps.tolist() == [steps]
    expected = 1 + half.double() / 2 ** len(size) + 4 / 4 ** len(size)
    torch.testing.assert_close(record.evaluations(len(size)), expected)
    # from a given start there is nothing before
    warm = network.solve(moving, fixed, torch.zeros(2, len(size), *size))[1]
    assert [steps.tolist() for steps in warm.coarse_steps] == [[0, 0]] * 2


def test_coarser_networks_are_of_the_same_kind() -> None:
    settings = {"relaxation": 0.5, "proximal_weight": 0.2, "phantom_steps": 3, "tolerance": 0.02, "num_states": 2}
    network = coarse_to_fine(unet(2, solver="anderson", solver_options={"window": 2}, **settings), 3, 7)
    assert network.gradient.num_states == 2
    for coarse in (network.coarse, network.coarse.coarse):
        assert coarse.solver == SolverSettings("anderson", 7, 0.02, 0.0, {"window": 2})
        assert coarse.rest == network.rest and coarse.proximal_weight == 0.2
        assert (coarse.gradient.steps, coarse.gradient.num_states) == (3, 0)
        assert torch.equal(coarse.update.backbone.flow.weight, network.update.backbone.flow.weight)
        assert coarse.update.backbone.flow.weight is not network.update.backbone.flow.weight
    # in the mode of the network
    assert coarse_to_fine(unet(2).eval(), 2).coarse.training is False and coarse_to_fine(unet(2), 2).coarse.training


def test_set_coarse_solver() -> None:
    network = coarse_to_fine(unet(2, solver_options={"patience": 3}), 3, 5)
    own = network.solver
    assert set_coarse_solver(network, name=None, tolerance=None) is network
    assert network.coarse.solver == network.coarse.coarse.solver == own.changed(max_steps=5)
    set_coarse_solver(network, name="anderson", tolerance=0.02, max_steps=9)
    for coarse in (network.coarse, network.coarse.coarse):
        assert coarse.solver == SolverSettings("anderson", 9, 0.02)
    assert network.solver == own
    # the solve really is another: of a quarter of the way a step, until a step is at most a voxel
    moving, fixed = pair((16, 12))
    two = net(0.0, net(0.5, tolerance=1e-6))
    steps = [int(two.solve(10 * moving, 10 * fixed)[1].coarse_steps[0].max())]
    for changes in ({"tolerance": 1.0}, {"max_steps": 1}):
        steps.append(int(set_coarse_solver(two, **changes).solve(10 * moving, 10 * fixed)[1].coarse_steps[0].max()))
    assert steps[0] > steps[1] > steps[2] == 1
    # without coarser networks there is nothing to change
    for alone in (unet(2), UnrolledRegistrationNet(spatial_dims=2), torch.nn.Linear(2, 2)):
        assert set_coarse_solver(alone, name="anderson") is alone
    assert unet(2).solver.name == "plain"
    with pytest.raises(ValueError, match="unknown solver 'newton'"):
        set_coarse_solver(network, name="newton")
    with pytest.raises(TypeError, match="the solver has the settings .* got max_iter"):
        set_coarse_solver(network, max_iter=3)


def test_refuses() -> None:
    plain = unet(2)
    assert coarse_to_fine(plain) is plain and plain.coarse is None
    for wrong in (0, 1.5):
        with pytest.raises(ValueError, match=f"num_levels must be a whole number of at least 1, got {wrong}"):
            coarse_to_fine(plain, wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_steps must be a whole number of at least 1, got 2.5"):
        coarse_to_fine(plain, 2, 2.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_levels is 1"):
        coarse_to_fine(plain, 1, weights="half.pt")
