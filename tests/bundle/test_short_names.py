# SPDX-License-Identifier: Apache-2.0
"""MONAI finds a ``_target_`` without dots by its name alone, in every loaded module whose own name starts "monai"."""

from __future__ import annotations

import json
import subprocess
import sys

SCRIPT = """
import importlib, json, pkgutil, sys
from monai.bundle.config_item import ComponentLocator

if sys.argv[1] == "with":
    import monai_deq

    for module in pkgutil.walk_packages(monai_deq.__path__, "monai_deq."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
locator = ComponentLocator()
locator.get_component_module_name("VoxelMorph")
print(json.dumps({name: locator.get_component_module_name(name) for name in locator._components_table}))
"""


def table(monai_deq: str) -> dict:
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, monai_deq]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_every_component_of_monai_stays_where_it_was() -> None:
    alone, together = table("without"), table("with")
    assert len(alone) > 1000 and "VoxelMorph" in alone and "DEQRegistrationNet" not in alone
    assert {name: together.get(name) for name in alone} == alone
    # and ours are found in the same way, each in one place
    assert together["DEQRegistrationNet"].startswith("monai_deq.networks.nets.")
    assert together["FixedPointSolver"].startswith("monai_deq.transforms.")
