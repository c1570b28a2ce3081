# SPDX-License-Identifier: Apache-2.0
"""Registration as the equilibrium of a learned update (DEQReg), at one size or from coarse to fine."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from monai_deq.networks.blocks import UNetUpdate, check_ddf
from monai_deq.networks.checkpoints import load_weights
from monai_deq.networks.nets.interface import IteratedNet, check_pair
from monai_deq.networks.nets.iteration import (
    checkpointed_map,
    downsample,
    downsample_ddf,
    hidden_channels,
    initial_state,
    proximal_map,
    relaxed_map,
    state_map,
    upsample_state,
)
from monai_deq.solvers import SolverRecord, SolverSettings, build_deq, solve_fixed_point, torchdeq_name

__all__ = ["DEQRegistrationNet", "GradientSettings", "RestSettings", "coarse_to_fine", "set_coarse_solver"]


def _check(holds: bool, expected: str, got: Any) -> None:
    if not holds:
        raise ValueError(f"{expected}, got {got}.")


@dataclass(frozen=True)
class GradientSettings:
    """How a training goes through an equilibrium.

    Args:
        kind: ``"phantom"`` (paper, Eq. 7-8) or ``"implicit"``: exact, by a second solve in the backward pass
            (Eq. 6). Defaults to ``"phantom"``.
        steps: number ``K`` of steps through which the phantom gradient goes. Defaults to 2.
        damping: damping ``tau`` of these steps, in (0, 1]; not given in the paper. Defaults to 1.
        num_states: number ``S`` of intermediate states supervised, each with a phantom gradient (Eq. 9). Defaults to 3.
        checkpointed: keep only the state a step starts from, and evaluate the step again in the backward pass: the
            memory of one step whatever ``num_states`` and ``steps`` are. Defaults to ``False``.
        implicit_max_steps: step limit of the backward solve of ``"implicit"``. Defaults to 48.
        implicit_tolerance: relative tolerance of the backward solve. Defaults to 1e-4.

    Raises:
        ValueError: When an argument is out of its range.
    """

    kind: str = "phantom"
    steps: int = 2
    damping: float = 1.0
    num_states: int = 3
    checkpointed: bool = False
    implicit_max_steps: int = 48
    implicit_tolerance: float = 1e-4

    def __post_init__(self) -> None:
        _check(self.kind in ("phantom", "implicit"), 'gradient kind must be "phantom" or "implicit"', repr(self.kind))
        _check(self.steps >= 1, "gradient steps must be at least 1", self.steps)
        _check(0 < self.damping <= 1, "gradient damping must be in (0, 1]", self.damping)
        _check(self.num_states >= 0, "num_states must not be negative", self.num_states)
        _check(isinstance(self.checkpointed, bool), "checkpointed must be True or False", repr(self.checkpointed))
        _check(self.implicit_max_steps >= 1, "implicit_max_steps must be at least 1", self.implicit_max_steps)
        _check(self.implicit_tolerance >= 0, "implicit_tolerance must not be negative", self.implicit_tolerance)


#: rest settings of the paper's own recipe
_PAPERS = dict(relaxation=1.0, proximal_weight=0.0, contraction_weight=0.0, pool_renewal=1.0, random_start_share=0.0)


@dataclass(frozen=True)
class RestSettings:
    """What makes a learned iteration come to rest. Not in the paper.

    Args:
        relaxation: factor ``alpha`` of the update, in (0, 1]: outside the phantom steps ``g(phi) = phi + alpha
            f_theta(moving, fixed, phi)`` is iterated, with the same fixed points and less overshoot. Defaults to 0.5.
        proximal_weight: weight ``nu`` of a pull back to the proximal centre ``c``, the solution of the coarser network
            or zero: ``g(phi) = phi + f_theta(moving, fixed, phi) - nu (phi - c)``. Defaults to 0.1.
        contraction_weight: weight of the contraction in :py:class:`monai_deq.losses.EquilibriumLoss`. Defaults to 0.03.
        contraction_along_step: share of its draws along the iteration's own step, in [0, 1]. Defaults to 0.5.
        pool_slots: number of pairs that stay in training, see :py:class:`monai_deq.data.PooledSampler`. Defaults to 32.
        pool_renewal: probability that a slot's pair gives way to a fresh one, in (0, 1]; 1 is no pool. Defaults to 0.2.
        random_start_share: share of the fresh pairs that start from a random smooth displacement. Defaults to 0.4.
        random_start_rms: its largest RMS length in voxels. Defaults to 3.
        enabled: ``False`` for the paper's own recipe: nothing of all this. Defaults to ``True``.

    Raises:
        ValueError: When an argument is out of its range, or would do nothing as ``enabled`` is ``False``.
    """

    relaxation: float = 0.5
    proximal_weight: float = 0.1
    contraction_weight: float = 0.03
    contraction_along_step: float = 0.5
    pool_slots: int = 32
    pool_renewal: float = 0.2
    random_start_share: float = 0.4
    random_start_rms: float = 3.0
    enabled: bool = True

    def __post_init__(self) -> None:
        _check(isinstance(self.enabled, bool), "enabled must be True or False", repr(self.enabled))
        if not self.enabled:
            for name, value in _PAPERS.items():
                # what was not given has its default
                own = getattr(self, name)
                if own not in (value, getattr(RestSettings, name)):
                    unused = f"{name} {own} does nothing unless rest is enabled"
                    raise ValueError(f"{unused}: leave it out, or set enabled.")
                object.__setattr__(self, name, value)
        slots = self.pool_slots
        for name in ("relaxation", "pool_renewal"):
            _check(0 < getattr(self, name) <= 1, f"{name} must be in (0, 1]", getattr(self, name))
        _check(0 <= self.proximal_weight < 1, "proximal_weight must be in [0, 1)", self.proximal_weight)
        _check(int(slots) == slots and slots >= 1, "pool_slots must be a whole number of at least 1", slots)
        for name in ("contraction_along_step", "random_start_share"):
            _check(0 <= getattr(self, name) <= 1, f"{name} must be in [0, 1]", getattr(self, name))
        for name in ("contraction_weight", "random_start_rms"):
            _check(getattr(self, name) >= 0, f"{name} must not be negative", getattr(self, name))


class DEQRegistrationNet(IteratedNet):
    """Deformable registration as a fixed point, "Bridging Classical and Learning-based Iterative Registration through
    Deep Equilibrium Models" (DEQReg, MICCAI 2025).

    From ``phi_0 = 0`` the displacement is iterated by ``g(phi) = phi + f_theta(moving, fixed, phi)`` until it stops
    changing (Eq. 5). Gradients come from a few damped steps taken from the detached equilibrium (Eq. 7-8), in training
    also at intermediate states at equal intervals (Eq. 9). The state is float32 also under autocast.

    Args:
        update: ``f(moving, fixed, ddf) -> delta``, or with an attribute ``hidden_channels`` ``f(moving, fixed, ddf,
            hidden) -> (delta, hidden)``. Defaults to :py:class:`monai_deq.networks.blocks.UNetUpdate`.
        spatial_dims: 2 or 3, for the default update. Defaults to 3.
        solver: of the iteration, in training and by default in eval mode. Defaults to ``SolverSettings()``.
        gradient: of the training. Defaults to ``GradientSettings()``.
        rest: what makes the iteration come to rest. Defaults to ``None``: the paper's recipe, nothing.
        coarse: network of the same kind, taken as trained, for the pair at half the size; it may have a coarser one
            itself. Its solution is where this one starts and what the proximal term pulls to. Not in the paper.
            Defaults to ``None``: the iteration starts from zero.

    Raises:
        ValueError: When there are more intermediate states than steps.

    Example:

    .. code-block:: python

        net = DEQRegistrationNet(spatial_dims=3).eval()
        warped, ddf = net(moving, fixed)  # (B, 1, H, W, D) and (B, 3, H, W, D)
    """

    def __init__(
        self,
        update: nn.Module | None = None,
        spatial_dims: int = 3,
        solver: SolverSettings | None = None,
        gradient: GradientSettings | None = None,
        rest: RestSettings | None = None,
        coarse: DEQRegistrationNet | None = None,
    ) -> None:
        super().__init__()
        self.solver = SolverSettings() if solver is None else solver
        self.gradient = GradientSettings() if gradient is None else gradient
        self.rest = RestSettings(enabled=False) if rest is None else rest
        if self.solver.max_steps < self.gradient.num_states + 1:
            raise ValueError(
                "num_states must be between 0 and max_steps - 1, got "
                f"num_states={self.gradient.num_states}, max_steps={self.solver.max_steps}."
            )
        self.update = UNetUpdate(spatial_dims) if update is None else update
        _check(callable(self.update), "update must be a module", repr(self.update))
        self.hidden_channels = hidden_channels(self.update)
        self.proximal_weight = float(self.rest.proximal_weight)
        self.coarse = coarse
        if coarse is not None:
            coarse.requires_grad_(False)

    def fixed_point_map(  # type: ignore[override]
        self,
        moving: torch.Tensor,
        fixed: torch.Tensor,
        relaxation: float | None = None,
        proximal_center: torch.Tensor | None = None,
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """See :py:meth:`IteratedNet.fixed_point_map`.

        Args:
            moving: moving images.
            fixed: fixed images.
            relaxation: factor of the update. Defaults to the network's own.
            proximal_center: what the proximal term pulls to, ``(B, ndim, *spatial)``. Defaults to what is solved for
                here.
        """
        check_pair(moving, fixed)
        g = state_map(self.update, moving, fixed)
        if self.proximal_weight:
            if proximal_center is None:
                proximal_center, _ = self.coarse_start(moving, fixed)
            g = proximal_map(g, self.proximal_weight, initial_state(fixed, proximal_center))
        g = relaxed_map(g, self.rest.relaxation if relaxation is None else relaxation)
        return checkpointed_map(g) if self.gradient.checkpointed and self.training else g

    def coarse_start(
        self, moving: torch.Tensor, fixed: torch.Tensor, initial_ddf: torch.Tensor | None = None
    ) -> tuple[torch.Tensor | None, tuple[torch.Tensor, ...]]:
        """See :py:meth:`IteratedNet.coarse_start`."""
        if self.coarse is None:
            return initial_ddf, ()
        check_pair(moving, fixed)
        with torch.no_grad():
            smaller, start = (downsample(moving), downsample(fixed)), None
            if initial_ddf is not None:
                check_ddf(fixed, initial_ddf)
                start = downsample_ddf(initial_ddf)
            center, steps = self.coarse.coarse_start(*smaller, start)
            if start is None or not self.coarse.proximal_weight:
                start = center
            # what the coarsest network is pulled to is zero wherever it starts
            center = None if self.coarse.coarse is None else center
            ddf, record = self.coarse.solve(*smaller, start, proximal_center=center)
            return upsample_state(ddf, fixed.shape[2:]), (record.steps, *steps)

    def solve_state(  # type: ignore[override]
        self,
        moving: torch.Tensor,
        fixed: torch.Tensor,
        initial_ddf: torch.Tensor | None = None,
        proximal_center: torch.Tensor | None = None,
        **changes: Any,
    ) -> tuple[torch.Tensor, SolverRecord]:
        """See :py:meth:`IteratedNet.solve_state`; starts by default from the solution of the coarser network, or zero.
        For ``proximal_center`` see :py:meth:`fixed_point_map`.
        """
        settings = self.solver.changed(**changes)
        start, proximal_center, coarse_steps = self._start(moving, fixed, initial_ddf, proximal_center)
        g = self.fixed_point_map(moving, fixed, proximal_center=proximal_center)
        state, record = solve_fixed_point(g, start, settings, fixed.ndim - 2 if self.hidden_channels else None)
        return state, replace(record, coarse_steps=coarse_steps)

    def _start(
        self, moving: torch.Tensor, fixed: torch.Tensor, ddf: torch.Tensor | None, center: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None, tuple[torch.Tensor, ...]]:
        """The first state, the proximal centre, and the steps of the coarser networks, 0 where they were not asked."""
        check_pair(moving, fixed)
        levels, network = 0, self.coarse
        while network is not None:
            levels, network = levels + 1, network.coarse
        steps = (torch.zeros(len(fixed), dtype=torch.long),) * levels
        if center is None and (ddf is None or self.proximal_weight):
            center, steps = self.coarse_start(moving, fixed)
        return initial_state(fixed, center if ddf is None else ddf, self.hidden_channels), center, steps

    def training_states(  # type: ignore[override]
        self,
        moving: torch.Tensor,
        fixed: torch.Tensor,
        initial_ddf: torch.Tensor | None = None,
        proximal_center: torch.Tensor | None = None,
    ) -> list[torch.Tensor]:
        """The intermediate states and the final one, each with its gradient; arguments as :py:meth:`solve_state`."""
        state, proximal_center, _ = self._start(moving, fixed, initial_ddf, proximal_center)
        full, short = (self.fixed_point_map(moving, fixed, factor, proximal_center) for factor in (1.0, None))
        ndim = fixed.ndim - 2
        options = {
            "rel_tol": self.solver.relative_tolerance,
            "ddf_channels": ndim if self.hidden_channels else None,
            **(self.solver.options or {}),
        }
        # made when it is needed: TorchDEQ's module keeps functions that cannot be pickled
        deq = build_deq(
            self.solver,
            n_states=self.gradient.num_states + 1,  # in TorchDEQ it counts the final state too
            grad=self.gradient.steps,
            tau=self.gradient.damping,
            ift=self.gradient.kind == "implicit",
            b_solver=torchdeq_name("plain"),
            b_max_iter=self.gradient.implicit_max_steps,
            b_tol=self.gradient.implicit_tolerance,
            b_stop_mode="rel",
        ).train(self.training)
        # TorchDEQ solves without gradients, and makes the phantom steps with them
        states, _ = deq(lambda x: full(x) if torch.is_grad_enabled() else short(x), state, solver_kwargs=options)
        return [s[:, :ndim] for s in states]


def coarse_to_fine(
    network: DEQRegistrationNet, num_levels: int = 1, max_steps: int = 48, weights: str | Path | None = None
) -> DEQRegistrationNet:
    """Put copies of a network before it, each for half the size of the next; see ``coarse`` of
    :py:class:`DEQRegistrationNet`.

    Args:
        network: the network of the full size, without a coarser one; changed in place and returned.
        num_levels: number of sizes, this one included. Defaults to 1: the network as it is.
        max_steps: step limit of each coarser network. Defaults to 48.
        weights: checkpoint of ``num_levels - 1`` sizes, trained at half the size: the coarser network, whose finest
            update this network's begins with too. Defaults to ``None``: the network's own weights.

    Raises:
        ValueError: When ``num_levels`` is below 1, or there are weights and no coarser network.
    """
    if int(num_levels) != num_levels or num_levels < 1:
        raise ValueError(f"num_levels must be a whole number of at least 1, got {num_levels}.")
    if num_levels == 1:
        if weights is not None:
            raise ValueError("weights are those of a coarser network, and num_levels is 1: there is none.")
        return network
    gradient = replace(network.gradient, num_states=0)
    solver = network.solver.changed(max_steps=max_steps)
    update = copy.deepcopy(network.update)
    coarse = DEQRegistrationNet(update, solver=solver, gradient=gradient, rest=network.rest).train(network.training)
    coarse = coarse_to_fine(coarse, num_levels - 1, max_steps)
    if weights is not None:
        load_weights(coarse, weights)
        network.update.load_state_dict(coarse.update.state_dict())
    network.coarse = coarse.requires_grad_(False)
    return network


def set_coarse_solver(network: nn.Module, **changes: Any) -> nn.Module:
    """Change the settings of :py:class:`monai_deq.solvers.SolverSettings`, unless ``None``, of the coarser networks of
    a network, if there are any, in place, and return the network.
    """
    level = network.coarse if isinstance(network, IteratedNet) else None
    while level is not None:
        level.solver = level.solver.changed(**changes)
        level = level.coarse
    return network
