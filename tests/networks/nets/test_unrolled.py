# SPDX-License-Identifier: Apache-2.0
"""The unrolled network against loops written out by hand: levels, states, gradients, any number of steps."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.networks.blocks import Warp
from nets import Pull, pair, tiny_recurrent_update, tiny_unet
from scipy.ndimage import map_coordinates
from torch.func import functional_call

from monai_deq.losses import RegistrationLoss, StatesLoss
from monai_deq.networks.blocks import GradientUpdate, RegistrationCNN, UNetUpdate
from monai_deq.networks.nets import UnrolledRegistrationNet
from monai_deq.solvers import SolverSettings

SIZES = [(9, 7), (5, 3, 6)]
KINDS = ["unet", "gradient", "recurrent"]


def update_of(kind: str, ndim: int, seed: int = 0) -> torch.nn.Module:
    """In double precision, other weights for each seed."""
    if kind == "unet":
        update: torch.nn.Module = UNetUpdate(ndim, tiny_unet(2 + ndim, ndim, 0.2))
    elif kind == "gradient":
        update = GradientUpdate(ndim, backbone=RegistrationCNN(ndim, 2 + ndim, channels=(3,), flow_std=0.1))
    else:
        update = tiny_recurrent_update(ndim)
    torch.manual_seed(seed)
    for parameter in update.parameters():
        if parameter.ndim > 1:
            parameter.data = parameter.data[torch.randperm(len(parameter))]
            parameter.data *= 0.8 + 0.4 * torch.rand(())
    return update.double()


def coarser_by_hand(image: np.ndarray) -> np.ndarray:
    """Mean of the one or two voxels along each axis that there are."""
    size = tuple((n + 1) // 2 for n in image.shape[2:])
    out = np.zeros((*image.shape[:2], *size))
    for index in itertools.product(*map(range, size)):
        block = image[(..., *(slice(2 * i, 2 * i + 2) for i in index))]
        out[(..., *index)] = block.reshape(*image.shape[:2], -1).mean(axis=-1)
    return out


def finer_by_hand(state: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """``u_fine(j) = 2 u_coarse((j - 1/2) / 2)``, and the hidden state interpolated alike but not doubled; an axis
    of one voxel has no finer one."""
    where = (np.indices(size) - 0.5) / 2
    out = np.asarray([[map_coordinates(c, where, order=1, mode="nearest") for c in item] for item in state])
    for axis, (n, coarse) in enumerate(zip(size, state.shape[2:], strict=True)):
        out[:, axis] *= 1 if n == coarse else 2
    return out


def run_by_hand(
    updates: Sequence[torch.nn.Module], steps: Sequence[int], moving: torch.Tensor, fixed: torch.Tensor
) -> list[np.ndarray]:
    """All states in the order of the iteration, each on the grid of its level."""
    ndim = fixed.ndim - 2
    pyramids = []
    for image in (moving.numpy(), fixed.numpy()):
        pyramid = [image]
        for _ in steps[1:]:
            pyramid.insert(0, coarser_by_hand(pyramid[0]))
        pyramids.append([torch.from_numpy(level) for level in pyramid])
    hidden = getattr(updates[0], "hidden_channels", 0)
    state = torch.zeros(2, ndim + hidden, *pyramids[0][0].shape[2:], dtype=torch.float64)
    states = []
    for level, n in enumerate(steps):
        m, f = (pyramid[level] for pyramid in pyramids)
        if level:
            state = torch.from_numpy(finer_by_hand(state.numpy(), f.shape[2:]))
        for _ in range(n):
            with torch.no_grad():
                if hidden:
                    delta, h = updates[level](m, f, state[:, :ndim], state[:, ndim:])
                    state = torch.cat([state[:, :ndim] + delta, h], dim=1)
                else:
                    state = state + updates[level](m, f, state)
            states.append(state.numpy())
    return states


def full_size_by_hand(state: np.ndarray, sizes: Sequence[tuple[int, ...]]) -> np.ndarray:
    """Displacement of a state on the finest of the grids that are left to climb."""
    ddf = state[:, : state.ndim - 2]
    for size in sizes:
        ddf = finer_by_hand(ddf, size)
    return ddf


def level_sizes(size: tuple[int, ...], levels: int) -> list[tuple[int, ...]]:
    sizes = [size]
    for _ in range(levels - 1):
        sizes.insert(0, tuple((n + 1) // 2 for n in sizes[0]))
    return sizes


# --- the schedule -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [*SIZES, (2, 2), (1, 6), (3, 4, 1)])
@pytest.mark.parametrize("steps", [(3,), (2, 1, 3)])
def test_loop_by_hand(size: tuple[int, ...], steps: tuple[int, ...], kind: str) -> None:
    moving, fixed = pair(size, dtype=torch.float64)
    updates = [update_of(kind, len(size), seed) for seed in range(len(steps))]
    net = UnrolledRegistrationNet(updates, steps=steps, all_states=True)
    expected = run_by_hand(updates, steps, moving, fixed)
    assert np.std(expected[-1][:, : len(size)]) > 0.01

    warped, ddf, states = net.train()(moving, fixed)
    np.testing.assert_allclose(ddf.detach(), expected[-1][:, : len(size)], rtol=0, atol=1e-12)
    torch.testing.assert_close(warped, Warp()(moving, ddf), rtol=0, atol=1e-12)
    # all states but the last one, in order, at full size
    assert isinstance(states, list) and len(states) == sum(steps) - 1
    sizes = level_sizes(size, len(steps))
    levels = [level for level, n in enumerate(steps) for _ in range(n)]
    for state, value, level in zip(states, expected, levels, strict=False):
        assert state.shape == ddf.shape
        np.testing.assert_allclose(state.detach(), full_size_by_hand(value, sizes[level + 1 :]), rtol=0, atol=1e-12)

    still_warped, still = net.eval()(moving, fixed)
    torch.testing.assert_close(still, ddf, rtol=0, atol=1e-12)
    torch.testing.assert_close(still_warped, warped, rtol=0, atol=1e-12)
    assert ddf.requires_grad and not still.requires_grad


def test_states_on_demand_only() -> None:
    net = UnrolledRegistrationNet(update_of("unet", 2), steps=(2, 2)).train()
    _, ddf, states = net(*pair((5, 4), dtype=torch.float64))
    assert states == [] and ddf.requires_grad


class Given(torch.nn.Module):
    """A displacement on the coarsest level, nothing further; notes the images it sees."""

    def __init__(self, coarse: torch.Tensor) -> None:
        super().__init__()
        self.coarse = coarse
        self.seen: list[tuple[torch.Tensor, ...]] = []

    def forward(self, moving: torch.Tensor, fixed: torch.Tensor, ddf: torch.Tensor) -> torch.Tensor:
        self.seen.append((moving, fixed, ddf))
        return self.coarse.expand_as(ddf) if len(self.seen) == 1 else torch.zeros_like(ddf)


@pytest.mark.parametrize("size", [(9, 7), (13, 8), (5, 4, 7)])
def test_pyramid_by_hand(size: tuple[int, ...]) -> None:
    moving, fixed = pair(size, dtype=torch.float64)
    update = Given(torch.zeros(()))
    UnrolledRegistrationNet(update, steps=(1, 2, 1, 1)).train()(moving, fixed)
    assert [tuple(m.shape[2:]) for m, _, _ in update.seen] == [
        size if level == 3 else level_sizes(size, 4)[level] for level in (0, 1, 1, 2, 3)
    ]
    images = moving.numpy(), fixed.numpy()
    for call in (4, 3, 1, 0):
        for seen, image in zip(update.seen[call], images, strict=False):
            np.testing.assert_allclose(seen, image, rtol=0, atol=1e-14)
        images = tuple(coarser_by_hand(image) for image in images)


@pytest.mark.parametrize("size", [(24, 11), (20, 12, 9)])
def test_translation_doubles_from_level_to_level(size: tuple[int, ...]) -> None:
    # four voxels of the finest level are one of the coarsest: the images match on every level
    moving, _ = pair(size, dtype=torch.float64)
    fixed = moving.roll(-4, dims=2)
    coarse = torch.zeros(len(size), dtype=torch.float64)
    coarse[0] = 1
    update = Given(coarse.view(1, -1, *[1] * len(size)))
    _, ddf = UnrolledRegistrationNet(update, steps=(2, 1, 1)).eval()(moving, fixed)
    expected = torch.zeros_like(ddf)
    expected[:, 0] = 4
    torch.testing.assert_close(ddf, expected, rtol=0, atol=1e-12)
    for m, f, u in update.seen[1:]:
        inner = (slice(None), slice(None), slice(0, -4 * m.shape[2] // size[0]))
        assert (m - f)[inner].abs().max() > 0.1
        torch.testing.assert_close(Warp()(m, u)[inner], f[inner], rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [(12, 9), (8, 7, 9)])
def test_affine_field_is_kept(size: tuple[int, ...]) -> None:
    # v(X) = A X + b on a grid of twice the spacing, its voxel X at x = 2 X + 1/2, is u(x) = A (x - 1/2) + 2 b
    ndim = len(size)
    rng = np.random.default_rng(0)
    matrix, offset = rng.normal(size=(ndim, ndim)), rng.normal(size=ndim)
    shape = [1] * ndim

    def field(grid: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.tensordot(matrix, grid, 1) + b.reshape(-1, *shape)

    coarse = field(np.indices(level_sizes(size, 2)[0]).astype(float), offset)
    update = Given(torch.from_numpy(coarse)[None])
    _, ddf = UnrolledRegistrationNet(update, steps=(1, 1)).eval()(*pair(size, dtype=torch.float64))
    expected = field(np.indices(size) - 0.5, 2 * offset)
    inner = (..., *(slice(1, -1) for _ in size))
    np.testing.assert_allclose(ddf[0][inner], expected[inner], rtol=0, atol=1e-12)


def test_whose_weights() -> None:
    moving, fixed = pair((9, 7), dtype=torch.float64)

    class Tag(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(()))
            self.sizes: list[int] = []

        def forward(self, moving: torch.Tensor, fixed: torch.Tensor, ddf: torch.Tensor) -> torch.Tensor:
            self.sizes.append(ddf.shape[2])
            return ddf * 0 + self.weight

    shared = Tag()
    UnrolledRegistrationNet(shared, steps=(2, 1, 3)).eval()(moving, fixed)
    assert shared.sizes == [3, 3, 5, 9, 9, 9]
    for kind in (list, tuple, torch.nn.ModuleList):
        tags = [Tag(), Tag(), Tag()]
        net = UnrolledRegistrationNet(kind(tags), steps=[2, 1, 3])
        net.train()(moving, fixed)
        assert [tag.sizes for tag in tags] == [[3, 3], [5], [9, 9, 9]]
        assert len(list(net.parameters())) == 3
    assert len(list(UnrolledRegistrationNet(shared, steps=(2, 1, 3)).parameters())) == 1
    assert len(UnrolledRegistrationNet([shared], steps=(2, 1, 3)).updates) == 1


def test_updates_of_the_levels_and_steps_before_the_finest() -> None:
    updates = [Pull(0.1), Pull(0.2), Pull(0.3)]
    net = UnrolledRegistrationNet(updates, steps=(2, 1, 3))
    assert net.update == updates and net.coarse is None and net.proximal_weight == 0
    assert UnrolledRegistrationNet(updates[0], steps=(2, 1)).update is updates[0]
    _, record = net.solve(*pair((9, 7)))
    # from the finest of the smaller sizes to the coarsest
    assert [steps.tolist() for steps in record.coarse_steps] == [[1, 1], [2, 2]]
    assert record.evaluations(2).tolist() == [3 + 1 / 4 + 2 / 16] * 2
    assert [n.tolist() for n in net.solve(*pair((9, 7)), torch.zeros(2, 2, 9, 7))[1].coarse_steps] == [[0, 0]] * 2


@pytest.mark.parametrize("kind", ["unet", "recurrent"])
def test_map_of_the_finest_level(kind: str) -> None:
    moving, fixed = pair((9, 7), dtype=torch.float64)
    net = UnrolledRegistrationNet([update_of(kind, 2, seed) for seed in range(2)], steps=(1, 2)).eval()
    state, _ = net.solve_state(moving, fixed)
    after, _ = net.solve_state(moving, fixed, max_steps=3)
    torch.testing.assert_close(net.fixed_point_map(moving, fixed)(state), after, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="must have the same shape"):
        net.fixed_point_map(moving, fixed[..., :-1])


def test_number_of_parameters() -> None:
    def count(net: torch.nn.Module) -> int:
        return sum(p.numel() for p in net.parameters())

    assert count(UnrolledRegistrationNet([GradientUpdate(3) for _ in range(3)], steps=[3, 3, 3])) == 269_964
    assert count(UnrolledRegistrationNet()) == 328_627
    net = UnrolledRegistrationNet(spatial_dims=2).eval()
    assert net.steps == (6,)
    moving, fixed = pair((9, 7))
    warped, ddf = net(moving, fixed)
    assert warped.shape == moving.shape and ddf.shape == (2, 2, 9, 7) and 0 < ddf.abs().max() < 1e-2


# --- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(5, 4), (3, 4, 5)])
def test_gradient_through_time(size: tuple[int, ...], kind: str) -> None:
    moving, fixed = pair(size, dtype=torch.float64)
    updates = [update_of(kind, len(size), seed) for seed in range(2)]
    net = UnrolledRegistrationNet(updates, steps=(1, 2), all_states=True).train()
    names = [name for name, _ in net.named_parameters()]

    def f(*parameters: torch.Tensor) -> tuple[torch.Tensor, ...]:
        warped, ddf, states = functional_call(net, dict(zip(names, parameters, strict=True)), (moving, fixed))
        return warped, ddf, *states

    assert torch.autograd.gradcheck(f, tuple(net.parameters()), fast_mode=True)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_all_parameters(size: tuple[int, ...], kind: str) -> None:
    moving, fixed = pair(size, dtype=torch.float64)
    net = UnrolledRegistrationNet([update_of(kind, len(size), seed) for seed in range(2)], steps=(2, 2)).train()
    net(moving, fixed)[0].square().sum().backward()
    for name, p in net.named_parameters():
        assert p.grad is not None and bool(p.grad.isfinite().all()) and bool(p.grad.any()), name


@pytest.mark.parametrize("size", SIZES)
def test_loss_of_all_states(size: tuple[int, ...]) -> None:
    # Eq. 4: sum_t w_t L(phi_t), w_t = 10^((t - 1) / (T - 1)), here in units of the last weight
    class Square(torch.nn.Module):
        def forward(self, ddf: torch.Tensor) -> torch.Tensor:
            return ddf.square().mean()

    moving, fixed = pair(size, dtype=torch.float64)
    update = update_of("recurrent", len(size))
    net = UnrolledRegistrationNet(update, steps=5, all_states=True).train()
    one = RegistrationLoss(len(size), 0.3, torch.nn.MSELoss(), Square())
    loss = StatesLoss(one, "exponential")
    value = loss(net(moving, fixed), {"fixed": fixed, "moving": moving})

    total = 0.0
    for t, state in enumerate(run_by_hand([update], [5], moving, fixed), start=1):
        phi = state[:, : len(size)]
        warped = Warp()(moving, torch.from_numpy(phi)).numpy()
        term = np.mean((warped - fixed.numpy()) ** 2) + 0.3 * np.mean(phi**2)
        total += 10 ** ((t - 1) / 4) * term
    assert float(value.detach()) == pytest.approx(total / 10, rel=1e-12)


# --- any number of steps ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("n", [1, 2, 5])
def test_steps_on_the_finest_level(size: tuple[int, ...], kind: str, n: int) -> None:
    moving, fixed = pair(size, dtype=torch.float64)
    updates = [update_of(kind, len(size), seed) for seed in range(2)]
    net = UnrolledRegistrationNet(updates, steps=(2, 3))
    for mode in (True, False):
        ddf, record = net.train(mode).solve(moving, fixed, max_steps=n)
        assert record.steps.tolist() == [n, n] and record.reason == ("step limit",) * 2
        states = run_by_hand(updates, (2, n), moving, fixed)
        np.testing.assert_allclose(ddf, states[-1][:, : len(size)], rtol=0, atol=1e-12)
        assert not ddf.requires_grad
    # residuals are those of the displacement on the finest level, in voxels
    states[1] = finer_by_hand(states[1], size)
    moves = np.diff([s[:, : len(size)] for s in states[1:]], axis=0)
    residual = np.sqrt((moves**2).sum(axis=2).reshape(n, 2, -1).mean(axis=2))
    np.testing.assert_allclose(record.residual, residual.T, rtol=1e-9)
    # a result holds no memory of the hidden state
    assert ddf.untyped_storage().nbytes() == ddf.numel() * 8


@pytest.mark.parametrize("kind", ["unet", "gradient"])
@pytest.mark.parametrize("size", SIZES)
def test_warm_start_goes_on(size: tuple[int, ...], kind: str) -> None:
    moving, fixed = pair(size, dtype=torch.float64)
    net = UnrolledRegistrationNet([update_of(kind, len(size), s) for s in range(3)], steps=(1, 2, 2))
    whole, _ = net.solve(moving, fixed, max_steps=5)
    first, _ = net.solve(moving, fixed, max_steps=2)
    rest, record = net.solve(moving, fixed, first, max_steps=3)
    assert record.steps.tolist() == [3, 3]
    torch.testing.assert_close(rest, whole, rtol=0, atol=1e-12)
    # the network itself goes on with the steps of its schedule on the finest level
    after = net.solve(moving, fixed, max_steps=4)[0]
    torch.testing.assert_close(net.eval()(moving, fixed, first)[1], after, rtol=0, atol=1e-12)
    net.all_states = True
    _, ddf, states = net.train()(moving, fixed, first)
    torch.testing.assert_close(ddf, after, rtol=0, atol=1e-12)
    assert len(states) == 1
    torch.testing.assert_close(states[0], net.solve(moving, fixed, max_steps=3)[0], rtol=0, atol=1e-12)


def test_warm_start_leaves_the_coarser_levels_out() -> None:
    moving, fixed = pair((9, 7), dtype=torch.float64)
    update = Given(torch.zeros(()))
    net = UnrolledRegistrationNet(update, steps=(1, 1, 2))
    start = torch.full((2, 2, 9, 7), 0.5, dtype=torch.float64)
    net.train()(moving, fixed, start)
    net.solve(moving, fixed, start)
    assert [tuple(m.shape[2:]) for m, _, _ in update.seen] == [(9, 7)] * 3  # at rest at once in the solve
    assert torch.equal(update.seen[0][2], start)


def test_settings_of_one_solve() -> None:
    moving, fixed = pair((5, 4), dtype=torch.float64)
    net = UnrolledRegistrationNet(Pull(), steps=4)
    target = (fixed - moving).expand(-1, 2, -1, -1)
    ddf, record = net.solve(moving, fixed)
    torch.testing.assert_close(ddf, (1 - 0.5**4) * target)
    assert record.reason == ("step limit",) * 2
    ddf, record = net.solve(moving, fixed, max_steps=60, tolerance=1e-3)
    assert record.converged.all() and 4 < int(record.steps.max()) < 20
    assert net.solver == SolverSettings(max_steps=4, tolerance=0.0)
    torch.testing.assert_close(ddf, target, rtol=0, atol=2e-3)
    _, record = net.solve(moving, fixed, max_steps=60, relative_tolerance=0.2)
    assert record.reason == ("relative tolerance",) * 2
    ddf, _ = net.solve(moving, fixed, max_steps=3, name="anderson", options={"window": 2})
    torch.testing.assert_close(ddf, target, rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [False, True])
def test_state_is_float32_under_autocast(training: bool, kind: str) -> None:
    moving, fixed = pair((6, 5))
    net = UnrolledRegistrationNet(update_of(kind, 2).float(), steps=(2, 2), all_states=True).train(training)
    with torch.autocast("cpu", torch.bfloat16):
        warped, ddf, *states = net(moving, fixed)
    assert ddf.dtype == torch.float32 and all(s.dtype == torch.float32 for s in sum(states, []))
    expected = net(moving, fixed)[1]
    assert not torch.equal(ddf, expected)  # autocast was at work
    torch.testing.assert_close(ddf, expected, rtol=0, atol=0.1 * float(expected.detach().abs().max()))
    assert not torch.equal(ddf, ddf.bfloat16().float())


@pytest.mark.parametrize("kind", KINDS)
def test_meta_tensors(kind: str) -> None:
    moving, fixed = pair((6, 5), dtype=torch.float64)
    net = UnrolledRegistrationNet(update_of(kind, 2), steps=(1, 2))
    for mode in (True, False):
        expected = net.train(mode)(moving, fixed)[:2]
        for got, value in zip(net(MetaTensor(moving), MetaTensor(fixed))[:2], expected, strict=True):
            torch.testing.assert_close(torch.Tensor(got.detach()), value.detach())


# --- refusals ---------------------------------------------------------------------------------------------------------


class Hidden(torch.nn.Module):
    def __init__(self, hidden_channels: int) -> None:
        super().__init__()
        self.hidden_channels = hidden_channels


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"spatial_dims": 1}, "spatial_dims must be 2 or 3, got 1"),
        ({"steps": 0}, "steps must be a whole number of at least 1, .* got 0"),
        ({"steps": ()}, r"at least 1, .* got \(\)"),
        ({"steps": [3, 0, 2]}, r"at least 1, .*got \[3, 0, 2\]"),
        ({"steps": [1.5, 2]}, r"whole number .*got \[1.5, 2\]"),
        ({"steps": 2.5}, "whole number .*got 2.5"),
        ({"steps": "33"}, "whole number .*got '33'"),
        ({"update": [Hidden(0)] * 2, "steps": [1, 1, 1]}, "one for each of the 3 levels, got 2"),
        ({"update": [], "steps": [1]}, "one for each of the 1 levels, got 0"),
        ({"update": [Hidden(2), Hidden(4)], "steps": [1, 1]}, r"same number of channels, got \[2, 4\]"),
        ({"update": [Hidden(0), Hidden(4)], "steps": [1, 1]}, r"same number of channels, got \[0, 4\]"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        UnrolledRegistrationNet(**arguments)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        (((1, 1, 4, 5), (1, 1, 5, 4), None), [r"\(1, 1, 4, 5\)", r"\(1, 1, 5, 4\)"]),
        (((1, 2, 4, 5), (1, 2, 4, 5), None), [r"\(B, 1, H, W\[, D\]\)", r"\(1, 2, 4, 5\)"]),
        (((1, 4, 5), (1, 4, 5), None), [r"\(B, 1, H, W\[, D\]\)", r"\(1, 4, 5\)"]),
        (((2, 1, 4, 5), (2, 1, 4, 5), (1, 2, 4, 5)), [r"\(2, 2, 4, 5\)", r"\(1, 2, 4, 5\)"]),
        (((2, 1, 4, 5), (2, 1, 4, 5), (2, 2, 2, 3)), [r"\(2, 2, 4, 5\)", r"\(2, 2, 2, 3\)"]),
    ],
)
def test_wrong_shapes(shapes: tuple[Any, ...], words: list[str], training: bool) -> None:
    net = UnrolledRegistrationNet(Given(torch.zeros(())), steps=(1, 1)).train(training)
    with pytest.raises(ValueError) as error:
        net(*(None if shape is None else torch.zeros(shape) for shape in shapes))
    for word in words:
        error.match(word)


def test_wrong_types_and_steps() -> None:
    image = torch.zeros(1, 1, 4, 5)
    net = UnrolledRegistrationNet(Given(torch.zeros(())), steps=(1, 1))
    for mode in (True, False):
        with pytest.raises(ValueError, match=r"floating point .*torch.uint8 and torch.float32"):
            net.train(mode)(image.byte(), image)
    with pytest.raises(ValueError, match="max_steps must be a whole number of at least 1, got 0"):
        net.solve(image, image, max_steps=0)
    with pytest.raises(ValueError, match="unknown solver 'newton'"):
        net.solve(image, image, name="newton")
