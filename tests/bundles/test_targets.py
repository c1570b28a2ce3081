# SPDX-License-Identifier: Apache-2.0
"""The names in the configurations: from Python 3.12 on MONAI gets a module where one has the name of its function."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BUNDLES = Path(__file__).resolve().parents[2] / "bundles"


def targets(config: Any) -> Iterator[str]:
    if isinstance(config, dict):
        if isinstance(config.get("_target_"), str):
            yield config["_target_"]
        config = list(config.values())
    if isinstance(config, list):
        for value in config:
            yield from targets(value)


@pytest.mark.parametrize("bundle", ["oasis", "nlst"])
def test_no_target_is_a_module(bundle: str) -> None:
    files = sorted((BUNDLES / bundle).rglob("*.json"))
    names = {name for file in files for name in targets(json.loads(file.read_text(encoding="utf-8")))}
    assert len(names) > 30
    for name in names:
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module(name)
        package, attribute = name.rsplit(".", 1)
        assert hasattr(importlib.import_module(package), attribute), name
