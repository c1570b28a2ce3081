# SPDX-License-Identifier: Apache-2.0
"""Timing side by side, by a clock that the functions themselves move."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable

import pytest
import torch

from monai_deq.evaluation.timing import Timing, time_side_by_side


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
    assert (timings["a"].median, timings["a"].minimum) == (2.5, 1)
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
    assert math.isnan(timings["x"].median) and math.isnan(timings["x"].minimum)
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
    assert len(timing.seconds) == 2 and timing.minimum >= 0


def test_refusals() -> None:
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        time_side_by_side({"a": int}, rounds=0)
    with pytest.raises(ValueError, match="warmup must not be negative, got -1"):
        time_side_by_side({"a": int}, warmup=-1)
    with pytest.raises(ValueError, match="at least one entry"):
        time_side_by_side({})
    with pytest.raises(ValueError, match="got 1 and 2 rounds"):
        Timing((1.0,)).ratio_to(Timing((1.0, 2.0)))
