# SPDX-License-Identifier: Apache-2.0
"""Several processes at one training, evaluation or inference, as ``torchrun`` starts them."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.distributed as dist

__all__ = [
    *("check_device", "end_processes", "gather_items", "gather_to_first", "init_processes", "local_device"),
    *("mean_over_processes", "process_count", "process_rank", "wait_for_all"),
]

Item = TypeVar("Item")


def _in_group() -> bool:
    return dist.is_available() and dist.is_initialized()


def process_rank() -> int:
    """Number of this process; 0 without a process group."""
    return dist.get_rank() if _in_group() else 0


def process_count() -> int:
    """Number of processes; 1 without a process group."""
    return dist.get_world_size() if _in_group() else 1


def local_device() -> torch.device:
    """The GPU with this process's number on the node, which must be there, or the CPU where PyTorch finds no GPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    number, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if number >= count:
        advice = "start torchrun with --nproc_per_node of at most that, or give --device cpu."
        raise ValueError(f"process {number} of this node has no GPU, there are {count}: {advice}")
    return torch.device("cuda", number)


def check_device(device: str | torch.device) -> torch.device:
    """The device of a name; ``ValueError`` where there is none."""
    try:
        return torch.empty(0, device=device).device
    except (AssertionError, RuntimeError) as e:  # PyTorch asserts that it was built with CUDA
        reason = str(e).strip().partition("\n")[0]
        raise ValueError(f"device: expected cpu or a GPU that is there, got {str(device)!r} ({reason}).") from e


def init_processes(device: torch.device | str) -> None:
    """Join the other processes of ``torchrun``, by NCCL for tensors on a GPU and by Gloo for those on the CPU.

    All processes but the first log warnings and errors only. RuntimeError when ``torchrun`` did not start this one.
    """
    device = torch.device(device)
    if not _in_group():
        if not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= set(os.environ):
            raise RuntimeError(
                "the multi_gpu configurations are for processes started by torchrun: "
                "torchrun --nproc_per_node=2 -m monai.bundle run ..."
            )
        if device.type == "cuda":
            torch.cuda.set_device(device)  # else what NCCL does by itself happens on the first GPU in all of them
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    if process_rank() > 0:
        logging.disable(logging.INFO)


def end_processes() -> None:
    """Leave the other processes, when all of them have come here."""
    if _in_group():
        wait_for_all()
        dist.destroy_process_group()


def gather_items(items: Sequence[Item]) -> list[Item]:
    """The items of all processes, any number in each, those of the first process first; they must be picklable."""
    if process_count() == 1:
        return list(items)
    parts: list[list[Item]] = [[] for _ in range(process_count())]
    dist.all_gather_object(parts, list(items))
    return [item for part in parts for item in part]


def gather_to_first(item: Item) -> list[Item] | None:
    """In the first process the items (picklable) of all, in the order of their numbers; in the others None."""
    if process_count() == 1:
        return [item]
    parts = [item] * process_count() if process_rank() == 0 else None
    dist.gather_object(item, parts)
    return parts


def mean_over_processes(value: torch.Tensor) -> torch.Tensor:
    """Mean of a tensor, of the same shape in all processes, over them; without gradient."""
    value = value.detach()
    if process_count() == 1:
        return value
    total = value.clone()
    dist.all_reduce(total)
    return total / process_count()


def wait_for_all() -> None:
    """Wait until all processes have come here."""
    gather_items(())
