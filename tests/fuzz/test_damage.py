# SPDX-License-Identifier: Apache-2.0
"""A few of the cases of ``python -m tests.fuzz``: what is damaged is refused clearly or makes no difference."""

from __future__ import annotations

import pytest
from fuzz.judging import Case, judge, run_cases, same
from fuzz.kinds import KINDS

#: of each the interpreter starts anew, or a bundle is run
_SLOW = ("monai-deq in a process of its own", "setting of a bundle")


@pytest.mark.parametrize("kind", [name for name in KINDS if name not in _SLOW])
def test_nothing_but_clear_errors_and_right_results(kind: str) -> None:
    outcomes = run_cases({kind: KINDS[kind]}, 8, seed=20)
    assert [outcome for outcome in outcomes if outcome.outcome == "other"] == []


def test_a_setting_of_a_bundle() -> None:
    outcomes = run_cases({name: KINDS[name] for name in _SLOW[1:]}, 1, seed=20)
    assert [outcome for outcome in outcomes if outcome.outcome == "other"] == []


def _raise(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    ("case", "outcome"),
    [
        (Case("", lambda: 3, right=same(3)), "correct"),
        (Case("", lambda: 4, right=same(3)), "other"),
        (Case("", lambda: 3), "other"),
        (Case("", lambda: _raise(ValueError("a.nii is damaged")), ["a.nii"]), "clear error"),
        (Case("", lambda: _raise(ValueError("it is damaged")), ["a.nii"]), "other"),
        (Case("", lambda: _raise(KeyError("a.nii")), ["a.nii"]), "other"),
        (Case("", lambda: _raise(ValueError("a.nii is damaged")), ["a.nii"], same(3), strict=True), "other"),
        (Case("", lambda: [print("x") for _ in range(99)], right=lambda got: True), "other"),
    ],
)
def test_how_a_case_is_judged(case: Case, outcome: str, tmp_path) -> None:
    assert judge("", 0, case, tmp_path).outcome == outcome


def test_what_is_left_behind(tmp_path) -> None:
    case = Case("", lambda: (tmp_path / "a").touch(), right=lambda got: True)
    assert judge("", 0, case, tmp_path).outcome == "other"
    case = Case("", lambda: (tmp_path / ".b-temporary").touch(), right=lambda got: True, made=["*"])
    assert judge("", 0, case, tmp_path).outcome == "other"
