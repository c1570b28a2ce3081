# SPDX-License-Identifier: Apache-2.0
"""Memory of one training step, counted, and seconds of several functions, measured side by side in one run."""

from __future__ import annotations

import gc
import math
import statistics
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

__all__ = ["Timing", "TrainingMemory", "live_tensors", "saved_for_backward", "time_side_by_side", "training_memory"]


@dataclass(frozen=True)
class TrainingMemory:
    """
    Memory of one training step: peak of the bytes that autograd keeps, see :py:func:`saved_for_backward`, peak of those
    allocated since the step began (activations, gradients, temporaries), and ``kind``, what that is in a table's words.
    """

    saved_bytes: int
    peak_bytes: int
    kind: str


class SavedTensors:
    """Account of the storages held by saved tensors, ``current_bytes`` and their ``peak_bytes``."""

    def __init__(self, left_out: Iterable[torch.Tensor] = ()) -> None:
        self.current_bytes = 0
        self.peak_bytes = 0
        self._left_out = {t.untyped_storage().data_ptr() for t in left_out}
        self._held: dict[int, tuple[int, int]] = {}  # address of a storage -> saved tensors that hold it, bytes

    def add(self, saved: torch.Tensor) -> None:
        """Count the storage of a tensor for as long as this tensor object lives, which nothing but the saving holds."""
        storage = saved.untyped_storage()
        address = storage.data_ptr()  # no other storage has it while the tensor lives
        if address in self._left_out:
            return
        holders, size = self._held.get(address, (0, storage.nbytes()))
        self._held[address] = (holders + 1, size)
        if not holders:
            self.current_bytes += size
        weakref.finalize(saved, self._remove, address).atexit = False

    def _remove(self, address: int) -> None:
        holders, size = self._held.pop(address)
        if holders > 1:
            self._held[address] = (holders - 1, size)
        else:
            self.current_bytes -= size


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


@contextmanager
def saved_for_backward(left_out: Iterable[torch.Tensor] = ()) -> Iterator[SavedTensors]:
    """
    Measure the bytes that autograd saves for the backward passes of what runs in the block: the distinct storages held
    by saved tensors, each whole and once, from the first saving until the last saved tensor that holds it is released.
    It is the same on a CPU and a GPU and on every run. Gradients of gradients, own autograd functions, autocast and
    both forms of :py:mod:`torch.utils.checkpoint` are covered; attributes of a function's ``ctx`` and what other hooks
    make of saved tensors are not. Autograd does not notice in-place changes of saved tensors in the block. The result
    has ``peak_bytes`` and ``current_bytes``.

    Args:
        left_out: tensors whose storages are not counted: parameters and buffers, which are there in any case.
    """
    account = SavedTensors(left_out)

    def counted(tensor: torch.Tensor, pack: Callable[[torch.Tensor], Any]) -> Any:
        # a new object on the same storage: it lives and dies with the saving, and holds no graph (no cycle)
        saved = tensor.detach()
        account.add(saved)
        try:
            return pack(saved)
        finally:
            del saved
            account.peak_bytes = max(account.peak_bytes, account.current_bytes)

    def enter_counted(hooks: saved_tensors_hooks) -> None:
        # PyTorch applies the innermost hooks alone. Checkpointing has its own, first to keep nothing, then to keep
        # what it recomputes: they are handed the counted object, and the peak is taken after they let it go
        own_pack = hooks.pack_hook
        hooks.pack_hook = partial(counted, pack=own_pack)
        try:
            enter(hooks)
        finally:
            hooks.pack_hook = own_pack

    enter = saved_tensors_hooks.__enter__
    with saved_tensors_hooks(partial(counted, pack=_same), _same):
        saved_tensors_hooks.__enter__ = enter_counted  # type: ignore[method-assign]
        try:
            yield account
        finally:
            saved_tensors_hooks.__enter__ = enter  # type: ignore[method-assign]


class LiveTensors:
    """Result of :py:func:`live_tensors`."""

    _peak_bytes: int | None = None

    @property
    def peak_bytes(self) -> int:
        """Largest number of bytes allocated in the block and alive at once; known when the block has ended."""
        if self._peak_bytes is None:
            raise RuntimeError("peak_bytes is known when the block of live_tensors() has ended; read it after it.")
        return self._peak_bytes


@contextmanager
def live_tensors() -> Iterator[LiveTensors]:
    """
    Measure the peak of CPU memory of the tensors allocated in the block: every allocation and release by PyTorch's CPU
    allocator, to the byte, as :py:mod:`torch.profiler` records them, temporaries inside an operator too. What was there
    before the block does not count, nor does what is not allocated through PyTorch. The number is the same on every run
    with the same number of threads. The block cannot be profiled otherwise; PyTorch may warn of memory "of unknown
    size", that from before the block, and some versions print two lines unless ``KINETO_LOG_LEVEL=6`` is set. The
    result has ``peak_bytes`` after the block.
    """
    result = LiveTensors()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        yield result
    events = []
    nodes = list(record.profiler.kineto_results.experimental_event_tree())  # type: ignore[union-attr]
    while nodes:
        node = nodes.pop()
        nodes.extend(node.children)
        kind, fields = node.typed
        if kind.name == "Allocation" and fields.device.type == "cpu":
            events.append((node.start_time_ns, fields.ptr, fields.alloc_size))
    # the profiler also tells of releases of memory that an earlier profile has seen allocated
    alive: dict[int, int] = {}
    current = peak = 0
    for _, address, size in sorted(events, key=lambda event: event[0]):
        if size > 0:
            alive[address] = size
        current += size if size > 0 else -alive.pop(address, 0)
        peak = max(peak, current)
    result._peak_bytes = peak


def training_memory(
    step: Callable[[], Any], parameters: Iterable[torch.Tensor], device: torch.device | str
) -> TrainingMemory:
    """
    Measure the memory of one training step: exact, not sampled. The gradients of ``parameters`` are dropped first. Call
    the step once beforehand where something is made at its first call and kept (cached grids, workspaces of CUDA).

    On a CPU ``peak_bytes`` is that of :py:func:`live_tensors`. On a CUDA device it is
    :py:func:`torch.cuda.max_memory_allocated` less what was allocated before the step, in blocks of 512 bytes; memory
    from before the step that the step frees lowers it.

    Args:
        step: runs forward, loss and backward once.
        parameters: parameters and buffers of the network; they are not counted as saved tensors.
        device: device that the network is on, ``"cpu"`` or ``"cuda"`` with or without an index.
    """
    device = torch.device(device)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f'device must be "cpu" or "cuda", got "{device}".')
    parameters = list(parameters)
    for i, parameter in enumerate(parameters):
        if parameter.device.type != device.type:
            raise ValueError(
                f"parameters[{i}] is on {parameter.device}, the measurement on {device}: give the network's device."
            )
        if parameter.is_leaf:
            parameter.grad = None
    gc.collect()  # garbage of before, held by reference cycles, would be freed at a moment of its own
    if device.type == "cpu":
        with live_tensors() as live, saved_for_backward(parameters) as saved:
            step()
        return TrainingMemory(saved.peak_bytes, live.peak_bytes, "peak of allocated CPU memory")
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    with saved_for_backward(parameters) as saved:
        step()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    return TrainingMemory(saved.peak_bytes, peak, "peak of allocated CUDA memory")


@dataclass(frozen=True)
class Timing:
    """Seconds of one function, round by round, none when it failed for the reason ``failure``."""

    seconds: tuple[float, ...]
    failure: str | None = None

    @property
    def median(self) -> float:
        """Median over the rounds, NaN when the function failed."""
        return statistics.median(self.seconds) if self.seconds else math.nan

    def ratio_to(self, reference: Timing) -> float:
        """
        How many times as long as another function of the same run this one takes: the median of the ratios of each
        round, NaN when one of the two failed. What slows the machine for a while slows both parts of a ratio.
        """
        if not self.seconds or not reference.seconds:
            return math.nan
        if len(self.seconds) != len(reference.seconds):
            raise ValueError(
                f"a ratio needs timings of the same rounds, got {len(self.seconds)} and {len(reference.seconds)} "
                "rounds: time both functions in one call."
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
    Garbage is collected ahead of each call. A function that raises is not called again, and the others go on.

    Args:
        functions: functions without arguments, by name.
        rounds, warmup: number of timed rounds, at least 1, and of rounds before them that are not timed.
        device: where they compute; CUDA is synchronized before each reading of the clock.
        clock: returns seconds.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}.")
    if warmup < 0:
        raise ValueError(f"warmup must not be negative, got {warmup}.")
    if not functions:
        raise ValueError("functions must have at least one entry, got none.")
    device = torch.device(device)

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return clock()

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
                    start = now()
                    functions[name]()
                    elapsed = now() - start
                except Exception as error:  # whatever it is, the others are still of use
                    failures[name] = f"{type(error).__name__}: {error}"
                    continue
                if i >= 0:
                    seconds[name].append(elapsed)
    finally:
        gc.unfreeze()
    return {name: Timing(() if name in failures else tuple(seconds[name]), failures.get(name)) for name in names}
