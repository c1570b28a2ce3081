# SPDX-License-Identifier: Apache-2.0
"""Memory of one training step: what autograd keeps for the backward pass, and the peak of all allocations."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

__all__ = ["LiveTensors", "SavedTensors", "TrainingMemory", "live_tensors", "saved_for_backward", "training_memory"]


@dataclass(frozen=True)
class TrainingMemory:
    """
    Memory of one training step.

    Args:
        saved_bytes: peak of the bytes that autograd keeps for the backward pass, see
            :py:func:`saved_for_backward`.
        peak_bytes: peak of the bytes allocated since the step began: activations, gradients and temporaries.
        kind: what ``peak_bytes`` is, in the words of a table.
    """

    saved_bytes: int
    peak_bytes: int
    kind: str


def _storage_address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class SavedTensors:
    """
    Account of the storages held by saved tensors; filled by :py:func:`saved_for_backward`.

    Args:
        left_out: tensors whose storages are not counted.
    """

    def __init__(self, left_out: Iterable[torch.Tensor] = ()) -> None:
        #: bytes held now
        self.current_bytes = 0
        #: largest number of bytes held at once
        self.peak_bytes = 0
        self._left_out = {_storage_address(t) for t in left_out}
        self._held: dict[int, tuple[int, int]] = {}  # address of a storage -> saved tensors that hold it, bytes

    def add(self, saved: torch.Tensor) -> None:
        """
        Count the storage of a tensor for as long as this tensor object lives.

        Args:
            saved: a tensor object that nothing but the saving holds.
        """
        address = _storage_address(saved)  # no other storage has it while the tensor lives
        if address in self._left_out:
            return
        holders, size = self._held.get(address, (0, saved.untyped_storage().nbytes()))
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

    def note_peak(self) -> None:
        """Take the bytes held now into the peak."""
        self.peak_bytes = max(self.peak_bytes, self.current_bytes)


@contextmanager
def saved_for_backward(left_out: Iterable[torch.Tensor] = ()) -> Iterator[SavedTensors]:
    """
    Measure the bytes that autograd saves for the backward passes of what runs in the block.

    Counted are the distinct storages held by saved tensors: a storage counts whole and once, however many views of it
    are saved and however often, from the first saving until the last saved tensor that holds it is released. This
    covers several forward and backward passes, gradients of gradients, ``save_for_backward`` of an
    :py:class:`torch.autograd.Function`, autocast (the half precision copies of the weights are counted) and both forms
    of :py:mod:`torch.utils.checkpoint`, with what it recomputes. It is the same on a CPU and a GPU, and on every run.

    Not counted is what a graph keeps without saving it for the backward pass: attributes of an autograd function's
    ``ctx``, tensors in the closure of a hook. What other hooks for saved tensors make of them, as the copies of
    ``save_on_cpu``, is not counted either. An input counts as soon as it is saved.

    Saved tensors behave as under any :py:class:`torch.autograd.graph.saved_tensors_hooks`: an in-place change of one
    before its backward pass is not noticed by autograd.

    Args:
        left_out: tensors whose storages are not counted: parameters and buffers, which are there in any case.

    Yields:
        The account, with ``peak_bytes`` and ``current_bytes``.

    Example:

    .. code-block:: python

        with saved_for_backward(network.parameters()) as saved:
            loss(network(moving, fixed), target).backward()
        print(saved.peak_bytes)
    """
    account = SavedTensors(left_out)

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        # a new object on the same storage: it lives and dies with the saving, and holds no graph (no cycle)
        saved = tensor.detach()
        account.add(saved)
        account.note_peak()
        return saved

    def enter_counted(hooks: saved_tensors_hooks) -> None:
        # PyTorch applies the innermost hooks alone. Checkpointing has its own, first to keep nothing, then to keep
        # what it recomputes in a place of its own: they are handed the counted object, and the peak is taken
        # after they have kept it or let it go.
        def pack_counted(tensor: torch.Tensor) -> Any:
            saved = tensor.detach()
            account.add(saved)
            try:
                return hooks.pack_hook(saved)
            finally:
                del saved
                account.note_peak()

        torch._C._autograd._push_saved_tensors_default_hooks(pack_counted, hooks.unpack_hook)

    enter = saved_tensors_hooks.__enter__
    with saved_tensors_hooks(pack, lambda saved: saved):
        saved_tensors_hooks.__enter__ = enter_counted  # type: ignore[method-assign]
        try:
            yield account
        finally:
            saved_tensors_hooks.__enter__ = enter  # type: ignore[method-assign]


class LiveTensors:
    """Result of :py:func:`live_tensors`."""

    def __init__(self) -> None:
        self._peak_bytes: int | None = None

    @property
    def peak_bytes(self) -> int:
        """
        Largest number of bytes allocated in the block and alive at once.

        Raises:
            RuntimeError: When the block has not ended.
        """
        if self._peak_bytes is None:
            raise RuntimeError("peak_bytes is known when the block of live_tensors() has ended; read it after it.")
        return self._peak_bytes


@contextmanager
def live_tensors() -> Iterator[LiveTensors]:
    """
    Measure the peak of CPU memory of the tensors allocated in the block, forward and backward.

    Every allocation and release by PyTorch's CPU allocator counts, to the byte, as :py:mod:`torch.profiler` records
    them: tensors of any kind, and the temporary tensors inside an operator. Views, ``expand`` and in-place operations
    cost nothing, a Python number in an operator a few bytes. Memory from before the block does not count, neither when
    it is used nor when it is freed. The number is the same on every run with the same number of threads.

    Not counted is memory that is not allocated through PyTorch: NumPy arrays, Python objects and what libraries as
    oneDNN allocate for themselves.

    The alternative, a ``TorchDispatchMode`` that follows each output, sees no temporaries inside an operator and
    changes what it measures: under any such mode autograd does not add up gradients in place.

    The profiler of PyTorch runs one at a time, so the block cannot be profiled otherwise. PyTorch may warn on
    stderr of memory "of unknown size", that from before the block; some versions also print two lines at each use,
    unless the environment has ``KINETO_LOG_LEVEL=6``.

    Yields:
        An object whose ``peak_bytes`` can be read after the block.
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
    # The profiler also tells of releases of memory that an earlier profile has seen allocated: only what was
    # allocated here is subtracted. The running totals of its events mix the two.
    alive: dict[int, int] = {}
    current = peak = 0
    for _, address, size in sorted(events, key=lambda event: event[0]):
        if size > 0:
            alive[address] = size
            current += size
            peak = max(peak, current)
        else:
            current -= alive.pop(address, 0)
    result._peak_bytes = peak


def training_memory(
    step: Callable[[], Any], parameters: Iterable[torch.Tensor], device: torch.device | str
) -> TrainingMemory:
    """
    Measure the memory of one training step: exact, not sampled.

    The gradients of ``parameters`` are dropped first, so that each measurement counts the gradients that the step
    makes. Call the step once beforehand where something is made at its first call and kept (cached sampling grids,
    workspaces of CUDA libraries): it would be counted. The step of an optimizer counts when ``step`` makes it.

    On a CPU ``peak_bytes`` is that of :py:func:`live_tensors`. On a CUDA device it is
    :py:func:`torch.cuda.max_memory_allocated` less what was allocated before the step; PyTorch's caching allocator
    rounds blocks up to 512 bytes there, and memory from before the step that the step frees lowers it.

    Args:
        step: runs forward, loss and backward once.
        parameters: parameters and buffers of the network; they are not counted as saved tensors.
        device: device that the network is on, ``"cpu"`` or ``"cuda"`` with or without an index.

    Returns:
        Saved bytes and peak bytes of the step.

    Raises:
        ValueError: When the device is neither CPU nor CUDA, or a parameter is on another one.
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
