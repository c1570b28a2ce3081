# SPDX-License-Identifier: Apache-2.0
"""The solvers against NumPy, SciPy and closed forms; how they stop; how they keep items apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import brentq, root
from torchdeq import get_deq

from monai_deq.solvers import (
    SOLVERS,
    SolverRecord,
    SolverSettings,
    StopReason,
    anderson_solver,
    plain_solver,
    residual_norms,
    solve_fixed_point,
    torchdeq_name,
)

Map = Callable[[torch.Tensor], torch.Tensor]
BOTH = pytest.mark.parametrize("solver", ["plain", "anderson"])


def solve(
    g: Map, start: torch.Tensor, solver: str = "plain", ddf_channels: int | None = None, **settings: Any
) -> tuple[torch.Tensor, SolverRecord]:
    """Fields of ``SolverSettings`` by name."""
    return solve_fixed_point(g, start, SolverSettings(solver, **settings), ddf_channels)


def rates(*values: float, ndim: int = 2) -> torch.Tensor:
    """One contraction rate an item."""
    return torch.tensor(values, dtype=torch.float64).view(-1, *[1] * (ndim + 1))


# --- against other solvers --------------------------------------------------------------------------------------------


def complex_spectrum() -> np.ndarray:
    """Eigenvalues 0.9 e^{+-i pi/3}, 0.7 e^{+-i 2}, -0.8, 0.5 in a rotated basis."""
    blocks = np.zeros((6, 6))
    for i, (r, angle) in enumerate([(0.9, np.pi / 3), (0.7, 2.0)]):
        c, s = r * np.cos(angle), r * np.sin(angle)
        blocks[2 * i : 2 * i + 2, 2 * i : 2 * i + 2] = [[c, -s], [s, c]]
    blocks[4, 4], blocks[5, 5] = -0.8, 0.5
    q = np.linalg.qr(np.random.default_rng(0).normal(size=(6, 6)))[0]
    return q @ blocks @ q.T


def non_normal() -> np.ndarray:
    """Spectral radius 0.5, norm above 8: the residual grows before it falls."""
    return 0.5 * np.eye(6) + np.diag([4.0] * 5, 1) + np.diag([1.0] * 4, 2)


@BOTH
@pytest.mark.parametrize("matrix", [complex_spectrum(), non_normal()], ids=["complex", "non-normal"])
@pytest.mark.parametrize("shape", [(2, 3), (1, 2, 3), (3, 2, 1, 1)])
def test_linear_maps(solver: str, matrix: np.ndarray, shape: tuple[int, ...]) -> None:
    offsets = np.random.default_rng(1).normal(size=(2, 6))
    expected = np.linalg.solve(np.eye(6) - matrix, offsets.T).T
    a, b = torch.from_numpy(matrix), torch.from_numpy(offsets)
    state, record = solve(
        lambda x: (x.flatten(1) @ a.T + b).view_as(x),
        torch.zeros(2, *shape, dtype=torch.float64),
        solver,
        max_steps=400,
        tolerance=1e-11,
    )
    assert record.converged.all()
    np.testing.assert_allclose(state.flatten(1), expected, rtol=0, atol=1e-9 * np.abs(expected).max())


@pytest.mark.parametrize("rate", [3.3, 3.5])
def test_patience_ends_a_cycle(rate: float) -> None:
    # the logistic map: cycles of 2 and 4 around a fixed point with slope below -1; the second item is a contraction
    expected = brentq(lambda x: rate * x * (1 - x) - x, 0.3, 0.9, xtol=1e-15)
    start = torch.full((2, 1, 3), 0.4, dtype=torch.float64)

    def g(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([rate * x[:1] * (1 - x[:1]), 0.5 * x[1:] + 0.1])

    settings: dict[str, Any] = {"max_steps": 120, "tolerance": 1e-12}
    cycling, record = solve(g, start, **settings)
    assert record.converged.tolist() == [False, True]
    state, patient = solve(g, start, **settings, options={"patience": 5})
    assert patient.converged.all()
    np.testing.assert_allclose(state[0], expected, rtol=0, atol=1e-10)
    # the other item is not touched
    assert torch.equal(state[1], cycling[1]) and patient.steps[1] == record.steps[1]


def test_patience_waits_as_long_as_it_says() -> None:
    # slope -1: the residual stays as it is; halved steps hit the fixed point at once
    def g(x: torch.Tensor) -> torch.Tensor:
        return 1 - x

    for patience in (1, 3):
        start = torch.zeros(1, 1, 2, dtype=torch.float64)
        state, record = solve(g, start, max_steps=20, tolerance=0.0, options={"patience": patience})
        assert bool((state == 0.5).all())
        # the first residual is the smallest; after `patience` that are no smaller comes the half step, then 0
        assert record.residual[0, : int(record.steps[0])].tolist() == pytest.approx(
            [2**0.5 * 2**-0.5] * (patience + 1) + [0.0]
        )


@BOTH
def test_cosine(solver: str) -> None:
    expected = brentq(lambda x: np.cos(x) - x, 0, 1, xtol=1e-15)
    start = torch.linspace(-2, 3, 10, dtype=torch.float64).view(2, 1, 5)
    # tolerance 0: on to the last bit, far past where all residuals are parallel
    state, _ = solve(torch.cos, start, solver, max_steps=150, tolerance=0.0)
    np.testing.assert_allclose(state, expected, rtol=0, atol=1e-14)


@BOTH
def test_coupled_nonlinear_map(solver: str) -> None:
    rng = np.random.default_rng(2)
    w, b = 0.4 * rng.normal(size=(4, 4)), rng.normal(size=4)
    expected = root(lambda x: np.tanh(w @ x + b) - x, np.zeros(4), tol=1e-13).x
    wt, bt = torch.from_numpy(w), torch.from_numpy(b)
    state, record = solve(
        lambda x: torch.tanh(x.flatten(1) @ wt.T + bt).view_as(x),
        torch.zeros(1, 2, 2, dtype=torch.float64),
        solver,
        max_steps=300,
        tolerance=1e-12,
    )
    assert record.converged.all()
    np.testing.assert_allclose(state.flatten(), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_anderson_needs_fewer_evaluations(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    slopes = 0.95 * torch.rand(3, 5, 7, dtype=dtype, generator=generator)
    slopes[0, 0, 0] = 0.95
    offset = torch.randn(2, 3, 5, 7, dtype=dtype, generator=generator)
    calls = {"plain": 0, "anderson": 0}
    for solver in calls:

        def g(x: torch.Tensor, solver: str = solver) -> torch.Tensor:
            calls[solver] += 1
            return slopes * x + offset

        state, record = solve(g, torch.zeros_like(offset), solver, max_steps=400, tolerance=1e-4)
        assert record.converged.all()
        assert calls[solver] == int(record.steps.max())
        expected = offset / (1 - slopes)
        torch.testing.assert_close(state, expected, rtol=0, atol=0.05)
    assert calls["anderson"] < 0.5 * calls["plain"]


def test_anderson_solves_a_line_at_once() -> None:
    # two points fix a line, up to the ridge: x* = 1 / (1 - a), also where the plain iteration diverges
    for a in (0.5, 0.999, -0.9, -3.0, 1.5):
        state, record = solve(
            lambda x, a=a: a * x + 1,  # type: ignore[misc]
            torch.zeros(1, 2, 3, dtype=torch.float64),
            "anderson",
            max_steps=5,
            tolerance=1e-5,
        )
        assert record.converged.all() and int(record.steps) <= 5, a
        torch.testing.assert_close(state, torch.full_like(state, 1 / (1 - a)), rtol=1e-4, atol=0)


def test_anderson_weights_do_not_depend_on_units() -> None:
    a = torch.from_numpy(complex_spectrum())

    def solved(scale: float) -> tuple[torch.Tensor, int]:
        state, record = solve(
            lambda x: (x.flatten(1) @ a.T + scale).view_as(x),
            torch.zeros(1, 2, 3, dtype=torch.float64),
            "anderson",
            max_steps=60,
            tolerance=0.0,
            relative_tolerance=1e-9,
        )
        return state / scale, int(record.steps)

    state, steps = solved(1.0)
    for scale in (1e-8, 1e8):
        other, n = solved(scale)
        assert abs(n - steps) <= 1
        torch.testing.assert_close(other, state, rtol=1e-7, atol=0)


# --- what comes back --------------------------------------------------------------------------------------------------


def test_plain_states_and_record() -> None:
    # x_k = a^k, |g(x_k) - x_k| = (1 - a) a^k over two channels of RMS 1
    state, record = solve(lambda x: 0.5 * x, torch.ones(1, 2, 3, 4, dtype=torch.float64), max_steps=40, tolerance=0.01)
    k = np.arange(7)
    trace = np.sqrt(2) * 0.5 ** (k + 1)  # 0.011 at the seventh, 0.0055 at the eighth
    assert record.steps.tolist() == [8] and record.reason == (StopReason.TOLERANCE,) and record.converged.tolist()
    np.testing.assert_allclose(record.residual[0, :7], trace)
    np.testing.assert_allclose(record.relative_residual[0], np.ones(8))
    assert record.residual.shape == (1, 8)
    torch.testing.assert_close(state, torch.full_like(state, 0.5**8))


@pytest.mark.parametrize("size", [(4, 5), (40, 30), (3, 4, 5), (12, 4, 5)])
def test_residual_is_in_voxels_whatever_the_size(size: tuple[int, ...]) -> None:
    ndim = len(size)
    step = torch.zeros(2, ndim, *size, dtype=torch.float64)
    step[0, 0], step[0, 1] = 3.0, 4.0  # every voxel moves by 5
    step[1, 0, ..., : size[-1] // 2] = 2.0  # some voxels move by 2
    _, record = solve(lambda x: x + step, torch.ones_like(step), max_steps=1, tolerance=0.0)
    share = (size[-1] // 2) / size[-1]
    np.testing.assert_allclose(record.final_residual, [5.0, 2 * np.sqrt(share)])
    n = np.prod(size)
    relative = [
        np.sqrt(25 * n) / np.sqrt((16 + 25 + (ndim - 2)) * n),
        np.sqrt(4 * share) / np.sqrt(9 * share + (1 - share) + ndim - 1),
    ]
    np.testing.assert_allclose(record.final_relative_residual, relative)
    # ... and so is the tolerance
    for tolerance, steps in ((5.001, 1), (4.999, 2)):
        _, record = solve(lambda x: x + step, torch.ones_like(step), max_steps=2, tolerance=tolerance)
        assert record.steps.tolist() == [steps, 1]


@pytest.mark.parametrize("size", [(7, 6), (5, 4, 6)])
def test_residual_norms(size: tuple[int, ...]) -> None:
    ndim = len(size)
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((2, ndim, *size)))
    residual, relative = residual_norms(1 - 0.5 * x, 0.5 * x + 1)
    f, g = (1 - 0.5 * x).numpy(), (1 + 0.5 * x).numpy()
    np.testing.assert_allclose(residual, np.sqrt((f**2).sum(1).mean(axis=tuple(range(1, ndim + 1)))))
    np.testing.assert_allclose(relative, [np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(f, g, strict=True)])
    still = torch.zeros(1, ndim, *size)
    residual, relative = residual_norms(still, still)
    assert (residual.tolist(), relative.tolist()) == ([0.0], [0.0])


@BOTH
def test_relative_tolerance(solver: str) -> None:
    # x_k = 2 (1 - 0.5^k): the first residual is all of g, the second a third
    _, record = solve(
        lambda x: 0.5 * x + 1,
        torch.zeros(1, 2, 3, dtype=torch.float64),
        solver,
        tolerance=0.0,
        relative_tolerance=0.34,
    )
    assert record.reason == (StopReason.RELATIVE_TOLERANCE,) and record.converged.all()
    np.testing.assert_allclose(record.relative_residual[0], [1.0, 1 / 3])


@BOTH
def test_stop_modes_of_torchdeq(solver: str) -> None:
    # 0.5^k sqrt(2) voxels at step k + 1, always as much as is left of x = 0.5^k: the relative residual is 1
    for stop_mode, reason, steps in (("abs", StopReason.TOLERANCE, 5), ("rel", StopReason.STEP_LIMIT, 8)):
        _, _, info = plain_solver(
            lambda x: 0.5 * x, torch.ones(1, 2, 3, dtype=torch.float64), max_iter=8, tol=0.05, stop_mode=stop_mode
        )
        assert info["record"].reason == (reason,) and info["record"].steps.tolist() == [steps]
    start = torch.zeros(1, 2, 3, dtype=torch.float64)
    info = SOLVERS[solver](lambda x: 0.5 * x + 1, start, tol=0.34, stop_mode="rel")[2]
    assert info["record"].reason == (StopReason.RELATIVE_TOLERANCE,)
    np.testing.assert_allclose(info["rel_trace"][0], [1.0, 1 / 3])


@BOTH
def test_exact_fixed_point_and_zero_state(solver: str) -> None:
    # 0 / 0: nothing moves
    state, record = solve(lambda x: 0.5 * x, torch.zeros(2, 2, 3), solver, tolerance=0.0)
    assert record.steps.tolist() == [1, 1] and record.reason == (StopReason.TOLERANCE,) * 2
    assert record.final_relative_residual.tolist() == [0.0, 0.0] and not state.any()


@BOTH
def test_step_limit(solver: str) -> None:
    state, record = solve(lambda x: x + 1, torch.zeros(2, 2, 3), solver, max_steps=7, tolerance=0.5)
    assert record.reason == (StopReason.STEP_LIMIT,) * 2 and not record.converged.any()
    assert record.steps.tolist() == [7, 7] and record.residual.shape == (2, 7)
    assert len(record) == 2
    if solver == "plain":
        torch.testing.assert_close(state, torch.full_like(state, 7.0))


@pytest.mark.parametrize("drift", [1.0, 0.1, 1e-3])
def test_anderson_does_not_magnify_rounding(drift: float) -> None:
    # no fixed point, and float32 residuals that are alike but for their last bit: the state drifts, no more
    state, record = solve(lambda x: x + drift, torch.zeros(1, 2, 3), "anderson", max_steps=40, tolerance=0.0)
    assert not record.converged.any()
    assert bool((state > 0).all()) and bool((state <= 40 * drift).all())


@pytest.mark.parametrize("regularization", [0.0, 1e-4])
def test_singular_mixing_is_a_plain_step(regularization: float) -> None:
    # equal residuals: the Gram matrix has rank one
    state, record = solve(
        lambda x: x + 1,
        torch.zeros(1, 1, 4),
        "anderson",
        max_steps=6,
        tolerance=0.0,
        options={"regularization": regularization},
    )
    assert record.steps.tolist() == [6]
    if regularization == 0:
        torch.testing.assert_close(state, torch.full_like(state, 6.0))
    else:  # alike as they are, they get the same weight
        assert bool((state > 2).all()) and bool((state < 5).all())


@pytest.mark.parametrize("max_steps", [1, 2])
def test_few_steps_with_anderson(max_steps: int) -> None:
    start = torch.full((2, 2, 3), 3.0, dtype=torch.float64)
    state, _ = solve(torch.cos, start, "anderson", max_steps=max_steps, tolerance=0.0)
    expected = 3.0
    for _ in range(max_steps):
        expected = np.cos(expected)
    torch.testing.assert_close(state, torch.full_like(state, expected))


@BOTH
def test_damping_and_last_step(solver: str) -> None:
    # plain: x_{k+1} = x + 0.25 (-2 x - x), at the last step too; g alone would diverge
    if solver == "plain":
        for steps in (1, 2, 5):
            state, _ = solve(
                lambda x: -2 * x,
                torch.ones(1, 2, 3, dtype=torch.float64),
                max_steps=steps,
                tolerance=0.0,
                options={"damping": 0.25},
            )
            torch.testing.assert_close(state, torch.full_like(state, 0.25**steps))
    else:
        # the last state is g of the state whose residual was measured
        seen = []

        def g(x: torch.Tensor) -> torch.Tensor:
            seen.append(x)
            return torch.cos(x)

        # at a tolerance (where 0.1 is met, at the third step) as at the step limit
        state, record = solve(g, torch.zeros(1, 2, 3), solver, max_steps=9, tolerance=0.1)
        assert record.converged.all() and torch.equal(state, torch.cos(seen[-1]))
        state, record = solve(g, torch.zeros(1, 2, 3), solver, max_steps=4, tolerance=0.0)
        assert torch.equal(state, torch.cos(seen[-1]))
        torch.testing.assert_close(record.final_residual, (torch.cos(seen[-1]) - seen[-1])[:, :, 0].norm(dim=1))


@pytest.mark.parametrize("rate", [0.5, 1.5])
def test_indexed_states(rate: float) -> None:
    start = torch.ones(1, 2, 3, dtype=torch.float64)
    wanted = [2, 5, 9, 12]
    final, states, info = plain_solver(lambda x: rate * x, start, max_iter=12, tol=0.05, indexing=wanted)
    # sqrt(2) 0.5 0.5^(k - 1) falls below 0.05 at the fifth step: from then on the state stays
    last = 5 if rate < 1 else 12
    for k, state in zip(wanted, states, strict=True):
        torch.testing.assert_close(state, torch.full_like(state, rate ** min(k, last)))
    torch.testing.assert_close(final, torch.full_like(final, rate**last))
    assert info["record"].steps.tolist() == info["nstep"].tolist() == [last]


def test_indexed_states_before_any_and_of_one_that_stopped() -> None:
    # the first item stops at step 1, the second goes on
    rate = rates(0.0, 0.9, ndim=1)
    _, states, info = plain_solver(
        lambda x: rate * x + (1 - rate), rate * 0 + 1 - rates(0.0, 1.0, ndim=1), max_iter=6, tol=1e-6, indexing=[1, 3]
    )
    torch.testing.assert_close(states[1][:, 0, 0], torch.tensor([1.0, 1 - 0.9**3], dtype=torch.float64))
    assert info["record"].steps.tolist() == [1, 6]


@BOTH
def test_precision(solver: str) -> None:
    for dtype, kept in (
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
    ):
        seen: set[torch.dtype] = set()

        def g(x: torch.Tensor, seen: set[torch.dtype] = seen) -> torch.Tensor:
            seen.add(x.dtype)
            return (0.5 * x + 1).to(torch.bfloat16)  # a map that computes in half precision

        start = torch.zeros(1, 2, 3, dtype=dtype)
        state, record = solve(g, start, solver, max_steps=3, tolerance=0.0)
        assert state.dtype == record.residual.dtype == kept and seen == {kept}


@BOTH
def test_autocast_leaves_the_solver_alone(solver: str) -> None:
    slopes = torch.linspace(0.1, 0.95, 12).view(1, 3, 4)

    def run(enabled: bool) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            return solve(lambda x: slopes * x + 1, torch.zeros(2, 3, 4), solver, max_steps=12, tolerance=1e-6)[0]

    assert torch.equal(run(True), run(False))


@BOTH
def test_no_gradient(solver: str) -> None:
    a = torch.tensor(0.5, requires_grad=True)
    state, record = solve(lambda x: a * x + 1, torch.zeros(1, 1, 3, requires_grad=True), solver)
    assert not state.requires_grad and not record.residual.requires_grad


# --- item by item -----------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("size", [(3, 5), (2, 3, 4)])
def test_items_do_not_touch_each_other(solver: str, size: tuple[int, ...]) -> None:
    ndim = len(size)
    a = rates(0.2, 0.9, 0.5, ndim=ndim)
    generator = torch.Generator().manual_seed(0)
    offset = torch.randn(3, ndim, *size, dtype=torch.float64, generator=generator)
    warp = torch.rand(3, ndim, *size, dtype=torch.float64, generator=generator)

    def solved(items: slice) -> Any:
        def g(x: torch.Tensor) -> torch.Tensor:
            return a[items] * torch.sin(warp[items] * x) + offset[items]

        return solve(g, torch.zeros_like(offset[items]), solver, max_steps=100, tolerance=1e-6)

    state, record = solved(slice(None))
    assert len(set(record.steps.tolist())) == 3 and record.converged.all()
    for i in range(3):
        alone, its_record = solved(slice(i, i + 1))
        n = int(record.steps[i])
        assert torch.equal(state[i : i + 1], alone)
        assert its_record.steps.tolist() == [n]
        assert torch.equal(record.residual[i, :n], its_record.residual[0])
        assert bool(record.residual[i, n:].isnan().all()) and bool(record.relative_residual[i, n:].isnan().all())
        assert record.final_residual[i] == its_record.final_residual[0]


def test_steps_of_each_item() -> None:
    # |g - x| = a^(k-1) (1 - a) sqrt(2) at step k
    a = rates(0.2, 0.5, 0.9)
    state, record = solve(lambda x: a * x, torch.ones(3, 2, 3, 4, dtype=torch.float64), max_steps=100, tolerance=1e-3)
    expected = [next(k for k in range(1, 100) if r ** (k - 1) * (1 - r) * 2**0.5 <= 1e-3) for r in (0.2, 0.5, 0.9)]
    assert record.steps.tolist() == expected
    np.testing.assert_allclose(state[:, 0, 0, 0], [r**k for r, k in zip((0.2, 0.5, 0.9), expected, strict=True)])


@BOTH
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("at", [1, 2, 4])
def test_non_finite_item(solver: str, bad: float, at: int) -> None:
    a = rates(0.5, 0.8, 0.6)
    generator = torch.Generator().manual_seed(0)
    offset = torch.randn(3, 2, 3, 4, dtype=torch.float64, generator=generator)

    def solved(items: list[int]) -> Any:
        calls: list[torch.Tensor] = []

        def g(x: torch.Tensor) -> torch.Tensor:
            calls.append(x)
            y = a[items] * torch.sin(x) + offset[items]
            if 1 in items and len(calls) >= at:
                y[items.index(1), 0, 1, 2] = bad  # one voxel is enough
            return y

        start = torch.zeros(len(items), 2, 3, 4, dtype=torch.float64)
        return (*solve(g, start, solver, max_steps=40, tolerance=1e-6), calls)

    state, record, calls = solved([0, 1, 2])
    expected, its_record, _ = solved([0, 2])
    assert torch.equal(state[[0, 2]], expected)
    assert torch.equal(record.steps[[0, 2]], its_record.steps)
    n = its_record.residual.shape[1]
    assert torch.equal(record.residual[[0, 2], :n].nan_to_num(nan=-1.0), its_record.residual.nan_to_num(nan=-1.0))
    assert record.reason == (StopReason.TOLERANCE, StopReason.NON_FINITE, StopReason.TOLERANCE)
    assert record.converged.tolist() == [True, False, True]
    # the state that the map choked on, finite, and never touched again
    assert torch.equal(state[1], calls[at - 1][1]) and bool(state[1].isfinite().all())
    assert int(record.steps[1]) == at - 1
    if at == 1:
        assert not state[1].any() and not bool(record.final_residual[1].isfinite())
    else:
        assert record.final_residual[1] == record.residual[1, at - 2] and bool(record.final_residual[1].isfinite())


@BOTH
def test_all_items_non_finite(solver: str) -> None:
    state, record = solve(lambda x: x / 0, torch.ones(2, 2, 3), solver)
    assert torch.equal(state, torch.ones(2, 2, 3)) and record.steps.tolist() == [0, 0]
    assert record.residual.shape == (2, 1) and record.reason == (StopReason.NON_FINITE,) * 2


def test_growing_mix_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    # f = g - x falls along a line to 10 and is a wall there: the second mix lands on it
    def run(growth_limit: float) -> list[float]:
        seen = []
        monkeypatch.setattr("monai_deq.solvers.fixed_point._GROWTH_LIMIT", growth_limit)

        def g(x: torch.Tensor) -> torch.Tensor:
            seen.append(float(x[0, 0, 0]))
            return x + torch.where(x < 5, 1 - 0.1 * x, 3 + 0 * x)

        start = torch.zeros(1, 1, 2, dtype=torch.float64)
        solve(g, start, "anderson", max_steps=4, tolerance=0.0)
        return seen

    assert run(2.0) == pytest.approx([0, 1, 10, 13], abs=0.02)  # a plain step from where it grew
    mixed = run(100.0)
    assert mixed[:3] == pytest.approx([0, 1, 10], abs=0.02) and abs(mixed[3] - 13) > 1


def test_growth_of_one_item_leaves_the_others_their_history() -> None:
    kinks = torch.tensor([5.0, 1e9], dtype=torch.float64).view(2, 1, 1)

    def solved(items: slice) -> torch.Tensor:
        def g(x: torch.Tensor) -> torch.Tensor:
            return x + torch.where(x < kinks[items], 1 - 0.1 * x + 0.01 * torch.sin(x), 3 + 0 * x)

        start = torch.zeros(2, 1, 2, dtype=torch.float64)[items]
        return solve(g, start, "anderson", max_steps=6, tolerance=0.0)[0]

    assert torch.equal(solved(slice(None))[1:], solved(slice(1, 2)))


# --- with a hidden part -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(4, 5), (3, 2, 4)])
def test_residual_of_the_displacement_alone(size: tuple[int, ...]) -> None:
    ndim = len(size)
    step = torch.zeros(2, ndim + 3, *size, dtype=torch.float64)
    step[0, 0], step[0, 1] = 3.0, 4.0  # every voxel moves by 5
    step[1, 1] = 2.0
    step[:, ndim:] = 100.0
    start = torch.ones_like(step)
    for channels, expected in ((ndim, [5.0, 2.0]), (None, [np.sqrt(25 + 3e4), np.sqrt(4 + 3e4)])):
        _, record = solve(lambda x: x + step, start, max_steps=1, tolerance=0.0, ddf_channels=channels)
        np.testing.assert_allclose(record.final_residual, expected)
    _, record = solve(lambda x: x + step, start, max_steps=1, tolerance=0.0, ddf_channels=ndim)
    lengths = np.sqrt([16 + 25 + ndim - 2, 9 + ndim - 1])  # of g
    np.testing.assert_allclose(record.final_relative_residual, np.asarray([5.0, 2.0]) / lengths)


@pytest.mark.parametrize("tolerances", [{"tolerance": 0.01}, {"tolerance": 0.0, "relative_tolerance": 0.01}])
@pytest.mark.parametrize("rates_of", [(0.5, 0.9), (0.9, 0.5), (0.0, 0.8)])
def test_both_parts_must_be_at_rest(rates_of: tuple[float, float], tolerances: dict[str, float]) -> None:
    # displacement and hidden part go to 1 on their own: x_k = 1 - r^k, |g - x| = (1 - r) r^k a channel
    channels, size = (2, 3), (3, 4)
    r = torch.tensor([rates_of[0]] * 2 + [rates_of[1]] * 3, dtype=torch.float64).view(1, 5, 1, 1)
    start = torch.zeros(2, 5, *size, dtype=torch.float64)
    start[1] = 1.0  # an item at rest from the first step on
    _, record = solve(lambda x: r * x + (1 - r), start, max_steps=200, ddf_channels=2, **tolerances)

    def met(k: int) -> bool:
        for rate, c in zip(rates_of, channels, strict=True):
            if "relative_tolerance" in tolerances:
                value = (1 - rate) * rate**k / (1 - rate ** (k + 1))
            else:
                value = np.sqrt(c) * (1 - rate) * rate**k
            if value > 0.01:
                return False
        return True

    steps = 1 + next(k for k in range(200) if met(k))
    assert record.steps.tolist() == [steps, 1] and record.converged.all()
    assert record.residual.shape[1] == steps > 5
    k = np.arange(steps)
    np.testing.assert_allclose(
        record.residual[0], np.sqrt(2) * (1 - rates_of[0]) * rates_of[0] ** k, rtol=1e-9, atol=1e-12
    )


def test_displacement_at_rest_while_the_hidden_part_moves() -> None:
    # it wakes up once the hidden part has counted to five
    def g(x: torch.Tensor) -> torch.Tensor:
        count = (x[:, 2:] + 1).clamp(max=5)
        return torch.cat([x[:, :2] * 0 + (count >= 5), count], dim=1)

    state, record = solve(g, torch.zeros(1, 3, 4, 2), max_steps=50, tolerance=1e-3, ddf_channels=2)
    assert record.residual[0].tolist() == pytest.approx([0, 0, 0, 0, 2**0.5, 0]) and record.converged.all()
    assert bool((state[:, :2] == 1).all())


@BOTH
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_hidden_part(solver: str, bad: float) -> None:
    r = torch.tensor([0.5, 0.5, 0.7], dtype=torch.float64).view(1, 3, 1, 1)
    calls = []

    def g(x: torch.Tensor) -> torch.Tensor:
        calls.append(x)
        y = r * x + 1
        if len(calls) == 3:
            y[1, 2, 0, 1] = bad  # a hidden channel of the second item
        return y

    state, record = solve(
        g, torch.zeros(2, 3, 2, 3, dtype=torch.float64), solver, max_steps=80, tolerance=1e-8, ddf_channels=2
    )
    assert record.reason == (StopReason.TOLERANCE, StopReason.NON_FINITE) and int(record.steps[1]) == 2
    assert torch.equal(state[1], calls[2][1]) and bool(state.isfinite().all())
    torch.testing.assert_close(state[0], (1 / (1 - r))[0].expand_as(state[0]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(2, 4, 2, 3), (2, 5, 2, 1, 2)])
def test_anderson_with_hidden_part(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(3)
    n = int(np.prod(shape[1:]))
    q = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))[0]
    a = q @ torch.diag(torch.linspace(-0.5, 0.97, n, dtype=torch.float64)) @ q.T  # couples all channels
    b = torch.randn(2, n, dtype=torch.float64, generator=generator)
    expected = np.linalg.solve(np.eye(n) - a.numpy(), b.numpy().T).T
    steps = {}
    for solver in ("plain", "anderson"):
        state, record = solve(
            lambda x: (x.flatten(1) @ a.T + b).view_as(x),
            torch.zeros(shape, dtype=torch.float64),
            solver,
            max_steps=1000,
            tolerance=1e-9,
            ddf_channels=len(shape) - 2,
        )
        assert record.converged.all()
        np.testing.assert_allclose(state.flatten(1), expected, rtol=0, atol=1e-6)
        steps[solver] = int(record.steps.max())
    assert steps["anderson"] < 0.5 * steps["plain"]


@BOTH
@pytest.mark.parametrize("channels", [-1, 0, 3, 4])
def test_wrong_ddf_channels(solver: str, channels: int) -> None:
    with pytest.raises(ValueError, match=f"ddf_channels must be from 1 to 2, got {channels}"):
        solve(torch.cos, torch.zeros(1, 3, 4, 5), solver, ddf_channels=channels)
    with pytest.raises(ValueError, match="unknown options .'ddf_channels'."):
        solve(torch.cos, torch.zeros(1, 3, 4, 5), solver, options={"ddf_channels": 2})


# --- under TorchDEQ ---------------------------------------------------------------------------------------------------


@BOTH
def test_registered_with_torchdeq(solver: str) -> None:
    deq = get_deq(core="indexing", f_solver=torchdeq_name(solver), f_max_iter=60, f_tol=1e-9, n_states=2, grad=1)
    a = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
    states, info = deq(lambda x: a * x + 1, torch.zeros(2, 1, 3, dtype=torch.float64))
    assert len(states) == 2 and info["record"].converged.all() and info["nstep"].max() < 60
    torch.testing.assert_close(states[-1], torch.full_like(states[-1], 2.5))
    states[-1].sum().backward()
    assert a.grad is not None and a.grad.item() == pytest.approx(6 * 2.5)  # one phantom step: d(a x)/da = x


@BOTH
@pytest.mark.parametrize("stop_mode", ["abs", "rel"])
def test_as_backward_solver(solver: str, stop_mode: str) -> None:
    deq = get_deq(
        core="indexing",
        f_solver=torchdeq_name("plain"),
        f_max_iter=100,
        f_tol=1e-12,
        ift=True,
        b_solver=torchdeq_name(solver),
        b_max_iter=100,
        b_tol=1e-12,
        b_stop_mode=stop_mode,
    )
    a = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
    states, _ = deq(lambda x: a * x + 1, torch.zeros(2, 1, 3, dtype=torch.float64))
    (states[-1][0].sum() + 0 * states[-1][1].sum()).backward()  # no gradient at all for the second item
    # x* = 1 / (1 - a): dx*/da = 1 / (1 - a)^2 at each of three voxels
    assert a.grad is not None and a.grad.item() == pytest.approx(3 / 0.4**2, rel=1e-9)


@BOTH
def test_wrong_arguments(solver: str) -> None:
    x = torch.zeros(2, 1, 3)
    with pytest.raises(ValueError, match=r"shape of the state \(2, 1, 3\), it gave \(1, 1, 3\)"):
        solve(lambda x: x[:1], x, solver)
    with pytest.raises(ValueError, match="max_iter must be at least 1, got 0"):
        SOLVERS[solver](torch.cos, x, max_iter=0)
    with pytest.raises(ValueError, match=r"\(B, C, ...\), got \(3,\)"):
        SOLVERS[solver](torch.cos, torch.zeros(3))
    with pytest.raises(ValueError, match='"abs".*"rel", got \'both\''):
        SOLVERS[solver](torch.cos, x, stop_mode="both")
    for arguments in ({"tol": -1.0}, {"rel_tol": -1.0}):
        with pytest.raises(ValueError, match="tolerances must not be negative, got .*tol=-1.0"):
            SOLVERS[solver](torch.cos, x, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("solver", "options", "words"),
    [
        ("plain", {"damping": 0.0}, r"damping must be in \(0, 1\], got 0.0"),
        ("plain", {"damping": 1.5}, r"damping must be in \(0, 1\], got 1.5"),
        ("plain", {"patience": -1}, "patience must be a whole number, not negative, got -1"),
        ("plain", {"patience": 1.5}, "patience must be a whole number, not negative, got 1.5"),
        ("anderson", {"window": 0}, "window must be at least 1, got 0"),
        ("anderson", {"regularization": -1.0}, "regularization must not be negative, got -1.0"),
    ],
)
def test_wrong_options(solver: str, options: dict[str, Any], words: str) -> None:
    for refuse in (
        lambda: SOLVERS[solver](torch.cos, torch.zeros(1, 1, 2), **options),
        lambda: SolverSettings(solver, options=options),
        lambda: solve(torch.cos, torch.zeros(1, 1, 2), solver, options=options),
    ):
        with pytest.raises(ValueError, match=words):
            refuse()


def test_window_of_one_is_plain() -> None:
    start = torch.zeros(1, 2, 3, dtype=torch.float64)
    plain = plain_solver(torch.cos, start, max_iter=9, tol=0.0)[0]
    assert torch.equal(anderson_solver(torch.cos, start, max_iter=9, tol=0.0, window=1)[0], plain)
