# SPDX-License-Identifier: Apache-2.0
"""What the methods of a bundle cost: parameters, training memory, time of training and inference."""

from __future__ import annotations

import hashlib
import json
import logging
import platform
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from monai_deq.evaluation.measurements import time_side_by_side, training_memory
from monai_deq.evaluation.methods import BundleMethod, FirstPair, already_there, noted_failure
from monai_deq.networks import build_component, load_weights
from monai_deq.networks.nets import DEQRegistrationNet
from monai_deq.utils import as_flag, read_json, write_json

__all__ = ["gradient_step", "kept_costs", "measure_costs"]

logger = logging.getLogger("monai_deq")


def gradient_step(
    network: nn.Module, loss: nn.Module, moving: torch.Tensor, target: Mapping[str, Any], amp: bool = False
) -> Callable[[], None]:
    """Forward, loss and backward, under autocast with ``amp``; ``target`` is what the loss compares with."""

    def step() -> None:
        network.zero_grad(set_to_none=True)
        with torch.autocast(moving.device.type, enabled=amp):
            value = loss(network(moving, target["fixed"]), target)
        value.backward()

    return step


def _training_costs(method: BundleMethod, first: FirstPair) -> tuple[dict[str, Any], Callable[[], None]]:
    """Parameters and memory of a training step, and the step with the optimizer's."""
    record, training = method.record, method.parser("train")
    # the network as it was trained, with the recomputation that is asked for
    network_def = build_component(record.network)
    settings = {**record.training, "spatial_size": record.spatial_size, "max_steps": method.trained_steps}
    if isinstance(network_def, DEQRegistrationNet):
        asked = (method.overrides or {}).get("checkpointed", network_def.gradient.checkpointed)
        network_def.gradient = replace(network_def.gradient, checkpointed=as_flag(asked, "checkpointed"))
        settings |= {"checkpointed": network_def.gradient.checkpointed, "rest": network_def.rest}
    training.update({**{k: v for k, v in settings.items() if k in training}, "network_def": network_def})
    network = load_weights(training.get_parsed_content("network"), str(method.checkpoint)).train()
    loss, optimizer = training.get_parsed_content("loss"), training.get_parsed_content("optimizer")
    for group in optimizer.param_groups:
        group["lr"] = 0.0  # the rounds are of one and the same network
    step = gradient_step(network, loss, first.moving, first.training_target(training), first.amp)
    step()  # makes what is made once and kept, such as sampling grids
    memory = training_memory(step, [*network.parameters(), *network.buffers()], first.device)
    costs = {
        "parameters": sum(p.numel() for p in network.parameters()),
        "saved_memory_mb": memory.saved_bytes / 1e6,
        "training_memory_mb": memory.peak_bytes / 1e6,
        "memory_kind": memory.kind,
    }

    def training_step() -> None:
        step()
        optimizer.step()

    return costs, training_step


def measure_costs(methods: Mapping[str, BundleMethod], rounds: int = 5) -> dict[str, dict[str, Any]]:
    """
    Measure on the first pair of the evaluation, batch one: the memory of a training step (forward, loss, backward),
    the median time of a training step with the optimizer's, and that of an inference, all methods taking turns.

    Returns:
        by method the ``cost`` of a :py:class:`monai_deq.evaluation.MethodResult`, as far as it could be measured, or
        the reason.
    """
    costs: dict[str, dict[str, Any]] = {name: {} for name in methods}
    train, infer, failures = dict[str, Callable[[], Any]](), dict[str, Callable[[], Any]](), dict[str, str]()
    device = torch.device("cpu")
    for name, method in methods.items():
        logger.info(f"{name}: training memory")
        with noted_failure(f"costs of {name}", failures, name):
            first = FirstPair(method)
            device, infer[name] = first.device, first.register
            if method.is_trained:
                costs[name], train[name] = _training_costs(method, first)
        if name in failures:
            costs[name]["training_seconds"] = f"failed: {failures[name]}"
    for key, functions in (("training_seconds", train), ("inference_seconds", infer)):
        if functions:
            logger.info(f"{key} of {', '.join(functions)}, side by side")
            for name, timing in time_side_by_side(functions, rounds=rounds, device=device).items():
                costs[name][key] = timing.median if timing.failure is None else f"failed: {timing.failure}"
    return costs


def kept_costs(folder: Path, methods: Mapping[str, BundleMethod], rounds: int) -> dict[str, dict[str, Any]]:
    """:py:func:`measure_costs`, kept in a folder for this set of methods: side by side means in one run."""
    if not methods:
        return {}
    key: list[Any] = [rounds, torch.__version__, torch.get_num_threads(), platform.processor(), platform.machine()]
    for name, method in methods.items():
        device = torch.device(method.parser("evaluate").get_parsed_content("device"))
        key += [name, method.fingerprint("evaluate"), str(device)]
        key += [method.fingerprint("train")] if method.overlay.is_file() else []
        key += [torch.cuda.get_device_name(device)] if device.type == "cuda" else []
    path = folder / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12]}.json"
    if already_there("costs", path):
        return dict(read_json(path))
    measured = measure_costs(methods, rounds)
    # what failed for a passing reason, such as memory, is tried again
    if not any(str(v).startswith("failed") for cost in measured.values() for v in cost.values()):
        write_json(path, measured)
    return measured
