# SPDX-License-Identifier: Apache-2.0
"""Memory of a training step against closed forms; timing side by side by a clock that the functions move."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from monai.data import MetaTensor
from torch.utils.checkpoint import checkpoint

from monai_deq.evaluation import (
    Timing,
    TrainingMemory,
    live_tensors,
    saved_for_backward,
    time_side_by_side,
    training_memory,
)
from monai_deq.losses import RegistrationLoss, StatesLoss
from monai_deq.networks.blocks import GradientUpdate, RegistrationCNN, RegistrationUNet, UNetUpdate
from monai_deq.networks.nets import DEQRegistrationNet, GradientSettings
from monai_deq.solvers import SolverSettings

N = 1000
BYTES = 4 * N  # of a float32 tensor of N elements


def leaf(n: int = N) -> torch.Tensor:
    return torch.linspace(0.1, 1.0, n, requires_grad=True)


def saved_bytes(step: Callable[[], Any], left_out: tuple[torch.Tensor, ...] = ()) -> int:
    with saved_for_backward(left_out) as saved:
        step()
    assert saved.current_bytes == 0  # all of it was released
    return saved.peak_bytes


def live_bytes(step: Callable[[], Any]) -> int:
    with live_tensors() as live:
        step()
    return live.peak_bytes


def exps(x: torch.Tensor, n: int) -> torch.Tensor:
    for _ in range(n):
        x = (-x).exp()  # exp saves its output, the negative nothing
    return x


# ---- saved for the backward pass


def test_product_saves_its_factors_once() -> None:
    x = leaf()
    assert saved_bytes(lambda: (x * x).sum().backward()) == BYTES
    assert saved_bytes(lambda: (x * x).sum().backward(), (x,)) == 0
    y = leaf()
    assert saved_bytes(lambda: (x * y).sum().backward()) == 2 * BYTES
    assert saved_bytes(lambda: (x * y).sum().backward(), (y,)) == BYTES


def test_views_count_their_storage_whole_and_once() -> None:
    x = leaf()

    def step() -> None:
        y = x.exp()  # saved
        (y.view(10, -1).t() * y[::2].sum()).sum().backward()  # a view of it saved, and a scalar

    assert saved_bytes(step) == BYTES + 4
    row = leaf(10)
    assert saved_bytes(lambda: (row.expand(100, 10) * x.view(100, 10)).sum().backward()) == BYTES + 40
    assert saved_bytes(lambda: x[:10].pow(2).sum().backward()) == BYTES  # ten elements hold the whole storage


@pytest.mark.parametrize("n", [1, 2, 7])
def test_chain_of_exps_saves_each_output(n: int) -> None:
    x = leaf()
    assert saved_bytes(lambda: exps(x, n).sum().backward()) == n * BYTES


def test_nothing_is_saved_without_gradients() -> None:
    x = leaf()

    def step() -> None:
        with torch.no_grad():
            y = exps(x, 5)
        y = exps(y.detach(), 5)  # nothing here requires a gradient
        (y + x).sum().backward()

    assert saved_bytes(step) == 0


def test_peak_over_several_passes_not_their_sum() -> None:
    x = leaf()

    def one_by_one() -> None:
        for n in (1, 3, 2):
            exps(x, n).sum().backward()

    def together() -> None:
        outputs = [exps(x, n) for n in (1, 3, 2)]
        torch.stack(outputs).sum().backward()

    assert saved_bytes(one_by_one) == 3 * BYTES
    assert saved_bytes(together) == 6 * BYTES


def test_released_node_by_node_during_backward() -> None:
    x, held = leaf(), []

    class Look(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            held.append(saved.current_bytes)
            return grad

    with saved_for_backward() as saved:
        y = x
        for _ in range(3):
            y = Look.apply(exps(y, 2))
        y.sum().backward()
        held.append(saved.current_bytes)
    assert held == [6 * BYTES, 4 * BYTES, 2 * BYTES, 0]
    assert saved.peak_bytes == 6 * BYTES


def test_retained_graph_stays_counted_until_it_goes() -> None:
    x = leaf()
    with saved_for_backward() as saved:
        y = exps(x, 4).sum()
        y.backward(retain_graph=True)
        assert saved.current_bytes == 4 * BYTES
    del y  # after the block
    assert saved.current_bytes == 0


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize(("segments", "length"), [(3, 4), (5, 2)])
def test_checkpointing_keeps_the_inputs_and_one_segment(use_reentrant: bool, segments: int, length: int) -> None:
    x = leaf()

    def step() -> None:
        y = x
        for _ in range(segments):
            y = checkpoint(exps, y, length, use_reentrant=use_reentrant)
        y.sum().backward()

    assert saved_bytes(step) == (segments + length) * BYTES
    with saved_for_backward() as saved:
        y = checkpoint(exps, x, length, use_reentrant=use_reentrant)
    assert saved.peak_bytes == saved.current_bytes == BYTES  # the input alone, also in passing
    del y
    grad = x.grad
    x.grad = None
    exps(x, segments * length).sum().backward()
    torch.testing.assert_close(grad, x.grad, rtol=0, atol=0)


@pytest.mark.parametrize(("use_reentrant", "expected"), [(True, (9,)), (False, (8, 9))])
def test_checkpointing_in_checkpointing(use_reentrant: bool, expected: tuple[int, ...]) -> None:
    x = leaf()

    def inner(y: torch.Tensor) -> torch.Tensor:
        for _ in range(2):
            y = checkpoint(exps, y, 5, use_reentrant=use_reentrant)
        return y

    def step() -> None:
        y = x
        for _ in range(3):
            y = checkpoint(inner, y, use_reentrant=use_reentrant)
        y.sum().backward()

    # Three outer inputs, the second inner one (the first is an outer one), five outputs. Without re-entry the inner
    # input may be handed over to the recomputation, a local variable and saved no more.
    assert saved_bytes(step) / BYTES in expected


def test_gradient_of_a_gradient() -> None:
    x = leaf()

    def step() -> None:
        (g,) = torch.autograd.grad(x.exp().sum(), x, create_graph=True)  # saves exp(x), and the one it is times
        (g * g).sum().backward()  # saves g

    assert saved_bytes(step) == 2 * BYTES + 4
    torch.testing.assert_close(x.grad, 2 * (2 * x.detach()).exp())


def test_own_autograd_function() -> None:
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(x, 2 * x, x)
            return x * x

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            return grad * ctx.saved_tensors[1]

    x = leaf()
    assert saved_bytes(lambda: Square.apply(x).sum().backward()) == 2 * BYTES
    torch.testing.assert_close(x.grad, 2 * x.detach())


def test_autocast_saves_half_precision() -> None:
    layer = torch.nn.Linear(50, 30)
    x = torch.rand(20, 50, requires_grad=True)

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = layer(x)
        y.float().sum().backward()

    # input and weight, both in half precision
    assert saved_bytes(step, tuple(layer.parameters())) == 2 * (20 * 50 + 50 * 30)


def test_images_of_monai() -> None:
    image = torch.rand(2, 1, 5, 4)
    x = MetaTensor(image)
    w = torch.ones(1, requires_grad=True)
    assert saved_bytes(lambda: (x * w).exp().sum().backward(), (w,)) == 2 * 40 * 4
    torch.testing.assert_close(w.grad, (image * image.exp()).sum()[None])


def test_hooks_are_given_back_after_an_error() -> None:
    enter = torch.autograd.graph.saved_tensors_hooks.__enter__
    with pytest.raises(ZeroDivisionError), saved_for_backward() as saved:
        raise ZeroDivisionError
    assert torch.autograd.graph.saved_tensors_hooks.__enter__ is enter
    exps(leaf(), 2)
    assert saved.peak_bytes == 0


# ---- the networks


def small_update(ndim: int) -> UNetUpdate:
    torch.manual_seed(0)
    return UNetUpdate(ndim, RegistrationUNet(ndim, 2 + ndim, None, (4, 4), (4,), (4,), flow_std=0.01))


def pair(ndim: int, batch: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    size = (batch, 1, *(11, 8, 7)[:ndim])
    return torch.rand(size, generator=generator), torch.rand(size, generator=generator)


def network_memory(update: torch.nn.Module, max_steps: int, ndim: int, batch: int) -> TrainingMemory:
    moving, fixed = pair(ndim, batch)
    solver, gradient = SolverSettings(max_steps=max_steps, tolerance=0.0), GradientSettings(num_states=2)
    net = DEQRegistrationNet(update, solver=solver, gradient=gradient).train()
    loss = StatesLoss(RegistrationLoss(ndim))

    def step() -> None:
        loss(net(moving, fixed), {"moving": moving, "fixed": fixed}).backward()

    step()  # caches
    return training_memory(step, [*net.parameters(), *net.buffers()], "cpu")


@pytest.mark.parametrize(("ndim", "batch"), [(2, 2), (3, 1)])
def test_equilibrium_network_needs_the_same_for_any_number_of_steps(ndim: int, batch: int) -> None:
    update = small_update(ndim)
    few, many = (network_memory(update, n, ndim, batch) for n in (6, 24))
    assert few.saved_bytes == many.saved_bytes > 0
    assert few.peak_bytes > few.saved_bytes
    # the record of the solver: the residual of each item at each step, 8 bytes at most
    assert 0 <= many.peak_bytes - few.peak_bytes <= (24 - 6) * batch * 8


def test_unrolled_loop_grows_linearly() -> None:
    update = small_update(2)
    moving, fixed = pair(2)

    def unroll(steps: int) -> None:
        state: torch.Tensor = moving.new_zeros(1, 2, *moving.shape[2:])
        for _ in range(steps):
            state = state + update(moving, fixed, state)
        RegistrationLoss(2)(state[:, :1], fixed, state).backward()

    three, six, nine = (saved_bytes(partial(unroll, n), tuple(update.parameters())) for n in (3, 6, 9))
    assert nine - six == six - three > 0


def test_gradients_are_those_without_measurement() -> None:
    torch.manual_seed(0)
    update = GradientUpdate(2, backbone=RegistrationCNN(2, 4, channels=(8,), flow_std=0.1))  # differentiates a gradient
    moving, fixed = pair(2)

    def step() -> None:
        state = torch.zeros(1, 2, *moving.shape[2:])
        for _ in range(2):
            state = state + update(moving, fixed, state)
        RegistrationLoss(2)(state[:, :1], fixed, state).backward()

    step()
    expected = [p.grad for p in update.parameters()]
    training_memory(step, update.parameters(), "cpu")
    for parameter, grad in zip(update.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=0, atol=0)


# ---- peak of live tensors


def test_peak_is_of_what_lives_at_once() -> None:
    def step() -> None:
        a = torch.empty(N)
        b = a.exp()
        del a
        c = b.neg()
        del b, c
        torch.empty(N)

    assert live_bytes(step) == 2 * BYTES


def test_python_numbers_cost_a_few_bytes() -> None:
    def step() -> None:
        a = torch.empty(N)
        b = a + 1
        del a
        b * 2

    assert 2 * BYTES <= live_bytes(step) <= 2 * BYTES + 64


def test_in_place_views_and_expand_cost_nothing() -> None:
    x = torch.rand(N)

    def step() -> None:
        a = torch.empty(N)
        a.exp_().view(10, -1).t().neg_()
        a.expand(50, N)
        x.exp_().view(10, -1).t().neg_()  # memory from before
        x.expand(50, N)

    assert live_bytes(step) == BYTES


def test_backward_pass_is_seen() -> None:
    x = leaf()
    # the output of exp and the gradient; the sum and its gradient, a scalar each
    assert live_bytes(lambda: x.exp().sum().backward()) == 2 * BYTES + 8


def test_gradients_are_added_in_place_as_without_measurement() -> None:
    x = leaf()

    def step() -> None:
        y = x.exp()
        z = (y.neg() + y.neg()) + y.neg()
        z.sum().backward()  # exp, z, the gradients so far and the next one; a sum elsewhere would be a fifth

    assert live_bytes(step) == 4 * BYTES + 8


def test_temporaries_inside_an_operator_are_seen() -> None:
    x = torch.rand(N)

    def step() -> None:
        torch.sort(x)  # values and int64 indices

    assert live_bytes(step) >= BYTES + 8 * N


@pytest.mark.parametrize("measured", [True, False])
def test_memory_from_before_does_not_count_when_it_is_freed(measured: bool) -> None:
    kept: list[torch.Tensor] = []

    def make() -> None:
        kept.append(torch.empty(5 * N))

    if measured:  # the profiler remembers what it has seen allocated
        assert live_bytes(make) == 5 * BYTES
    else:
        make()

    def step() -> None:
        kept.clear()
        torch.empty(N)

    assert live_bytes(step) == BYTES


def test_peak_is_told_after_the_block() -> None:
    with live_tensors() as live, pytest.raises(RuntimeError, match="has ended"):
        _ = live.peak_bytes
    assert live.peak_bytes == 0


# ---- one training step


def test_training_step() -> None:
    w = leaf()
    buffer = torch.rand(N)

    def step() -> None:
        (w.exp() * buffer).sum().backward()  # saves exp(w); buffer is left out

    memory = training_memory(step, iter([w, buffer]), "cpu")
    # backward: exp, the gradient of it, that of w; then scalars as above
    assert memory == TrainingMemory(BYTES, 3 * BYTES + 8, "peak of allocated CPU memory")


def test_gradients_are_made_anew_by_each_training_step() -> None:
    v, w = leaf(), leaf()

    def step() -> None:
        v.exp().sum().backward()
        w.exp().sum().backward()

    for _ in range(2):
        # the gradient of v, exp(w) and its gradient
        assert training_memory(step, [v, w], "cpu").peak_bytes == 3 * BYTES + 8


def test_cuda_asks_the_allocator_around_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def stub(name: str, value: int | None = None) -> None:
        def call(device: torch.device) -> int | None:
            calls.append(f"{name} {device}")
            return value

        monkeypatch.setattr(torch.cuda, name, call)

    stub("synchronize")
    stub("memory_allocated", 100)
    stub("reset_peak_memory_stats")
    stub("max_memory_allocated", 350)
    x = leaf()

    def step() -> None:
        calls.append("step")
        x.exp().sum().backward()

    memory = training_memory(step, [], "cuda:1")
    assert memory == TrainingMemory(BYTES, 250, "peak of allocated CUDA memory")
    assert [c.removesuffix(" cuda:1") for c in calls] == [
        "synchronize",
        "memory_allocated",
        "reset_peak_memory_stats",
        "step",
        "synchronize",
        "max_memory_allocated",
    ]
    assert all(c == "step" or c.endswith(" cuda:1") for c in calls)


def test_training_memory_refuses_other_devices() -> None:
    with pytest.raises(ValueError, match=r'device must be "cpu" or "cuda", got "meta"'):
        training_memory(lambda: None, [], "meta")
    with pytest.raises(ValueError, match=r"parameters\[1\] is on meta, the measurement on cpu"):
        training_memory(lambda: None, [torch.ones(1), torch.ones(1, device="meta")], "cpu")


# ---- timing


class FakeClock:
    """A clock that stands still but for ``work``; it notes who worked when."""

    def __init__(self) -> None:
        self.now = 100.0
        self.calls: list[str] = []

    def __call__(self) -> float:
        return self.now

    def work(self, name: str, *seconds: float) -> Callable[[], None]:
        """A function that takes the given seconds, one call after the other, the last ones for good."""
        left = list(seconds)

        def function() -> None:
            self.calls.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return function


def test_seconds_of_each_round() -> None:
    clock = FakeClock()
    # the first call is the warm-up
    functions = {"a": clock.work("a", 9, 1, 2, 4, 3), "b": clock.work("b", 7, 8, 6, 12, 30)}
    timings = time_side_by_side(functions, rounds=4, warmup=1, clock=clock)
    assert timings == {"a": Timing((1, 2, 4, 3)), "b": Timing((8, 6, 12, 30))}
    assert list(timings) == ["a", "b"]
    assert timings["a"].median == 2.5
    # ratios 8, 3, 3, 10: median 5.5; the ratio of the medians would be 4
    assert timings["b"].ratio_to(timings["a"]) == 5.5
    assert timings["b"].ratio_to(timings["b"]) == 1


@pytest.mark.parametrize(("warmup", "expected"), [(0, "abc bca cab abc"), (1, "cab abc bca cab abc")])
def test_rounds_begin_one_later_each_time(warmup: int, expected: str) -> None:
    clock = FakeClock()
    timings = time_side_by_side({n: clock.work(n, 1) for n in "abc"}, rounds=4, warmup=warmup, clock=clock)
    assert "".join(clock.calls) == expected.replace(" ", "")
    assert all(t == Timing((1, 1, 1, 1)) for t in timings.values())


@pytest.mark.parametrize("good_calls", [0, 1, 2])  # fails in the warm-up, in the first round, in the second
def test_failure_does_not_stop_the_others(good_calls: int) -> None:
    clock = FakeClock()
    left = [1] * good_calls

    def broken() -> None:
        clock.calls.append("x")
        if not left:
            raise RuntimeError("out of memory")
        clock.now += left.pop()

    timings = time_side_by_side({"x": broken, "a": clock.work("a", 1)}, rounds=3, clock=clock)
    assert timings["x"] == Timing((), "RuntimeError: out of memory")
    assert math.isnan(timings["x"].median)
    assert math.isnan(timings["x"].ratio_to(timings["a"])) and math.isnan(timings["a"].ratio_to(timings["x"]))
    assert timings["a"] == Timing((1, 1, 1))
    assert clock.calls.count("x") == good_calls + 1  # not tried again


def test_interruption_is_not_swallowed() -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        time_side_by_side({"a": interrupted})


def test_cuda_is_synchronized_before_each_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeClock()

    def synchronize(device: torch.device) -> None:
        clock.calls.append(f"sync {device}")
        clock.now += 10  # what was queued

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    timings = time_side_by_side({"a": clock.work("a", 1)}, rounds=2, warmup=0, device="cuda:1", clock=clock)
    assert clock.calls == ["sync cuda:1", "a", "sync cuda:1"] * 2
    assert timings["a"] == Timing((11, 11))  # what is queued by the call counts, what was queued before does not


def test_garbage_of_one_is_collected_before_the_next() -> None:
    class Node:
        pass

    alive: list[weakref.ref[Node]] = []

    def litter() -> None:
        node = Node()
        node.itself = node  # type: ignore[attr-defined]
        alive.append(weakref.ref(node))

    def look() -> None:
        assert all(ref() is None for ref in alive)

    gc.disable()
    try:
        timings = time_side_by_side({"litter": litter, "look": look}, rounds=3)
    finally:
        gc.enable()
    assert timings["look"].failure is None and len(alive) == 4


def test_real_clock() -> None:
    timing = time_side_by_side({"a": lambda: sum(range(100))}, rounds=2)["a"]
    assert len(timing.seconds) == 2 and timing.median >= 0


def test_timing_refuses_bad_numbers() -> None:
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        time_side_by_side({"a": int}, rounds=0)
    with pytest.raises(ValueError, match="warmup must not be negative, got -1"):
        time_side_by_side({"a": int}, warmup=-1)
    with pytest.raises(ValueError, match="at least one entry"):
        time_side_by_side({})
    with pytest.raises(ValueError, match="got 1 and 2 rounds"):
        Timing((1.0,)).ratio_to(Timing((1.0, 2.0)))
