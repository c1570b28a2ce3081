# SPDX-License-Identifier: Apache-2.0
"""The record of a solve: its last values, and one item of it as JSON."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from monai_deq.solvers import MEASURES, SolverRecord, SolverSettings, StopReason, solve_fixed_point
from monai_deq.utils import json_ready


def record() -> SolverRecord:
    nan, inf = float("nan"), float("inf")
    return SolverRecord(
        steps=torch.tensor([3, 1, 0, 2]),
        residual=torch.tensor([[3.0, 2.0, 1.0], [0.5, nan, nan], [inf, nan, nan], [4.0, 5.0, nan]]),
        relative_residual=torch.tensor([[inf, 0.2, 0.1], [0.0, nan, nan], [nan, nan, nan], [0.4, 0.5, nan]]),
        converged=torch.tensor([False, True, False, False]),
        reason=(StopReason.STEP_LIMIT, StopReason.TOLERANCE, StopReason.NON_FINITE, StopReason.NON_FINITE),
    )


def test_last_values() -> None:
    r = record()
    assert len(r) == 4
    assert r.final_residual.tolist()[:2] == [1.0, 0.5] and r.final_residual[3] == 5.0
    assert not bool(r.final_residual[2].isfinite())
    assert r.final_relative_residual[[0, 1, 3]].tolist() == pytest.approx([0.1, 0.0, 0.5])


def test_items_as_json() -> None:
    r = record()
    items = [json.loads(json.dumps(json_ready(r.item(i)), allow_nan=False)) for i in range(4)]
    assert items[0] == {
        "steps": 3,
        "residual": 1.0,
        "relative_residual": pytest.approx(0.1),
        "converged": False,
        "reason": "step limit",
        "coarse_steps": [],
        "residual_trace": [3.0, 2.0, 1.0],
        "relative_residual_trace": [None, pytest.approx(0.2), pytest.approx(0.1)],
    }
    assert items[1]["converged"] is True and items[1]["residual_trace"] == [0.5]
    assert items[2] == {
        "steps": 0,
        "residual": None,
        "relative_residual": None,
        "converged": False,
        "reason": "non-finite",
        "coarse_steps": [],
        "residual_trace": [],
        "relative_residual_trace": [],
    }
    assert items[3]["residual"] == 5.0 and items[3]["residual_trace"] == [4.0, 5.0]


def test_evaluations_at_smaller_sizes_count_by_their_voxels() -> None:
    r = replace(record(), coarse_steps=(torch.tensor([8, 4, 0, 1]), torch.tensor([16, 2, 0, 0])))
    assert record().evaluations(2).tolist() == [3, 1, 0, 2]
    assert r.evaluations(2).tolist() == [3 + 2 + 1, 1 + 1 + 0.125, 0, 2.25]
    assert r.evaluations(3).tolist() == [3 + 1 + 0.25, 1 + 0.5 + 2 / 64, 0, 2.125]
    assert r.item(0)["coarse_steps"].tolist() == [8, 16]


def finished() -> SolverRecord:
    """A record with measures, finished by another method with its own."""
    nan = float("nan")
    finish = SolverRecord(
        steps=torch.tensor([2, 1, 2, 0]),
        residual=torch.tensor([[0.2, 0.1], [0.3, nan], [0.4, 0.2], [nan, nan]]),
        relative_residual=torch.full((4, 2), 0.5),
        converged=torch.tensor([True, True, False, False]),
        reason=(StopReason.TOLERANCE, StopReason.TOLERANCE, StopReason.STEP_LIMIT, StopReason.NON_FINITE),
        measures={
            "energy": torch.tensor([[-0.5, -0.75], [-0.25, nan], [-0.125, -0.5], [nan, nan]]),
            "unfolded": torch.tensor([7, 0, 0, 0]),
        },
    )
    return replace(record(), finish=finish, measures={"energy": torch.arange(12.0).view(4, 3), "own": torch.ones(4)})


def test_measures_have_one_value_an_item() -> None:
    assert record().measured() == {} and record().finish is None
    r = replace(finished(), finish=None)
    # of each step the last one there was
    assert set(r.measured()) == {"energy", "own"}
    assert r.measured()["energy"].tolist() == [2.0, 3.0, 6.0, 10.0] and r.measured()["own"].tolist() == [1.0] * 4


def test_measures_of_a_finish() -> None:
    values = finished().measured()
    assert set(values) == {"energy", "own", "unfolded", "finish_steps", "energy_before_finish"}
    assert set(values) - {"own"} <= set(MEASURES)
    # those of the finish are in the place of the first method's
    assert values["energy"][:3].tolist() == [-0.75, -0.25, -0.5] and bool(values["energy"][3].isnan())
    assert values["energy_before_finish"][:3].tolist() == [-0.5, -0.25, -0.125]
    assert values["finish_steps"].tolist() == [2, 1, 2, 0] and values["unfolded"].tolist() == [7, 0, 0, 0]
    # a finish that measures no energy
    assert finished().finish is not None
    values = replace(record(), finish=record()).measured()
    assert set(values) == {"finish_steps"} and values["finish_steps"].tolist() == [3, 1, 0, 2]


def test_items_with_a_finish_as_json() -> None:
    r = finished()
    items = [json.loads(json.dumps(json_ready(r.item(i)), allow_nan=False)) for i in range(4)]
    plain = record()
    for i, item in enumerate(items):
        known = json.loads(json.dumps(json_ready(plain.item(i)), allow_nan=False))
        assert {k: v for k, v in item.items() if k in known} == known
        assert set(item) - set(known) == {"finish", "energy_trace", "own", *r.measured()}
        assert item["own"] == 1.0 and item["energy_trace"] == [[0.0, 1.0, 2.0], [3.0], [], [9.0, 10.0]][i]
        assert item["finish"]["steps"] == [2, 1, 2, 0][i] and "finish" not in item["finish"]
        assert item["finish"]["energy_trace"] == [[-0.5, -0.75], [-0.25], [-0.125, -0.5], []][i]
        assert item["finish"]["unfolded"] == [7, 0, 0, 0][i]
    assert items[1]["finish"]["residual_trace"] == [pytest.approx(0.3)]


@pytest.mark.parametrize("solver", ["plain", "anderson"])
def test_items_of_real_solves(solver: str) -> None:
    # one converges, one goes to zero at once (residual relative to nothing), one fails at the door
    scale = torch.tensor([0.5, 0.0, float("nan")]).view(3, 1, 1)
    _, r = solve_fixed_point(lambda x: scale * x, torch.ones(3, 2, 3), SolverSettings(solver, 20))
    items = [r.item(i) for i in range(3)]
    for item in items:
        json.dumps(json_ready(item), allow_nan=False)
        assert len(item["residual_trace"]) == len(item["relative_residual_trace"]) == item["steps"]
    assert [item["reason"] for item in items] == ["tolerance", "tolerance", "non-finite"]
    assert json_ready(items[1]["relative_residual_trace"]) == [None, 0.0]
    assert math.isnan(items[2]["residual"])


@pytest.mark.parametrize("length", [0, 2, 5])
def test_traces_of_one_length(length: int) -> None:
    r = finished()
    for i, (steps, finish_steps) in enumerate(zip([3, 1, 0, 2], [2, 1, 2, 0], strict=True)):
        item, plain = r.item(i, length), r.item(i)
        for words, known, n in ((item, plain, steps), (item["finish"], plain["finish"], finish_steps)):
            assert words.keys() == known.keys()
            traces = [k for k in words if k.endswith("_trace")]
            assert sorted(traces) == ["energy_trace", "relative_residual_trace", "residual_trace"]
            for name in traces:
                assert len(known[name]) == n and len(words[name]) == max(n, length)
                assert words[name].is_floating_point() and bool(words[name][n:].isnan().all())
                torch.testing.assert_close(words[name][:n], known[name], equal_nan=True, rtol=0, atol=0)
