# SPDX-License-Identifier: Apache-2.0
"""Settings of a solve: what they refuse, what is changed for one solve, what TorchDEQ is given."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from monai_deq.solvers import SolverSettings, build_deq, solve_fixed_point


def test_defaults_are_the_papers() -> None:
    settings = SolverSettings()
    assert (settings.name, settings.max_steps, settings.tolerance) == ("plain", 48, 1e-3)
    assert settings.relative_tolerance == 0 and settings.options is None
    # x_k = 1 - 0.5^k, two channels: sqrt(2) 0.5^(k + 1) <= 1e-3 first at k = 10, the eleventh step
    for given in (None, settings):
        state, record = solve_fixed_point(lambda x: 0.5 * x + 0.5, torch.zeros(1, 2, 3, 4), given)
        assert record.steps.tolist() == [11]
        torch.testing.assert_close(state, torch.full_like(state, 1 - 0.5**11))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"name": "newton"}, "unknown solver 'newton', available: 'plain', 'anderson'"),
        ({"max_steps": 0}, "max_steps must be a whole number of at least 1, got 0"),
        ({"max_steps": 2.5}, "max_steps must be a whole number of at least 1, got 2.5"),
        ({"max_steps": "banana"}, "max_steps must be a whole number of at least 1, got 'banana'"),
        ({"tolerance": "nan"}, "tolerance must be a number, got 'nan'"),
        ({"tolerance": -1e-3}, "tolerance must not be negative, got -0.001"),
        ({"tolerance": float("nan")}, "tolerance must not be negative, got nan"),
        ({"relative_tolerance": -1.0}, "relative_tolerance must not be negative, got -1.0"),
        ({"options": {"m": 3}}, r"unknown options \['m'\] for solver 'plain', it takes \['damping', 'patience'\]"),
        (
            {"name": "anderson", "options": {"max_iter": 3}},
            r"unknown options \['max_iter'\] .*'regularization', 'window'",
        ),
        ({"options": {"ddf_channels": 2}}, "unknown options .'ddf_channels'."),
    ],
)
def test_wrong_settings(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SolverSettings(**arguments)
    own = SolverSettings()
    with pytest.raises(ValueError, match=words):
        own.changed(**arguments)
    assert own == SolverSettings()


def test_changed_settings() -> None:
    own = SolverSettings("anderson", 30, 1e-2, 0.1, {"window": 3})
    assert own.changed() == own
    # what is None stays
    nothing = {"name": None, "max_steps": None, "tolerance": None, "relative_tolerance": None, "options": None}
    assert own.changed(**nothing) == own
    assert own.changed(max_steps=7.0, tolerance=0.0) == SolverSettings("anderson", 7, 0.0, 0.1, {"window": 3})
    assert type(own.changed(max_steps=7.0).max_steps) is int
    # options belong to one solver
    assert own.changed(name="anderson").options == {"window": 3}
    assert own.changed(name="plain") == SolverSettings("plain", 30, 1e-2, 0.1)
    assert own.changed(name="plain", options={"damping": 0.5}).options == {"damping": 0.5}
    assert own.changed(options={"window": 2}).options == {"window": 2} and own.changed(options={}).options == {}
    assert own == SolverSettings("anderson", 30, 1e-2, 0.1, {"window": 3})
    with pytest.raises(TypeError, match="the solver has the settings name, max_steps, .*options, got max_iter, steps"):
        own.changed(steps=3, max_iter=3)


@pytest.mark.parametrize("name", ["plain", "anderson"])
def test_torchdeq_is_given_the_settings(name: str) -> None:
    deq = build_deq(SolverSettings(name, 20, 0.02), n_states=3, grad=1)
    states, info = deq(lambda x: 0.5 * x + 0.5, torch.zeros(1, 1, 2, dtype=torch.float64))
    record = info["record"]
    assert len(states) == 3 and record.converged.all() and record.reason == ("tolerance",)
    assert float(record.final_residual) <= 0.02 and int(record.steps) < 20
    assert build_deq(SolverSettings(name, 2, 0.0)).eval()(torch.cos, torch.ones(1, 1, 2))[1]["record"].steps == 2
