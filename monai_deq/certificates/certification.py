# SPDX-License-Identifier: Apache-2.0
"""What can be said of a solution of a fixed-point iteration: whether it is at rest, attracts, and is the only one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from monai_deq.certificates.answers import HARMLESS_CHANGES, harmless_answers
from monai_deq.certificates.spectrum import spectral_radius
from monai_deq.networks.nets import EnergyRegistrationNet, IteratedNet, RegistrationNet
from monai_deq.solvers import MEASURES, SolverRecord, StopReason, random_smooth_ddf, residual_norms

__all__ = ["OPTIONAL_RECORDS", "Certificate", "Verdict", "certified_solve", "certify", "check_certificate"]
__all__ += ["starting_point", "verdict"]

#: what a certificate, the energy and a finish say of a pair beside what every solver says
OPTIONAL_RECORDS: tuple[str, ...] = ("verdict", "spectral_radius", "start_distance", "sensitive_to")
OPTIONAL_RECORDS += tuple(f"answer_{name}_{what}" for name in HARMLESS_CHANGES for what in ("max", "mean"))
OPTIONAL_RECORDS += MEASURES

#: a residual that falls by less than this over a quarter of the steps does not fall
_FALLING = 0.95
#: a residual that grows by more than this over a quarter of the steps grows
_GROWING = 1.5
#: an answer to a harmless change that is larger than this, in voxels, is named
_SENSITIVE = 1.0
#: with fewer steps the residuals say nothing of where they go
_LEAST_STEPS = 8


class Verdict:
    """What became of an iteration."""

    CONVERGED = "converged"
    UNCONFIRMED = "unconfirmed"
    CYCLING = "cycling"
    DIVERGING = "diverging"
    STEP_LIMIT = "step limit"


@dataclass(frozen=True)
class Certificate:
    """What was measured at the solution of one pair; ``None`` where it was not asked for.

    Args:
        verdict: one of the values of :py:class:`Verdict`, see :py:func:`verdict`.
        residual: RMS over voxels of ``|g(x) - x|`` at the solution ``x`` itself, in voxels.
        relative_residual: ``|g(x) - x| / |g(x)|`` there.
        steps: evaluations of the map that led to the solution.
        spectral_radius: of the Jacobian of ``g`` at the solution, see :py:func:`spectral_radius`. Below 1 the solution
            attracts all states near it; a step shrinks their distance by that factor in the long run.
        start_distance: RMS distance in voxels between the solution and that from a random smooth start, the largest.
        answers: by each of :py:data:`HARMLESS_CHANGES` of the images the largest and the mean difference of the
            displacement, in voxels, see :py:func:`harmless_answers`.
    """

    verdict: str
    residual: float
    relative_residual: float
    steps: int
    spectral_radius: float | None = None
    start_distance: float | None = None
    answers: Mapping[str, tuple[float, float]] | None = None

    @property
    def sensitive_to(self) -> list[str]:
        """Harmless changes to which the displacement does not answer to within a voxel, on the mean of the voxels."""
        return [name for name, (_, mean) in (self.answers or {}).items() if not mean <= _SENSITIVE]

    def as_dict(self) -> dict[str, Any]:
        """The fields by name, NaN for what was not asked for, which data loaders take and ``None`` they do not. Answers
        that were asked for are ``"answer_flip_max"``, ``"answer_flip_mean"`` and so on, with ``"sensitive_to"``, the
        names in one text or ``"nothing"``.
        """
        fields = asdict(self)
        answers = fields.pop("answers") or {}
        words = {name: math.nan if value is None else value for name, value in fields.items()}
        for name, (largest, mean) in answers.items():
            words |= {f"answer_{name}_max": largest, f"answer_{name}_mean": mean}
        return words | ({"sensitive_to": ", ".join(self.sensitive_to) or "nothing"} if answers else {})


def verdict(residuals: Sequence[float], residual: float, at_rest: bool, reason: str = StopReason.STEP_LIMIT) -> str:
    """What became of an iteration, from its residuals and from why it stopped.

    - ``"diverging"``: a number is not finite, or at the step limit the residuals of the last quarter of the steps are
      more than 1.5 times those of the quarter before (medians).
    - ``"converged"``: the solution is at rest, whatever ended the solve.
    - ``"unconfirmed"``: the solver met its tolerance, but the solution is not at rest: the last step was short by
      chance, folds were removed behind it, or the tolerance here is the lower one.
    - ``"cycling"``: at the step limit they do not fall, to less than 0.95 times: a cycle, or a drift that does not slow
      down.
    - ``"step limit"``: at the step limit they still fall, or there are fewer than 8 of them.

    Args:
        residuals: residual of each step, in voxels.
        residual: residual at the solution, in voxels.
        at_rest: whether it meets a tolerance.
        reason: why the solver stopped, one of the values of :py:class:`monai_deq.solvers.StopReason`. Defaults to the
            step limit.
    """
    trace = torch.tensor([*residuals, residual], dtype=torch.float64)
    if reason == StopReason.NON_FINITE or not bool(torch.isfinite(trace).all()):
        return Verdict.DIVERGING
    if at_rest:
        return Verdict.CONVERGED
    if reason != StopReason.STEP_LIMIT:
        return Verdict.UNCONFIRMED
    n = len(trace)
    if n < _LEAST_STEPS:
        return Verdict.STEP_LIMIT
    before, last = (float(trace[k * n // 4 : (k + 1) * n // 4].median()) for k in (2, 3))
    if last > _GROWING * before:
        return Verdict.DIVERGING
    return Verdict.CYCLING if last > _FALLING * before else Verdict.STEP_LIMIT


#: what a certificate looks at unless it is told otherwise
_DEFAULTS = {"spectral_iterations": 0, "random_starts": 0, "start_rms": 3.0, "start_smoothness": 8.0, "seed": 0}
_DEFAULTS |= {"answers": False}


def check_certificate(certificate: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Check what is to be examined of a solution, and return a copy.

    Args:
        certificate: ``None``, or some of ``tolerance``: RMS residual in voxels at which a pair has converged, and a
            hidden state in its own units (default: that of the solve); ``spectral_iterations`` of
            :py:func:`spectral_radius` (default 0: not computed); ``random_starts``: number of random smooth
            displacements, the same for all pairs, to solve from anew (default 0), and their ``start_rms`` and
            ``start_smoothness``, see :py:func:`monai_deq.solvers.random_smooth_ddf` (default 3 and 8 voxels); ``seed``
            of all random numbers (default 0); ``answers``: whether to solve anew with the images changed as
            :py:func:`harmless_answers` says (default False).

    Raises:
        TypeError: When there is no such option.
        ValueError: When a number is out of its range.
    """
    if certificate is None:
        return None
    if not isinstance(certificate, Mapping):
        raise ValueError(f"certificate must be a dictionary of options or None, got {certificate!r}.")
    for name, value in certificate.items():
        if name not in _DEFAULTS and name != "tolerance":
            raise TypeError(f"certificate takes tolerance, {', '.join(_DEFAULTS)}, got {name}.")
        if name == "answers" and not isinstance(value, bool):
            raise ValueError(f"certificate: answers: expected True or False, got {value!r}.")
        lowest = 1e-6 if name == "start_smoothness" else 0
        if not value >= lowest or (name == "spectral_iterations" and value == 1):
            raise ValueError(f"certificate: {name} is out of its range, got {value}.")
    return dict(certificate)


def starting_point(
    network: IteratedNet, moving: torch.Tensor, fixed: torch.Tensor, initial_ddf: torch.Tensor | None = None
) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
    """Where the iteration at full size begins, when a displacement ``(B, ndim, *spatial)`` is to be forgotten: with a
    proximal term it enters at each size of a network with coarser ones, and without at the coarsest, behind which the
    others start. The pairs are ``(B, 1, *spatial)``; without a displacement it is zero.

    Returns:
        The start, and what ``solve_state`` and ``fixed_point_map`` are to be given by keyword: what a proximal term
        pulls to, solved for from the displacement too.
    """
    if network.coarse is None:
        return initial_ddf, {}
    center, _ = network.coarse_start(moving, fixed, initial_ddf)
    if not network.proximal_weight or center is None:
        return center, {}
    return center if initial_ddf is None else initial_ddf, {"proximal_center": center}


def certify(
    network: IteratedNet,
    moving: torch.Tensor,
    fixed: torch.Tensor,
    state: torch.Tensor,
    record: SolverRecord,
    certificate: Mapping[str, Any] | None = None,
    solver: Mapping[str, Any] | None = None,
    given: Mapping[str, torch.Tensor] | None = None,
    initial_ddf: torch.Tensor | None = None,
) -> list[Certificate]:
    """Examine the solutions of a batch of pairs ``(B, 1, *spatial)``: one certificate a pair.

    Costs one evaluation of the map; with ``spectral_iterations`` one more that keeps its backward memory and as many
    backward passes; with ``random_starts`` as many further solves; with ``answers`` four more than there are axes.

    Args:
        network: the network.
        moving: moving images.
        fixed: fixed images.
        state: what ``network.solve_state`` returned for them, ``(B, ndim + hidden_channels, *spatial)``.
        record: the record of that solve.
        certificate: what to examine, see :py:func:`check_certificate`. Defaults to none of the options.
        solver: settings of these solves in place of the network's own. Defaults to none.
        given: what ``network.solve_state`` and ``fixed_point_map`` take by keyword: ``"proximal_center"``, what the
            proximal term pulls to, ``(B, ndim, *spatial)``, else it is solved for here; of the energy ``"mask"``.
        initial_ddf: what the solve started from, ``(B, ndim, *spatial)``. For the answers; defaults to its own.

    Raises:
        TypeError: When there is no such option.
        ValueError: When a number is out of its range.
    """
    changes = dict(solver or {})
    settings = network.solver.changed(**changes)
    options = {**_DEFAULTS, "tolerance": settings.tolerance, **(check_certificate(certificate) or {})}
    tolerance, relative_tolerance = options["tolerance"], settings.relative_tolerance
    iterations, random_starts, seed = (options[k] for k in ("spectral_iterations", "random_starts", "seed"))
    given = dict(given or {})
    ndim, batch = fixed.ndim - 2, len(fixed)
    g = network.fixed_point_map(moving, fixed, **given)
    with torch.no_grad():
        after = g(state).to(state.dtype)
        change = after - state
    residuals, relatives = residual_norms(change[:, :ndim].double(), after[:, :ndim].double())
    at_rest = (residuals <= tolerance) | (relatives <= relative_tolerance)
    if state.shape[1] > ndim:
        # a hidden state that still moves may move the displacement again
        hidden, hidden_relative = residual_norms(change[:, ndim:].double(), after[:, ndim:].double())
        at_rest &= (hidden <= tolerance) | (hidden_relative <= relative_tolerance)
    radii = spectral_radius(g, state, iterations, seed).tolist() if iterations else [None] * batch
    distances: list[float | None] = [None] * batch
    if random_starts:
        shape, largest = (1, ndim, *fixed.shape[2:]), torch.zeros(batch, dtype=torch.float64)
        for i in range(random_starts):
            # each item from the same, whatever its place: a pair's certificate does not depend on its batch
            random = random_smooth_ddf(shape, options["start_rms"], options["start_smoothness"], seed + i, fixed.device)
            random = random.repeat(batch, *[1] * (ndim + 1))
            start, other_center = starting_point(network, moving, fixed, random)
            other, _ = network.solve_state(moving, fixed, start, **{**given, **other_center}, **changes)
            square = (other[:, :ndim] - state[:, :ndim]).double().square().flatten(1).sum(dim=1)
            # torch.maximum keeps a NaN
            largest = torch.maximum(largest, (square / other[0, 0].numel()).sqrt().cpu())
        distances = list(largest.tolist())
    answers = dict[str, tuple[torch.Tensor, torch.Tensor]]()
    if options["answers"]:
        # what a proximal term pulls to is another for other images
        own = {name: value for name, value in given.items() if name != "proximal_center"}
        answers = harmless_answers(network, moving, fixed, state[:, :ndim], initial_ddf, **own, **changes)
    return [
        Certificate(
            verdict=verdict(
                record.residual[i, : int(record.steps[i])].tolist(),
                float(residuals[i]),
                bool(at_rest[i]),
                record.reason[i],
            ),
            residual=float(residuals[i]),
            relative_residual=float(relatives[i]),
            steps=int(record.steps[i]),
            spectral_radius=radii[i],
            start_distance=distances[i],
            answers={name: (float(a[i]), float(b[i])) for name, (a, b) in answers.items()} or None,
        )
        for i in range(batch)
    ]


def certified_solve(
    network: RegistrationNet,
    moving: torch.Tensor,
    fixed: torch.Tensor,
    initial_ddf: torch.Tensor | None = None,
    certificate: Mapping[str, Any] | None = None,
    finish: RegistrationNet | None = None,
    mask: torch.Tensor | None = None,
    **changes: Any,
) -> tuple[torch.Tensor, SolverRecord, list[Certificate] | None]:
    """Solve a batch of pairs without gradients and examine the solutions.

    Arguments as :py:meth:`monai_deq.networks.nets.RegistrationNet.solve` of the ``network``, and:

    Args:
        certificate: what to examine, see :py:func:`check_certificate`. Defaults to ``None``: nothing.
        finish: method that goes on from the solution, as :py:func:`monai_deq.networks.nets.energy_finish`. The
            certificate is of the solution before it, the record has its own. One that descends on an energy itself is
            not finished by another. Defaults to ``None``: none.
        mask: where the energy compares the fixed images, ``(B, 1, *spatial)``. Defaults to ``None``: everywhere.

    Raises:
        ValueError: When there is a mask, but neither method goes by the energy.

    Returns:
        The displacement ``(B, ndim, *spatial)``, the record, and a certificate a pair: ``None`` when none is asked for
        or the method is not iterated.
    """
    by_energy = [isinstance(method, EnergyRegistrationNet) for method in (network, finish)]
    if mask is not None and not any(by_energy):
        raise ValueError(f"mask: {type(network).__name__} takes none; leave it out, or register by the energy.")
    own, later = ({"mask": mask} if mask is not None and takes else {} for takes in by_energy)
    ddf, record, certificates = _certified(network, moving, fixed, initial_ddf, certificate, own, **changes)
    if finish is not None and not by_energy[0]:
        with torch.no_grad():
            ddf, finished = finish.solve(moving, fixed, ddf, **later)
        record = replace(record, finish=finished)
    return ddf, record, certificates


def _certified(
    network: RegistrationNet,
    moving: torch.Tensor,
    fixed: torch.Tensor,
    initial_ddf: torch.Tensor | None,
    certificate: Mapping[str, Any] | None,
    given: dict[str, Any],
    **changes: Any,
) -> tuple[torch.Tensor, SolverRecord, list[Certificate] | None]:
    """See :py:func:`certified_solve`; what is ``given`` goes to the network by keyword."""
    with torch.no_grad():
        if certificate is None or not isinstance(network, IteratedNet):
            ddf, record = network.solve(moving, fixed, initial_ddf, **given, **changes)
            return ddf, record, None
        coarse_steps = None
        if network.coarse is not None and network.proximal_weight:
            # once, for the solve and for the map that is examined
            center, coarse_steps = network.coarse_start(moving, fixed)
            given = {**given, "proximal_center": center}
        state, record = network.solve_state(moving, fixed, initial_ddf, **given, **changes)
        if coarse_steps is not None:
            record = replace(record, coarse_steps=coarse_steps)
        certificates = certify(network, moving, fixed, state, record, certificate, changes, given, initial_ddf)
        ndim = fixed.ndim - 2
        # without the hidden state, which a view would keep in memory
        return state if state.shape[1] == ndim else state[:, :ndim].clone(), record, certificates
