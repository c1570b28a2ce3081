# SPDX-License-Identifier: Apache-2.0
"""OutputGuard: a run whose results are there already stops before its first iteration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine

from monai_deq.handlers import OutputGuard
from monai_deq.transforms import SaveRegistrationd

ITEMS = [{"moving_subject": m, "fixed_subject": f} for m, f in ("ab", "bc", "ca")]
SAID = {
    "steps": 1,
    "evaluations": 1,
    "residual": 0.1,
    "relative_residual": 0.1,
    "converged": True,
    "reason": "tolerance",
}


def run(saver: SaveRegistrationd) -> list[Any]:
    def iteration(engine: Engine, item: dict[str, Any]) -> Any:
        done.append(item["moving_subject"])
        return saver({**item, "warped": torch.zeros(1, 2, 2), "ddf": torch.zeros(2, 2, 2), **SAID})

    done: list[Any] = []
    engine = Engine(iteration)
    OutputGuard(saver, ITEMS).attach(engine)
    try:
        engine.run(ITEMS)
    except FileExistsError:
        assert done == []  # not one pair registered in vain
        raise
    return done


def test_refuses_before_any_work(tmp_path: Path) -> None:
    assert run(SaveRegistrationd(tmp_path)) == ["a", "b", "c"]
    assert len(list(tmp_path.iterdir())) == 9
    for path in tmp_path.glob("[ab]_*"):
        path.unlink()
    # only results of the last pair are left
    with pytest.raises(FileExistsError, match=r"c_to_a_.* and 2 more exists already.*--overwrite true"):
        run(SaveRegistrationd(tmp_path))
    assert len(list(tmp_path.iterdir())) == 3
    assert run(SaveRegistrationd(tmp_path / "other")) == ["a", "b", "c"]
    assert run(SaveRegistrationd(tmp_path, overwrite="true")) == ["a", "b", "c"]  # type: ignore[arg-type]
    assert len(list(tmp_path.glob("*.*"))) == 9
