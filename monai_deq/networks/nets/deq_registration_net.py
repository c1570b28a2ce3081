# SPDX-License-Identifier: Apache-2.0
"""Registration as the equilibrium of a learned update (DEQReg)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn as nn

from monai_deq.networks.blocks import UNetUpdate, check_ddf, warp_by_ddf
from monai_deq.networks.nets.iteration import (
    check_pair,
    hidden_channels,
    initial_state,
    proximal,
    recomputed,
    relaxed,
    state_map,
)
from monai_deq.networks.nets.pyramid import coarser, coarser_ddf, finer
from monai_deq.solvers import SolverRecord, build_deq, check_solver_options, solve_fixed_point, torchdeq_name
from monai_deq.utils import as_flag

__all__ = ["DEQRegistrationNet"]


class DEQRegistrationNet(nn.Module):
    """
    Deformable registration as a fixed point, "Bridging Classical and Learning-based Iterative Registration through
    Deep Equilibrium Models" (DEQReg, MICCAI 2025).

    From ``phi_0 = 0`` the displacement is iterated by ``g(phi) = phi + f_theta(moving, fixed, phi)`` until it stops
    changing (Eq. 5). Gradients come from ``phantom_steps`` damped steps taken from the detached equilibrium (Eq. 7-8)
    or, as an option, from the implicit function theorem (Eq. 6). In training, ``num_states`` intermediate states at
    equal intervals are returned too, each with a phantom gradient of its own (Eq. 9).

    In eval mode ``net(moving, fixed)`` returns ``(warped, ddf)``, as :py:class:`monai.networks.nets.VoxelMorph`; in
    training mode ``(warped, ddf, states)``, ``states`` a list of displacement fields in the order of the iteration.
    The state of the solver is float32 also under autocast.

    Args:
        update: module ``f(moving, fixed, ddf) -> delta``, or one with a hidden state and an attribute
            ``hidden_channels``, ``f(moving, fixed, ddf, hidden) -> (delta, hidden)``; the hidden state then is a part
            of the state that is solved for. Defaults to :py:class:`monai_deq.networks.blocks.UNetUpdate`.
        spatial_dims: 2 or 3, for the default update. Defaults to 3.
        max_steps: step limit ``T`` of the solver, in training and by default in eval mode. Defaults to 48.
        tolerance: RMS residual in voxels at which an item stops. Defaults to 1e-3.
        relative_tolerance: relative residual at which an item stops. Defaults to 0 (not used).
        num_states: number ``S`` of intermediate states supervised in training. Defaults to 3.
        phantom_steps: number ``K`` of steps through which the gradient goes. Defaults to 2.
        phantom_damping: damping ``tau`` of these steps, in (0, 1]. The paper does not give it. Defaults to 1.
        gradient: ``"phantom"`` or ``"implicit"`` (the exact gradient at the final state by a second fixed-point
            solve in the backward pass; intermediate states keep phantom gradients). Defaults to ``"phantom"``.
        implicit_max_steps: step limit of the backward solve of ``"implicit"``. Defaults to 48.
        implicit_tolerance: relative tolerance of the backward solve. Defaults to 1e-4.
        solver: ``"plain"`` or ``"anderson"``. Defaults to ``"plain"``.
        solver_options: further options of the solver.
        relaxation: factor ``alpha`` of the update, in (0, 1]: what is iterated, outside the phantom steps, is
            ``g(phi) = phi + alpha f_theta(moving, fixed, phi)``. The fixed points are the same. Training rewards steps
            that reach as far as they can in ``phantom_steps`` steps, and such steps end up overshooting by their own
            length, again and again; shorter ones come to rest. Not in the paper. Defaults to 1.
        proximal_weight: weight ``nu`` of a pull back to the proximal centre ``c``, the solution of the coarser network
            or, without one, zero: the map is ``g(phi) = phi + f_theta(moving, fixed, phi) - nu (phi - c)``, and its
            fixed points are those displacements at which the update equals ``nu (phi - c)``, the gradient of the
            proximal term ``nu / 2 |phi - c|^2``. Where the images say nothing, ``f_theta`` hardly answers to a change
            of the displacement, and a step without this term leaves nearly all of it. Not in the paper. Defaults to 0.
        use_checkpoint: keep nothing of a step in training but the state it starts from, and evaluate it again in the
            backward pass, one step at a time: the memory of one step whatever ``num_states`` and ``phantom_steps``
            are, for one more evaluation of each. It needs an update that gives the same again, without batch
            statistics or spectral normalisation, whose power iteration goes on at each evaluation. Defaults to
            ``False``.
        coarse: network of the same kind that registers the pair at half the size, by means of two voxels along each
            axis, and may itself have a coarser one. Where its iteration comes to rest is where this one starts, unless
            it is given a start, and what the proximal term pulls to; its own settings say how far it goes. It is taken
            as trained: no gradient goes through it. Not in the paper. Defaults to ``None``: the iteration starts from
            zero.

    Raises:
        ValueError: When an argument is out of its range.

    Example:

    .. code-block:: python

        net = DEQRegistrationNet(spatial_dims=3).eval()
        warped, ddf = net(moving, fixed)  # (B, 1, H, W, D) and (B, 3, H, W, D)
    """

    def __init__(
        self,
        update: nn.Module | None = None,
        spatial_dims: int = 3,
        max_steps: int = 48,
        tolerance: float = 1e-3,
        relative_tolerance: float = 0.0,
        num_states: int = 3,
        phantom_steps: int = 2,
        phantom_damping: float = 1.0,
        gradient: str = "phantom",
        implicit_max_steps: int = 48,
        implicit_tolerance: float = 1e-4,
        solver: str = "plain",
        solver_options: dict[str, Any] | None = None,
        relaxation: float = 1.0,
        proximal_weight: float = 0.0,
        use_checkpoint: bool = False,
        coarse: DEQRegistrationNet | None = None,
    ) -> None:
        super().__init__()
        if not 0 < relaxation <= 1:
            raise ValueError(f"relaxation must be in (0, 1], got {relaxation}.")
        if not 0 <= proximal_weight < 1:
            raise ValueError(f"proximal_weight must be in [0, 1), got {proximal_weight}.")
        if num_states < 0 or max_steps < num_states + 1:
            raise ValueError(
                f"num_states must be between 0 and max_steps - 1, got num_states={num_states}, max_steps={max_steps}."
            )
        if phantom_steps < 1:
            raise ValueError(f"phantom_steps must be at least 1, got {phantom_steps}.")
        if not 0 < phantom_damping <= 1:
            raise ValueError(f"phantom_damping must be in (0, 1], got {phantom_damping}.")
        if gradient not in ("phantom", "implicit"):
            raise ValueError(f'gradient must be "phantom" or "implicit", got {gradient!r}.')
        if implicit_max_steps < 1:
            raise ValueError(f"implicit_max_steps must be at least 1, got {implicit_max_steps}.")
        tolerances = {
            "tolerance": tolerance,
            "relative_tolerance": relative_tolerance,
            "implicit_tolerance": implicit_tolerance,
        }
        for name, value in tolerances.items():
            if not value >= 0:  # nor NaN
                raise ValueError(f"{name} must not be negative, got {value}.")
        self.update = UNetUpdate(spatial_dims) if update is None else update
        self.hidden_channels = hidden_channels(self.update)
        self.max_steps = max_steps
        self.num_states = num_states
        self.tolerance = tolerance
        self.relative_tolerance = relative_tolerance
        self.relaxation = relaxation
        self.proximal_weight = float(proximal_weight)
        self.use_checkpoint = as_flag(use_checkpoint, "use_checkpoint")
        self.coarse = coarse
        if coarse is not None:
            coarse.requires_grad_(False)
        self.solver = solver
        self.solver_options = check_solver_options(solver, solver_options)
        # In TorchDEQ n_states counts the final state too.
        self.deq = build_deq(
            solver,
            max_steps,
            tolerance,
            n_states=num_states + 1,
            grad=phantom_steps,
            tau=phantom_damping,
            ift=gradient == "implicit",
            b_solver=torchdeq_name("plain"),
            b_max_iter=implicit_max_steps,
            b_tol=implicit_tolerance,
            b_stop_mode="rel",
        )

    def fixed_point_map(
        self,
        moving: torch.Tensor,
        fixed: torch.Tensor,
        relaxation: float | None = None,
        proximal_center: torch.Tensor | None = None,
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """
        The map of a batch of pairs whose fixed point is sought.

        Args:
            moving: ``(B, 1, *spatial)``.
            fixed: ``(B, 1, *spatial)``.
            relaxation: factor of the update. Defaults to the network's own.
            proximal_center: what the proximal term pulls to, where there is one, ``(B, ndim, *spatial)``. Defaults to
                the solution of the coarser network, which is solved for here, or zero.

        Returns:
            Function of a state ``(B, ndim + hidden_channels, *spatial)``.
        """
        check_pair(moving, fixed)
        g = state_map(self.update, moving, fixed)
        if self.proximal_weight:
            if proximal_center is None:
                proximal_center = self.coarse_solution(moving, fixed)
            center = initial_state(fixed, proximal_center)
            g = proximal(g, self.proximal_weight, center)
        g = relaxed(g, self.relaxation if relaxation is None else relaxation)
        return recomputed(g) if self.use_checkpoint and self.training else g

    def coarse_solution(
        self, moving: torch.Tensor, fixed: torch.Tensor, initial_ddf: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        """
        Where the iteration starts, without gradients: the solutions of the coarser networks, each the start of the
        next, brought to the full size.

        Args:
            moving: ``(B, 1, *spatial)``.
            fixed: ``(B, 1, *spatial)``.
            initial_ddf: displacement that the coarsest network starts from, with a proximal term each of them, here at
                full size, ``(B, ndim, *spatial)``. Defaults to zero.

        Returns:
            ``(B, ndim, *spatial)`` in voxels; without a coarser network the argument itself.
        """
        return self.coarse_start(moving, fixed, initial_ddf)[0]

    def coarse_start(
        self, moving: torch.Tensor, fixed: torch.Tensor, initial_ddf: torch.Tensor | None = None
    ) -> tuple[torch.Tensor | None, tuple[torch.Tensor, ...]]:
        """
        :py:meth:`coarse_solution` with the steps of the solves behind it.

        Args:
            moving: ``(B, 1, *spatial)``.
            fixed: ``(B, 1, *spatial)``.
            initial_ddf: see :py:meth:`coarse_solution`. Defaults to zero.

        Returns:
            ``(B, ndim, *spatial)`` in voxels or ``None``, and ``(B,)`` each, from the finest of the coarser networks to
            the coarsest, the steps.
        """
        if self.coarse is None:
            return initial_ddf, ()
        check_pair(moving, fixed)
        with torch.no_grad():
            smaller = coarser(moving), coarser(fixed)
            start = None
            if initial_ddf is not None:
                check_ddf(fixed, initial_ddf)
                start = coarser_ddf(initial_ddf)
            center, steps = self.coarse.coarse_start(*smaller, start)
            if start is None or not self.coarse.proximal_weight:
                start = center
            # what the coarsest network is pulled to is zero wherever it starts
            center = None if self.coarse.coarse is None else center
            ddf, record = self.coarse.solve(*smaller, start, proximal_center=center)
            return finer(ddf, fixed.shape[2:]), (record.steps, *steps)

    def solve_state(
        self,
        moving: torch.Tensor,
        fixed: torch.Tensor,
        initial_ddf: torch.Tensor | None = None,
        proximal_center: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, SolverRecord]:
        """
        Solve for the equilibrium without gradients, as :py:meth:`solve`, and return the whole state.

        Args:
            moving: ``(B, 1, *spatial)``.
            fixed: ``(B, 1, *spatial)``.
            initial_ddf: warm start, ``(B, ndim, *spatial)``; a hidden state starts anew. Defaults to the solution of
                the coarser network, or zero.
            proximal_center: what the proximal term pulls to, where there is one, ``(B, ndim, *spatial)``. Defaults to
                the solution of the coarser network, or zero.
            kwargs: settings of :py:func:`monai_deq.solvers.solve_fixed_point` in place of the network's own.

        Returns:
            The displacement with the hidden state behind it, ``(B, ndim + hidden_channels, *spatial)``, and the record.
        """
        coarse_steps: tuple[torch.Tensor, ...] = ()
        if proximal_center is None and (initial_ddf is None or self.proximal_weight):
            proximal_center, coarse_steps = self.coarse_start(moving, fixed)
        initial_ddf = proximal_center if initial_ddf is None else initial_ddf
        g = self.fixed_point_map(moving, fixed, proximal_center=proximal_center)
        settings: dict[str, Any] = {
            "solver": self.solver,
            "max_steps": self.max_steps,
            "tolerance": self.tolerance,
            "relative_tolerance": self.relative_tolerance,
            "solver_options": self.solver_options if kwargs.get("solver", self.solver) == self.solver else None,
            "ddf_channels": fixed.ndim - 2 if self.hidden_channels else None,
        }
        state = initial_state(fixed, initial_ddf, self.hidden_channels)
        state, record = solve_fixed_point(g, state, **{**settings, **kwargs})
        return state, replace(record, coarse_steps=coarse_steps)

    def solve(
        self,
        moving: torch.Tensor,
        fixed: torch.Tensor,
        initial_ddf: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, SolverRecord]:
        """
        Solve for the equilibrium without gradients.

        Args:
            moving: ``(B, 1, *spatial)``.
            fixed: ``(B, 1, *spatial)``.
            initial_ddf: warm start, ``(B, ndim, *spatial)``; a hidden state starts anew. Defaults to the solution of
                the coarser network, or zero.
            kwargs: ``proximal_center`` of :py:meth:`solve_state`, and settings of
                :py:func:`monai_deq.solvers.solve_fixed_point` in place of the network's own.

        Returns:
            The displacement ``(B, ndim, *spatial)`` and the record of the solve.
        """
        state, record = self.solve_state(moving, fixed, initial_ddf, **kwargs)
        # without the hidden state, which a view would keep in memory
        return state[:, : fixed.ndim - 2].clone() if self.hidden_channels else state, record

    def forward(
        self,
        moving: torch.Tensor,
        fixed: torch.Tensor,
        initial_ddf: torch.Tensor | None = None,
        max_steps: int | None = None,
        proximal_center: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor] | tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        """
        Args:
            moving: ``(B, 1, *spatial)``, intensities in [0, 1].
            fixed: ``(B, 1, *spatial)``, intensities in [0, 1].
            initial_ddf: warm start, ``(B, ndim, *spatial)``. Defaults to the solution of the coarser network, or zero.
            max_steps: step limit of this solve. Defaults to the network's own.
            proximal_center: what the proximal term pulls to, where there is one, ``(B, ndim, *spatial)``. Defaults to
                the solution of the coarser network, or zero.

        Returns:
            ``(warped, ddf)`` in eval mode, ``(warped, ddf, states)`` in training mode.

        Raises:
            ValueError: When the shapes do not fit, or ``max_steps`` is too small for the intermediate states.
        """
        if max_steps is not None and max_steps < (self.num_states + 1 if self.training else 1):
            raise ValueError(f"max_steps must be above the {self.num_states} intermediate states, got {max_steps}.")
        if not self.training:
            steps = {} if max_steps is None else {"max_steps": max_steps}
            ddf, _ = self.solve(moving, fixed, initial_ddf, proximal_center=proximal_center, **steps)
            return warp_by_ddf(moving, ddf), ddf
        if proximal_center is None and (initial_ddf is None or self.proximal_weight):
            proximal_center = self.coarse_solution(moving, fixed)
        initial_ddf = proximal_center if initial_ddf is None else initial_ddf
        full, short = (self.fixed_point_map(moving, fixed, factor, proximal_center) for factor in (1.0, None))
        state, ndim = initial_state(fixed, initial_ddf, self.hidden_channels), fixed.ndim - 2
        options = {
            "rel_tol": self.relative_tolerance,
            "ddf_channels": ndim if self.hidden_channels else None,
            **self.solver_options,
            # TorchDEQ asks for the type, and takes None for its own number
            "f_max_iter": self.max_steps if max_steps is None else int(max_steps),
        }
        # TorchDEQ solves without gradients, and makes the phantom steps with them
        states, _ = self.deq(lambda x: full(x) if torch.is_grad_enabled() else short(x), state, solver_kwargs=options)
        ddfs = [s[:, :ndim] for s in states]
        return warp_by_ddf(moving, ddfs[-1]), ddfs[-1], ddfs[:-1]
