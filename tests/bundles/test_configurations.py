# SPDX-License-Identifier: Apache-2.0
"""The configurations as texts: short enough to be read, and each name in them is there."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from shell import BUNDLES

FILES = sorted([*BUNDLES.glob("*/*.json"), *BUNDLES.glob("*/methods/*.json")])


def texts(content: Any) -> Iterator[str]:
    if isinstance(content, str):
        yield content
    for part in content.values() if isinstance(content, dict) else content if isinstance(content, list) else ():
        yield from texts(part)


def targets(content: Any) -> Iterator[str]:
    if isinstance(content, dict) and isinstance(content.get("_target_"), str):
        yield content["_target_"]
    for part in content.values() if isinstance(content, dict) else content if isinstance(content, list) else ():
        yield from targets(part)


def read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(BUNDLES)))
def test_configurations_hold_no_programs(file: Path) -> None:
    assert [text for text in texts(read(file)) if text.startswith("$") and len(text) - 1 > 80] == []


def test_configurations_are_short() -> None:
    lines = {str(file.relative_to(BUNDLES)): len(file.read_text(encoding="utf-8").splitlines()) for file in FILES}
    assert lines["oasis/train.json"] <= 200
    assert sum(lines.values()) <= 1440


def test_a_training_has_few_settings() -> None:
    """What a user may want to change: values, not components, and not expressions over other entries."""
    settings = [
        name
        for name, value in read(BUNDLES / "oasis" / "train.json").items()
        if not isinstance(value, (dict, list)) and "@" not in str(value)
    ]
    assert {"dataset_dir", "seed", "num_states", "amp"} <= set(settings) and len(settings) <= 40


@pytest.mark.parametrize("bundle", ["oasis", "nlst"])
def test_every_target_is_there_and_no_module(bundle: str) -> None:
    """From Python 3.12 on MONAI gets a module where one has the name of its function."""
    names = {name for file in (BUNDLES / bundle).rglob("*.json") for name in targets(read(file))}
    assert len(names) > 30
    for name in names:
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module(name)
        package, attribute = name.rsplit(".", 1)
        assert hasattr(importlib.import_module(package), attribute), name
