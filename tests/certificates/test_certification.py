# SPDX-License-Identifier: Apache-2.0
"""Certificates: verdicts on known traces, radii of known maps, distances between known solutions."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from nets import deq_net, tiny_recurrent_update, tiny_update

from monai_deq.certificates import Certificate, certified_solve, certify, check_certificate, verdict
from monai_deq.networks.nets import UnrolledRegistrationNet


def test_verdicts() -> None:
    steps = np.arange(40)
    falling, cycle = 0.9**steps, 0.1 + 0.02 * np.sin(steps)
    assert verdict(falling, 1e-3, True) == "converged"
    assert verdict(falling, 0.02, False) == "step limit"
    assert verdict(0.99**steps, 0.66, False) == "step limit"
    assert verdict(cycle, 0.1, False) == "cycling"
    assert verdict(np.full(40, 0.3), 0.3, False) == "cycling"
    assert verdict(1.1**steps, 50.0, False) == "diverging"
    assert verdict([0.1, math.inf], 0.1, False) == "diverging"
    assert verdict([0.1, 0.1], math.nan, False) == "diverging"
    assert verdict(cycle[:6], 0.1, False) == "step limit"
    assert verdict([], 0.1, False) == "step limit"


@pytest.mark.parametrize("at_rest", [True, False])
@pytest.mark.parametrize("reason", ["tolerance", "relative tolerance", "step limit", "non-finite"])
@pytest.mark.parametrize(
    ("residuals", "residual", "at_the_limit"),
    [
        (0.7 ** np.arange(40.0), 1e-3, "step limit"),
        (np.full(40, 0.3), 0.3, "cycling"),
        (1.1 ** np.arange(40.0), 50.0, "diverging"),
        ([], 0.1, "step limit"),
        ([0.1, 0.1], 0.1, "step limit"),
        ([0.1, 0.1], math.nan, None),
        ([0.1, math.inf], 0.1, None),
    ],
)
def test_verdict_never_gainsays_the_solver(
    residuals: Any, residual: float, at_the_limit: str | None, reason: str, at_rest: bool
) -> None:
    if reason == "non-finite" or at_the_limit is None:
        expected = "diverging"
    elif at_rest:
        expected = "converged"
    else:
        expected = at_the_limit if reason == "step limit" else "unconfirmed"
    assert verdict(residuals, residual, at_rest, reason) == expected
    if reason == "step limit":
        assert verdict(residuals, residual, at_rest) == expected


class PullToFixed(torch.nn.Module):
    """Moves the field by a share of the way to the value of the fixed image, and where ``turn`` is set turns it."""

    def __init__(self, rate: float, turn: bool = False) -> None:
        super().__init__()
        self.rate, self.turn = rate, turn

    def forward(self, moving: torch.Tensor, fixed: torch.Tensor, ddf: torch.Tensor) -> torch.Tensor:
        if self.turn:
            return torch.cat([-ddf[:, 1:2] + 1, ddf[:, :1]], dim=1) - ddf
        return self.rate * (fixed - ddf)


def test_certify_a_contraction() -> None:
    fixed = torch.rand((2, 1, 7, 6), generator=torch.Generator().manual_seed(0))
    network = deq_net(PullToFixed(0.5), max_steps=40, tolerance=1e-4, num_states=0).eval()
    state, record = network.solve_state(fixed, fixed)
    settings = {"spectral_iterations": 6, "random_starts": 2, "start_smoothness": 1.0}
    a, b = certify(network, fixed, fixed, state, record, settings)
    residual = 0.5 * (fixed - state).square().sum(1).mean((1, 2)).sqrt()
    for i, c in enumerate((a, b)):
        assert c.verdict == "converged" and c.steps == record.steps[i] < 40
        assert c.residual == pytest.approx(float(residual[i]), rel=1e-2) and 0 < c.residual < record.final_residual[i]
        assert c.spectral_radius == pytest.approx(0.5, rel=1e-5)
        # each solution is within residual / (1 - radius) of the only one
        assert c.start_distance is not None and 0 < c.start_distance < 4e-4
        assert json.loads(json.dumps(c.as_dict(), allow_nan=False)) == {
            "verdict": "converged",
            "residual": c.residual,
            "relative_residual": c.relative_residual,
            "steps": c.steps,
            "spectral_radius": c.spectral_radius,
            "start_distance": c.start_distance,
        }
    words = Certificate("diverging", math.nan, math.inf, 3).as_dict()
    assert (words.pop("verdict"), words.pop("steps"), words.pop("relative_residual")) == ("diverging", 3, math.inf)
    assert set(words) == {"residual", "spectral_radius", "start_distance"} and all(map(math.isnan, words.values()))
    # another tolerance, and nothing that was not asked for
    (c, _) = certify(network, fixed, fixed, state, record, {"tolerance": 1e-9})
    assert c.verdict == "unconfirmed" and c.spectral_radius is None and c.start_distance is None
    assert certify(network, fixed, fixed, state, record)[0].verdict == "converged"
    # the further solves have the settings of this one
    for tolerance, low, high in ((1e-4, 0, 4e-4), (0.1, 0.01, 0.4)):
        settings = {"random_starts": 1, "start_smoothness": 1.0, "tolerance": 1e-3}
        (c, _) = certify(network, fixed, fixed, state, record, settings, {"tolerance": tolerance})
        assert c.verdict == "converged" and low < c.start_distance < high  # type: ignore[operator]


def test_certify_tells_a_cycle_and_a_start_that_is_kept() -> None:
    fixed = torch.zeros((1, 1, 7, 6))
    turning = deq_net(PullToFixed(0.0, turn=True), max_steps=17, num_states=0).eval()
    state, record = turning.solve_state(fixed, fixed)
    (c,) = certify(turning, fixed, fixed, state, record, {"tolerance": 1e-3, "spectral_iterations": 8})
    assert c.verdict == "cycling" and c.spectral_radius == pytest.approx(1.0, abs=1e-6)
    assert c.residual == pytest.approx(1.0) and c.start_distance is None
    # a map that leaves every state where it is comes to rest at once, wherever it starts
    still = deq_net(PullToFixed(0.0), num_states=0).eval()
    state, record = still.solve_state(fixed, fixed)
    (c,) = certify(still, fixed, fixed, state, record, {"random_starts": 1, "start_rms": 2.0, "start_smoothness": 1.0})
    assert c.verdict == "converged" and c.start_distance == pytest.approx(2.0, rel=1e-5) and c.spectral_radius is None


@pytest.mark.parametrize("ndim", [2, 3])
def test_the_certificate_of_a_pair_does_not_depend_on_its_batch(ndim: int) -> None:
    torch.manual_seed(0)
    moving, fixed = torch.rand(2, 3, 1, *(8, 10, 6)[:ndim])
    update = tiny_update(ndim, 0.15, encoder_channels=(4, 4), decoder_channels=(4,))
    # cut off: neither the start nor the vector of the spectral radius is forgotten
    network = deq_net(update, max_steps=3, num_states=0).eval()

    def certificates(items: list[int]) -> list[Certificate]:
        state, record = network.solve_state(moving[items], fixed[items])
        settings = {"tolerance": 0.0, "spectral_iterations": 3, "random_starts": 2}
        return certify(network, moving[items], fixed[items], state, record, settings)

    alone = [certificates([i])[0] for i in range(3)]
    for items in ([0, 1, 2], [2, 0], [1, 1]):
        for i, certificate in zip(items, certificates(items), strict=True):
            assert certificate.start_distance == pytest.approx(alone[i].start_distance, rel=1e-4)
            assert certificate.spectral_radius == pytest.approx(alone[i].spectral_radius, rel=1e-4)
    assert alone[0].start_distance != pytest.approx(alone[1].start_distance, rel=1e-3)


@pytest.mark.parametrize("ndim", [2, 3])
def test_certify_takes_the_hidden_state_and_the_finest_level(ndim: int) -> None:
    torch.manual_seed(0)
    fixed, moving = torch.rand(2, 1, 1, *(8, 10, 6)[:ndim])
    update = tiny_recurrent_update(ndim)
    for network in (deq_net(update, max_steps=9), UnrolledRegistrationNet(update, steps=[1, 9])):
        network.eval()
        state, record = network.solve_state(moving, fixed)
        ddf, _ = network.solve(moving, fixed)
        assert state.shape[1] == ndim + update.hidden_channels
        torch.testing.assert_close(state[:, :ndim], ddf)
        (c,) = certify(
            network, moving, fixed, state, record, {"tolerance": 0.0, "spectral_iterations": 4, "random_starts": 1}
        )
        after, _ = network.solve_state(moving, fixed, max_steps=10)
        expected = (after - state)[:, :ndim].square().sum(1).mean().sqrt()
        assert c.residual == pytest.approx(float(expected), rel=1e-3)
        assert c.spectral_radius is not None and c.spectral_radius > 0
        assert c.start_distance is not None and c.start_distance > 0


class Waiting(torch.nn.Module):
    """Its hidden state counts up; the field rests until the count is at 20, and moves from then on."""

    hidden_channels = 1

    def forward(
        self, moving: torch.Tensor, fixed: torch.Tensor, ddf: torch.Tensor, hidden: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return (hidden > 20).to(ddf.dtype).expand_as(ddf), hidden + 1


def test_a_hidden_state_that_moves_is_not_at_rest() -> None:
    fixed = torch.zeros((1, 1, 7, 6))
    network = deq_net(Waiting(), num_states=0, max_steps=12).eval()
    state, record = network.solve_state(fixed, fixed)
    (c,) = certify(network, fixed, fixed, state, record, {"tolerance": 1e-3})
    assert not record.converged and c.residual == 0 and c.verdict != "converged"


def test_further_solves_and_relative_tolerance_are_those_of_the_solve() -> None:
    fixed = torch.rand((1, 1, 7, 6), generator=torch.Generator().manual_seed(0))
    network = deq_net(PullToFixed(0.5), max_steps=60, tolerance=1e-4, num_states=0).eval()
    loose = {"tolerance": 1.0, "random_starts": 1, "start_smoothness": 1.0}
    _, _, certificates = certified_solve(network, fixed, fixed, certificate=loose)
    # a loose word for converged leaves the other solution as exact as the first
    assert certificates is not None and certificates[0].start_distance < 3e-4  # type: ignore[operator]
    settings = {"tolerance": 0.0, "relative_tolerance": 1e-2}
    _, record, certificates = certified_solve(network, fixed, fixed, certificate={}, **settings)
    assert bool(record.converged) and certificates is not None and certificates[0].verdict == "converged"


def test_certificate_settings() -> None:
    assert check_certificate(None) is None
    given = {"spectral_iterations": 0, "random_starts": 2}
    assert check_certificate(given) == given and check_certificate(given) is not given
    with pytest.raises(ValueError, match="certificate must be a dictionary of options or None, got 'perhaps'"):
        check_certificate("perhaps")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="certificate takes tolerance, .* got spectral_iteration"):
        check_certificate({"spectral_iteration": 40})
    for name, value in {"spectral_iterations": 1, "random_starts": -1, "tolerance": math.nan, "start_rms": -1}.items():
        with pytest.raises(ValueError, match=f"certificate: {name} is out of its range"):
            check_certificate({name: value})


def test_certify_refuses() -> None:
    fixed = torch.zeros((1, 1, 7, 6))
    network = deq_net(PullToFixed(0.5), num_states=0).eval()
    solution = network.solve_state(fixed, fixed)
    for name in ("tolerance", "spectral_iterations", "random_starts"):
        with pytest.raises(ValueError, match=f"certificate: {name} is out of its range, got -1"):
            certify(network, fixed, fixed, *solution, {name: -1})
    with pytest.raises(TypeError, match="the solver has the settings .* got max_iter"):
        certify(network, fixed, fixed, *solution, {}, {"max_iter": 3})
