# SPDX-License-Identifier: Apache-2.0
"""Equilibrium networks one behind the other, from coarse to fine."""

from __future__ import annotations

import copy
from pathlib import Path

from monai_deq.networks.nets.deq_registration_net import DEQRegistrationNet
from monai_deq.networks.utils import load_weights
from monai_deq.solvers import torchdeq_name
from monai_deq.utils import as_flag

__all__ = ["coarse_to_fine", "refuse_untrained_coarse"]


def coarse_to_fine(
    network: DEQRegistrationNet,
    num_levels: int = 1,
    max_steps: int = 48,
    weights: str | Path | None = None,
    tolerance: float | None = None,
    solver: str | None = None,
) -> DEQRegistrationNet:
    """
    Put copies of a network before it, each for half the size of the next; see ``coarse`` of
    :py:class:`DEQRegistrationNet`.

    Args:
        network: the network of the full size, without a coarser one.
        num_levels: number of sizes, this one included. Defaults to 1: the network as it is.
        max_steps: step limit of each coarser network. Defaults to 48.
        weights: checkpoint of a network of ``num_levels - 1`` sizes, trained at half the size. It becomes the coarser
            network, and its finest update is what this network's begins with. Defaults to ``None``: all weights are
            those of the network.
        tolerance: RMS residual, in voxels of its own grid, at which a coarser network stops. Defaults to ``None``: the
            network's.
        solver: solver of the coarser networks, with its defaults. Defaults to ``None``: the network's.

    Returns:
        The network itself, with coarser ones.

    Raises:
        ValueError: When ``num_levels`` or ``max_steps`` is below 1, ``tolerance`` is negative, there is no such
            ``solver``, or there are weights and no coarser network.
    """
    if int(num_levels) != num_levels or num_levels < 1:
        raise ValueError(f"num_levels must be a whole number of at least 1, got {num_levels}.")
    if int(max_steps) != max_steps or max_steps < 1:
        raise ValueError(f"max_steps must be a whole number of at least 1, got {max_steps}.")
    if tolerance is not None and not tolerance >= 0:
        raise ValueError(f"tolerance must not be negative, got {tolerance}.")
    if solver is not None:
        torchdeq_name(solver)
    if num_levels == 1:
        if weights is not None:
            raise ValueError("weights are those of a coarser network, and num_levels is 1: there is none.")
        return network
    coarse = coarse_to_fine(copy.deepcopy(network), num_levels - 1, max_steps, None, tolerance, solver)
    coarse.max_steps, coarse.num_states = int(max_steps), 0
    if tolerance is not None:
        coarse.tolerance = float(tolerance)
    if solver is not None and solver != coarse.solver:
        coarse.solver, coarse.solver_options = solver, {}
    if weights is not None:
        load_weights(coarse, weights)
        network.update.load_state_dict(coarse.update.state_dict())
    network.coarse = coarse.requires_grad_(False)
    return network


def refuse_untrained_coarse(
    coarser_levels: int, coarse_weights: str | Path | None, weights: str | Path | None, resume: bool | str = False
) -> None:
    """
    Refuse a training with coarser networks that would stay what chance has made of them: they are not trained with the
    finest one.

    Args:
        coarser_levels: number of coarser networks.
        coarse_weights: checkpoint of the coarser networks, or ``None``.
        weights: checkpoint of all of them, or ``None``.
        resume: whether the weights come from the checkpoint of the training itself. Defaults to ``False``.

    Raises:
        ValueError: When nothing gives the coarser networks their weights.
    """
    if coarser_levels and not (coarse_weights or weights or as_flag(resume, "resume")):
        raise ValueError(
            f"coarser_levels {coarser_levels} needs the coarser networks trained: give --coarse_weights, the model.pt "
            "of a training at half the size."
        )
