# SPDX-License-Identifier: Apache-2.0
"""What an engine's pairs became, printed at its end."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ignite.engine import Engine

from monai_deq.handlers import SummaryPrinter


def item(name: str) -> dict[str, Any]:
    return {
        "fixed_subject": "f",
        "moving_subject": name,
        "verdict": "at rest",
        "summary": {"folded_percent": 0.25, "std_log_jacobian": 0.1},
        "ddf": torch.zeros(3, 2, 2, 2),
    }


def batch(name: str) -> dict[str, Any]:
    """As a DataLoader's collation makes one of several items."""
    return {
        "fixed_subject": ["f", "f"],
        "moving_subject": [name, f"{name}2"],
        "verdict": ["at rest", "step limit"],
        "summary": {"folded_percent": torch.tensor([0.25, 1.5]), "std_log_jacobian": torch.tensor([0.1, 0.2])},
    }


def test_prints_once_at_the_end(capsys: pytest.CaptureFixture[str]):
    printed_before: list[str] = []

    def step(engine: Engine, data: Any) -> Any:
        printed_before.append(capsys.readouterr().out)
        return data

    engine, printer = Engine(step), SummaryPrinter()
    printer.attach(engine)
    engine.run([[item("a")], [item("b"), item("c")]])
    lines = capsys.readouterr().out.splitlines()
    assert not any(printed_before) and len(lines) == 4
    for line, name in zip(lines[1:], "abc", strict=True):
        assert f"{name}_to_f" in line and "at rest" in line and "0.2500" in line
    assert all("ddf" not in kept for kept in printer.items)
    engine.run([[item("d")]])  # a second run begins anew
    out = capsys.readouterr().out
    assert "d_to_f" in out and "a_to_f" not in out


def test_batches_are_taken_apart(capsys: pytest.CaptureFixture[str]):
    engine = Engine(lambda engine, data: data)
    SummaryPrinter().attach(engine)
    engine.run([batch("a")])
    lines = capsys.readouterr().out.splitlines()
    assert "a_to_f" in lines[1] and "a2_to_f" in lines[2] and "1.5000" in lines[2] and "step limit" in lines[2]


def test_nothing_is_printed_of_nothing(capsys: pytest.CaptureFixture[str]):
    engine = Engine(lambda engine, data: [])
    SummaryPrinter().attach(engine)
    engine.run([0])
    assert not capsys.readouterr().out
