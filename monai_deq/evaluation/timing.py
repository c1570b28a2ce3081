# SPDX-License-Identifier: Apache-2.0
"""Seconds of several functions, measured side by side in one run."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Timing", "time_side_by_side"]


@dataclass(frozen=True)
class Timing:
    """
    Seconds of one function.

    Args:
        seconds: seconds of each round, in the order of the rounds; empty when the function failed.
        failure: reason why the function failed, ``None`` when it did not.
    """

    seconds: tuple[float, ...]
    failure: str | None = None

    @property
    def median(self) -> float:
        """Median over the rounds, NaN when the function failed."""
        return statistics.median(self.seconds) if self.seconds else math.nan

    @property
    def minimum(self) -> float:
        """Minimum over the rounds, NaN when the function failed."""
        return min(self.seconds, default=math.nan)

    def ratio_to(self, reference: Timing) -> float:
        """
        How many times as long as another function of the same run this one takes: the median of the ratios of each
        round. What slows the machine for a while slows both parts of a ratio.

        Args:
            reference: timing of the other function.

        Returns:
            The ratio, NaN when one of the two failed.

        Raises:
            ValueError: When the two have different numbers of rounds, hence are not of one run.
        """
        if not self.seconds or not reference.seconds:
            return math.nan
        if len(self.seconds) != len(reference.seconds):
            raise ValueError(
                "a ratio needs timings of the same rounds, "
                f"got {len(self.seconds)} and {len(reference.seconds)} rounds: time both functions in one call."
            )
        return statistics.median(a / b for a, b in zip(self.seconds, reference.seconds, strict=True))


def time_side_by_side(
    functions: Mapping[str, Callable[[], Any]],
    rounds: int = 5,
    warmup: int = 1,
    device: torch.device | str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """
    Time functions round by round: each round calls every function once, and begins one function later than the round
    before (A B C, B C A, C A B, ...), so that neither a slow spell of the machine nor a place in the order favours one.

    Garbage of the functions before is collected ahead of each call, outside its time. A function that raises is not
    called again, and the others go on.

    Args:
        functions: functions without arguments, by name.
        rounds: number of timed rounds. Defaults to 5.
        warmup: number of rounds before them that are not timed. Defaults to 1.
        device: where the functions compute; a CUDA device is synchronized before each reading of the clock.
            Defaults to ``"cpu"``.
        clock: returns seconds. Defaults to :py:func:`time.perf_counter`.

    Returns:
        A timing for each name, in the order of ``functions``.

    Raises:
        ValueError: When ``rounds`` is less than 1, ``warmup`` is negative, or there is no function.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}.")
    if warmup < 0:
        raise ValueError(f"warmup must not be negative, got {warmup}.")
    if not functions:
        raise ValueError("functions must have at least one entry, got none.")
    device = torch.device(device)
    names = list(functions)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    failures: dict[str, str] = {}
    gc.collect()
    gc.freeze()  # all that is there already, so that collecting takes no time below
    try:
        for i in range(-warmup, rounds):
            first = i % len(names)
            for name in names[first:] + names[:first]:
                if name in failures:
                    continue
                gc.collect()
                try:
                    elapsed = _time_once(functions[name], device, clock)
                except Exception as error:  # whatever it is, the others are still of use
                    failures[name] = f"{type(error).__name__}: {error}"
                    continue
                if i >= 0:
                    seconds[name].append(elapsed)
    finally:
        gc.unfreeze()
    return {name: Timing(() if name in failures else tuple(seconds[name]), failures.get(name)) for name in names}


def _time_once(function: Callable[[], Any], device: torch.device, clock: Callable[[], float]) -> float:
    _synchronize(device)
    start = clock()
    function()
    _synchronize(device)
    return clock() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
