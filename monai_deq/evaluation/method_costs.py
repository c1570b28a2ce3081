# SPDX-License-Identifier: Apache-2.0
"""What the methods of a bundle cost: parameters, training memory, time of training and inference."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn as nn
from monai.bundle import ConfigParser
from monai.data import DataLoader

from monai_deq.data import collate_annotated_pairs
from monai_deq.engines import PreparePairBatch
from monai_deq.evaluation.memory import training_memory
from monai_deq.evaluation.method_evaluation import BundleMethod, root_cause
from monai_deq.evaluation.timing import time_side_by_side
from monai_deq.networks import load_weights
from monai_deq.utils import as_flag

__all__ = ["FirstPair", "measure_costs"]

_TRAINING_SETTINGS = (
    "max_steps",
    "num_states",
    "gamma",
    "phantom_steps",
    "phantom_damping",
    "tolerance",
    "gradient",
    "relaxation",
    "proximal_weight",
    "unwarped_moving",
    "coarser_levels",
    "coarse_steps",
    "residual_weight",
    "jacobian_weight",
    "contraction_weight",
    "spatial_size",
    "window",
    "masked_similarity",
    "keypoint_weight",
)
#: those that change what a training costs and nothing else; a comparison may ask for other ones
_RECOMPUTATION = ("use_checkpoint", "checkpoint_parts")


class FirstPair:
    """
    The first pair of a method's evaluation, on its device, with the network and inferer that register it.

    Args:
        method: the method, trained or without training.
        overrides: further entries of its evaluation configuration.
    """

    def __init__(self, method: BundleMethod, **overrides: Any) -> None:
        evaluation = method.parser("evaluate", **overrides)
        self.device = torch.device(evaluation.get_parsed_content("device"))
        # one pair is enough: not the whole split is loaded
        given = "cases" in evaluation
        name, number = ("cases", 1) if given else ("subjects", 2)
        evaluation[name] = evaluation.get_parsed_content(name)[:number]
        #: what the data set says of the pair, where it gives pairs
        self.case: dict[str, Any] | None = evaluation[name][0] if given else None
        evaluation["certificate"] = None  # it costs evaluations of the map that no registration needs
        evaluation.parse(reset=True)
        batch = next(iter(DataLoader(evaluation.get_parsed_content("dataset"), batch_size=1)))
        self.moving, self.target, (self.fixed,), _ = PreparePairBatch()(batch, self.device)
        self.network = evaluation.get_parsed_content("network").eval()
        self.inferer = evaluation.get_parsed_content("inferer")
        self.amp = as_flag(evaluation.get_parsed_content("amp"), "amp")
        if method.checkpoint is not None:
            load_weights(self.network, method.checkpoint)

    def training_target(self, training: ConfigParser) -> dict[str, Any]:
        """
        What the loss of the training compares with: the images, and of a given pair what else it takes, such as masks.

        Args:
            training: configuration of the method's training.
        """
        if self.case is None:
            return self.target
        batch = collate_annotated_pairs([training.get_parsed_content("load_pair")(self.case)])
        prepare = PreparePairBatch(target_keys=training.get_parsed_content("target_keys"))
        return prepare(batch, self.device)[1]

    def register(self) -> None:
        """Register the pair."""
        with torch.autocast(self.device.type, enabled=self.amp):
            self.inferer(self.moving, self.network, self.fixed)


def measure_costs(
    methods: Mapping[str, BundleMethod], overrides: Mapping[str, Mapping[str, Any]] | None = None, rounds: int = 5
) -> dict[str, dict[str, Any]]:
    """
    Measure on the first pair of the evaluation, batch one: the memory of a training step (forward, loss, backward),
    the time of a training step with the optimizer's, and that of an inference. All methods take turns in one run, so
    that their times compare; memory of the CPU is counted, not sampled.

    Args:
        methods: the methods by name, trained or without training.
        overrides: further entries of a method's evaluation configuration. Defaults to none.
        rounds: number of times that each is timed; the median counts. Defaults to 5.

    Returns:
        By method the entries of :py:class:`monai_deq.evaluation.MethodResult`'s ``cost`` that could be measured; in
        place of one that could not, the reason.
    """
    logger = logging.getLogger("monai_deq")
    costs: dict[str, dict[str, Any]] = {name: {} for name in methods}
    train: dict[str, Callable[[], Any]] = {}
    infer: dict[str, Callable[[], Any]] = {}
    device = torch.device("cpu")
    for name, method in methods.items():
        try:
            logger.info(f"{name}: training memory")
            first = FirstPair(method, **(overrides or {}).get(name, {}))
            device, infer[name] = first.device, first.register
            if method.checkpoint is None:
                continue
            trained_with = method.trained_with()
            training = method.parser("train", trained_with=trained_with)
            # what the training itself was given; the rest is the overlay's
            of_training = {*_TRAINING_SETTINGS, *(k for k in _RECOMPUTATION if k not in (method.overrides or {}))}
            training.update({k: v for k, v in trained_with.items() if k in of_training})
            trained = load_weights(training.get_parsed_content("network"), method.checkpoint).train()
            loss, optimizer = training.get_parsed_content("loss"), training.get_parsed_content("optimizer")
            costs[name]["parameters"] = sum(p.numel() for p in trained.parameters())
            for group in optimizer.param_groups:
                group["lr"] = 0.0  # the rounds are of one and the same network
            target = first.training_target(training)
            step = _gradient_step(trained, loss, first.moving, first.fixed, target, first.amp)
            step()  # makes what is made once and kept, such as sampling grids
            memory = training_memory(step, [*trained.parameters(), *trained.buffers()], device)
            costs[name]["saved_memory_mb"] = memory.saved_bytes / 1e6
            costs[name]["training_memory_mb"] = memory.peak_bytes / 1e6
            costs[name]["memory_kind"] = memory.kind
            train[name] = _training_step(step, optimizer)
        except Exception as e:  # the other methods still have their costs
            logger.error(f"costs of {name} could not be measured", exc_info=e)
            costs[name]["training_seconds"] = f"failed: {root_cause(e)}"
    for key, functions in (("training_seconds", train), ("inference_seconds", infer)):
        if not functions:
            continue
        logger.info(f"{key} of {', '.join(functions)}, side by side")
        for name, timing in time_side_by_side(functions, rounds=rounds, device=device).items():
            costs[name][key] = timing.median if timing.failure is None else f"failed: {timing.failure}"
    return costs


def _gradient_step(
    network: nn.Module,
    loss: nn.Module,
    moving: torch.Tensor,
    fixed: torch.Tensor,
    target: dict[str, torch.Tensor],
    amp: bool,
) -> Callable[[], Any]:
    def step() -> None:
        network.zero_grad(set_to_none=True)
        with torch.autocast(moving.device.type, enabled=amp):
            value = loss(network(moving, fixed), target)
        value.backward()

    return step


def _training_step(gradient_step: Callable[[], Any], optimizer: torch.optim.Optimizer) -> Callable[[], Any]:
    def step() -> None:
        gradient_step()
        optimizer.step()

    return step
