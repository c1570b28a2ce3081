# SPDX-License-Identifier: Apache-2.0
"""MONAI finds a ``_target_`` without dots by its name alone, in every loaded module whose own name starts "monai"."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from monai.bundle.config_item import ComponentLocator

import monai_deq


def all_modules() -> list[ModuleType]:
    names = [m.name for m in pkgutil.walk_packages(monai_deq.__path__, "monai_deq.")]
    return [importlib.import_module(name) for name in names if not name.endswith("__main__")]


def test_every_component_of_monai_stays_where_it_was() -> None:
    all_modules()
    alone, together = ComponentLocator(excludes="monai_deq"), ComponentLocator()
    assert alone.get_component_module_name("VoxelMorph") == "monai.networks.nets.voxelmorph"
    assert alone.get_component_module_name("DEQRegistrationNet") is None
    together.get_component_module_name("VoxelMorph")
    names = list(alone._components_table)
    assert len(names) > 1000
    changed = [n for n in names if together.get_component_module_name(n) != alone.get_component_module_name(n)]
    assert not changed
    # and ours are found in the same way, each in one place
    assert together.get_component_module_name("DEQRegistrationNet").startswith("monai_deq.networks.nets.")
    assert together.get_component_module_name("FixedPointSolver").startswith("monai_deq.transforms.")
