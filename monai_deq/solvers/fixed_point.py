# SPDX-License-Identifier: Apache-2.0
"""Plain and Anderson fixed-point iteration for displacement fields, as solvers of TorchDEQ.

TorchDEQ's own solvers stop batch-wide by the raw L2 norm, return the lowest-residual state (the first, when the flow
layer starts near zero), and let a NaN in one item reach the others. These stop item by item, by residual in voxels or
by relative residual, and return the final state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torchdeq.solver import register_solver
from torchdeq.solver.stat import SolverStat

from monai_deq.solvers.records import SolverRecord, StopReason

__all__ = ["SOLVERS", "anderson_solver", "plain_solver", "residual_norms", "torchdeq_name"]

#: growth of the residual at which Anderson mixing forgets its history
_GROWTH_LIMIT = 2.0
#: how far ``patience`` shortens the steps: beyond that it is rounding that the residual cannot fall below
_SMALLEST_SHARE = 1 / 16

Map = Callable[[torch.Tensor], torch.Tensor]
SolverOutput = tuple[torch.Tensor, list[torch.Tensor], SolverStat]


def _per_item(mask: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return mask.view(-1, *[1] * (like.ndim - 1))


def _norm(x: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(x.flatten(1), dim=1)


def residual_norms(fx: torch.Tensor, gx: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """RMS over voxels of ``|f|`` and ``|f| / |g|``, 0 where nothing moves, ``(B,)`` each, of ``f = g(x) - x`` and ``g =
    g(x)``, ``(B, C, *spatial)`` both.
    """
    norm = _norm(fx)
    return norm * max(fx[0, 0].numel(), 1) ** -0.5, torch.where(norm == 0, norm, norm / _norm(gx))


def _iterate(
    func: Map,
    x0: torch.Tensor,
    max_iter: int,
    tol: float,
    rel_tol: float,
    indexing: Sequence[int] | None,
    ddf_channels: int | None,
    damping: float = 1.0,
    patience: int = 0,
    mixing: _Anderson | None = None,
) -> SolverOutput:
    """Drive the iteration until every item has stopped. See :py:func:`plain_solver`, :py:func:`anderson_solver`."""
    if max_iter < 1:
        raise ValueError(f"max_iter must be at least 1, got {max_iter}.")
    if x0.ndim < 2:
        raise ValueError(f"the state must have shape (B, C, ...), got {tuple(x0.shape)}.")
    if ddf_channels is not None and not 0 < ddf_channels < x0.shape[1]:
        raise ValueError(f"ddf_channels must be from 1 to {x0.shape[1] - 1}, got {ddf_channels}.")
    wanted = list(indexing or [])
    x = x0
    batch = x.shape[0]
    active = torch.ones(batch, dtype=torch.bool, device=x.device)
    steps = torch.zeros(batch, dtype=torch.long, device=x.device)
    reason = [StopReason.STEP_LIMIT] * batch
    residuals, relatives = [], []
    states: dict[int, torch.Tensor] = {}
    best = torch.full((batch,), float("inf"), device=x.device, dtype=x.dtype)
    waited = torch.zeros(batch, dtype=torch.long, device=x.device)
    share = torch.full_like(best, damping)

    for k in range(1, max_iter + 1):
        # a map that computes in half precision must not take the state down with it
        gx = func(x).to(x.dtype)
        if gx.shape != x.shape:
            raise ValueError(f"the map must keep the shape of the state {tuple(x.shape)}, it gave {tuple(gx.shape)}.")
        fx = gx - x
        norm = _norm(fx)
        residual, relative = residual_norms(fx[:, :ddf_channels], gx[:, :ddf_channels])
        met, met_relative = residual <= tol, relative <= rel_tol
        if ddf_channels is not None:
            # a hidden state that still moves may move the displacement again
            hidden, hidden_relative = residual_norms(fx[:, ddf_channels:], gx[:, ddf_channels:])
            met, met_relative = met & (hidden <= tol), met_relative & (hidden_relative <= rel_tol)
        finite = torch.isfinite(norm)
        nan = torch.full_like(residual, float("nan"))
        residuals.append(torch.where(active, residual, nan))
        relatives.append(torch.where(active, relative, nan))

        step = active & finite
        done = step & (met | met_relative)
        for i in torch.nonzero(active & ~finite).flatten().tolist():
            reason[i] = StopReason.NON_FINITE
        for i in torch.nonzero(done).flatten().tolist():
            reason[i] = StopReason.TOLERANCE if bool(met[i]) else StopReason.RELATIVE_TOLERANCE

        if patience:
            waited = torch.where(norm < best, torch.zeros_like(waited), waited + 1)
            best = torch.fmin(best, norm)
            late = waited >= patience
            share = torch.where(late, (share / 2).clamp(min=_SMALLEST_SHARE * damping), share)
            waited = torch.where(late, torch.zeros_like(waited), waited)
        candidate = gx if damping == 1 and not patience else gx - _per_item(1 - share, fx) * fx
        if mixing is not None and k < max_iter:
            # an item that stops here, and everyone at the last step, takes g(x) itself: its residual was measured
            candidate = torch.where(_per_item(done, gx), gx, mixing(gx, fx, norm))
        x = candidate if bool(step.all()) else torch.where(_per_item(step, x), candidate, x)
        steps += step
        active = step & ~done
        if k in wanted:
            states[k] = x
        if not bool(active.any()):
            break

    # every index asked for gets a state, also where all items stopped before it
    trajectory = [states.get(k, x) for k in wanted]
    record = SolverRecord(
        steps=steps.cpu(),
        residual=torch.stack(residuals, dim=1).detach().cpu(),
        relative_residual=torch.stack(relatives, dim=1).detach().cpu(),
        converged=torch.tensor([r in (StopReason.TOLERANCE, StopReason.RELATIVE_TOLERANCE) for r in reason]),
        reason=tuple(reason),
    )
    info = SolverStat(
        abs_lowest=record.final_residual,
        rel_lowest=record.final_relative_residual,
        abs_trace=record.residual,
        rel_trace=record.relative_residual,
        nstep=record.steps,
        record=record,
    )
    return x, trajectory, info


def _tolerances(tol: float, stop_mode: str, rel_tol: float) -> tuple[float, float]:
    """TorchDEQ gives one tolerance and says which it is."""
    if stop_mode not in ("abs", "rel"):
        raise ValueError(f'stop_mode must be "abs" (RMS voxels) or "rel", got {stop_mode!r}.')
    if tol < 0 or rel_tol < 0:
        raise ValueError(f"tolerances must not be negative, got tol={tol} and rel_tol={rel_tol}.")
    return (tol, rel_tol) if stop_mode == "abs" else (-1.0, max(tol, rel_tol))


def plain_solver(
    func: Map,
    x0: torch.Tensor,
    max_iter: int = 48,
    tol: float = 1e-3,
    stop_mode: str = "abs",
    indexing: Sequence[int] | None = None,
    rel_tol: float = 0.0,
    ddf_channels: int | None = None,
    damping: float = 1.0,
    patience: int = 0,
) -> SolverOutput:
    """Fixed-point iteration ``x <- x + damping * (g(x) - x)``, per item.

    An item stops when its residual (RMS over voxels of ``|g(x) - x|``) is at most ``tol``, when its relative residual
    is at most ``rel_tol``, when the map returns something non-finite for it (it then keeps its last finite state), or
    at the step limit. Items that have stopped keep their state while the others go on.

    Args:
        func: the map ``g``, ``(B, C, ...) -> (B, C, ...)``, that does not mix items of the batch.
        x0: initial state ``(B, C, ...)``.
        max_iter: step limit. Defaults to 48.
        tol: tolerance in voxels (``"abs"``) or relative (``"rel"``); 0 stops only at a fixed point. Defaults to 1e-3.
        stop_mode: ``"abs"`` or ``"rel"``, TorchDEQ's words. Defaults to ``"abs"``.
        indexing: step numbers (from 1) whose states are returned, past the last step the final one. Defaults to none.
        rel_tol: further tolerance on the relative residual. Defaults to 0.
        ddf_channels: number of leading channels that are the displacement, with a hidden state behind it. Residuals
            recorded are those of the displacement; to stop, the hidden state must be at rest to the same tolerance too,
            in its own units. Defaults to ``None``: all channels.
        damping: share of the step that is taken, in (0, 1]. Defaults to 1.
        patience: number of steps after which an item whose residual has not fallen below its smallest takes steps half
            as long from there on, down to a sixteenth, so that a cycle across its fixed point comes to rest. Residuals
            stay those of full steps. Defaults to 0: steps are as long as they are.

    Returns:
        The final state, the states at ``indexing``, and TorchDEQ's statistics with a :py:class:`SolverRecord` under
        ``"record"``.

    Raises:
        ValueError: When an option is out of its range.
    """
    if not 0 < damping <= 1:
        raise ValueError(f"damping must be in (0, 1], got {damping}.")
    if int(patience) != patience or patience < 0:
        raise ValueError(f"patience must be a whole number, not negative, got {patience}.")
    tol, rel_tol = _tolerances(tol, stop_mode, rel_tol)
    return _iterate(func, x0, max_iter, tol, rel_tol, indexing, ddf_channels, damping=damping, patience=patience)


class _Anderson:
    """Anderson mixing (type II) over a window, item by item."""

    def __init__(self, window: int, regularization: float) -> None:
        self.window = window
        self.regularization = regularization
        self.gx: list[torch.Tensor] = []
        self.fx: list[torch.Tensor] = []
        self.valid: list[torch.Tensor] = []
        self.gram: torch.Tensor | None = None
        self.best: torch.Tensor | None = None

    def __call__(self, gx: torch.Tensor, fx: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        # Nothing goes from one item to another; what becomes of one that is frozen or not finite is not used.
        # Where mixing made things worse the item starts its history anew from a plain step.
        best = residual if self.best is None else self.best
        mixed = torch.stack(self.valid).sum(dim=0) > 1 if self.valid else residual < 0
        restart = mixed & (residual > _GROWTH_LIMIT * best)
        self.best = torch.where(restart, residual, torch.fmin(best, residual))
        self.valid = [v & ~restart for v in self.valid]
        self.gx.append(gx)
        self.fx.append(fx)
        self.valid.append(torch.ones_like(restart))
        if len(self.fx) > self.window:
            for history in (self.gx, self.fx, self.valid):
                history.pop(0)  # type: ignore[attr-defined]
        gram = self._extended_gram()
        n = len(self.fx)
        if n == 1:
            return gx

        # minimise |sum_j w_j f_j|^2 + regularization * sum_j w_j^2 |f_j|^2 under sum_j w_j = 1; with each f_j scaled to
        # length one the system is well conditioned, however fast the residuals have fallen, and free of units
        diagonal = gram.diagonal(dim1=1, dim2=2)
        usable = torch.stack(self.valid, dim=1) & (diagonal > 0)
        scale = torch.where(usable, diagonal.rsqrt(), torch.zeros_like(diagonal))
        gram = gram * scale[:, :, None] * scale[:, None, :]
        gram = gram + torch.diag_embed(torch.where(usable, self.regularization, 1.0).to(gram.dtype))
        # a singular system is no error: that item takes a plain step
        weights, singular = torch.linalg.solve_ex(gram, scale)
        weights = weights * scale
        weights = weights / weights.sum(dim=1, keepdim=True)
        solved = (singular == 0) & torch.isfinite(weights).all(dim=1)
        newest = torch.zeros_like(weights)
        newest[:, -1] = 1
        weights = torch.where(solved[:, None], weights, newest).to(gx.dtype)
        out = _per_item(weights[:, 0], gx) * self.gx[0]
        for i in range(1, n):
            out.addcmul_(_per_item(weights[:, i], gx), self.gx[i])
        return out

    def _extended_gram(self) -> torch.Tensor:
        """Inner products of the residuals kept, ``(B, n, n)``: those of the newest are new, the others are known."""
        n, newest = len(self.fx), self.fx[-1].flatten(1)
        gram = newest.new_zeros(len(newest), n, n, dtype=torch.float64)
        if self.gram is not None and n > 1:
            gram[:, :-1, :-1] = self.gram[:, 1 - n :, 1 - n :]
        for i, f in enumerate(self.fx):
            # not a matrix product, which autocast or TF32 would do in half precision
            gram[:, i, -1] = gram[:, -1, i] = (f.flatten(1) * newest).sum(dim=1, dtype=torch.float64)
        self.gram = gram
        return gram


def anderson_solver(
    func: Map,
    x0: torch.Tensor,
    max_iter: int = 48,
    tol: float = 1e-3,
    stop_mode: str = "abs",
    indexing: Sequence[int] | None = None,
    rel_tol: float = 0.0,
    ddf_channels: int | None = None,
    window: int = 4,
    regularization: float = 1e-5,
) -> SolverOutput:
    """Anderson acceleration (type II, no damping) of the fixed-point iteration, per item.

    The next state mixes the last ``window`` images ``g(x_j)`` with the weights, summing to one, that minimise the norm
    of the mixed residuals (Walker and Ni, SIAM J. Numer. Anal. 2011). The ``2 * window`` states kept have their own
    precision; the small linear system is solved in float64. When a mixed step takes an item's residual past
    twice its best so far, its history is dropped and it goes on from a plain step.

    Arguments, return and errors as :py:func:`plain_solver`, and:

    Args:
        window: number of states mixed, at least 1 (1 is the plain iteration). Defaults to 4.
        regularization: ridge on the Gram matrix of the residuals, relative to their squared norms. Much below the
            rounding of float32 (1e-7), residuals that are alike get large weights of either sign by chance, which can
            throw the state far away at an unchanged residual. Defaults to 1e-5.
    """
    if window < 1:
        raise ValueError(f"window must be at least 1, got {window}.")
    if regularization < 0:
        raise ValueError(f"regularization must not be negative, got {regularization}.")
    tol, rel_tol = _tolerances(tol, stop_mode, rel_tol)
    mixing = _Anderson(window, regularization)
    return _iterate(func, x0, max_iter, tol, rel_tol, indexing, ddf_channels, mixing=mixing)


#: solvers by the name that networks and transforms take
SOLVERS: dict[str, Callable[..., SolverOutput]] = {"plain": plain_solver, "anderson": anderson_solver}


def torchdeq_name(solver: str) -> str:
    """Name under which a solver, ``"plain"`` or ``"anderson"``, is registered with TorchDEQ.

    Raises:
        ValueError: When there is no such solver.
    """
    if solver not in SOLVERS:
        raise ValueError(f"unknown solver {solver!r}, available: {', '.join(map(repr, SOLVERS))}.")
    return f"monai_deq_{solver}"


for _name, _solver in SOLVERS.items():
    register_solver(torchdeq_name(_name), _solver)
