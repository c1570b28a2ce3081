# SPDX-License-Identifier: Apache-2.0
"""Tiny cohorts that all tests share, written once a session; one thread a test process, as they run side by side."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from monai.bundle.config_item import ComponentLocator
from monai.networks.layers import GaussianFilter
from torch.nn.modules.module import register_module_forward_pre_hook

from monai_deq.data import write_sample_cohort, write_sample_lung_cohort

torch.set_num_threads(1)

_search = ComponentLocator._find_classes_or_functions


@cache
def _components(modules: tuple[str, ...]) -> dict[str, list]:
    return _search(ComponentLocator(), list(modules))


@pytest.fixture(autouse=True)
def one_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """MONAI's parsers each look through all its modules: once is enough for a process."""
    monkeypatch.setattr(ComponentLocator, "_find_classes_or_functions", lambda _, modules: _components(tuple(modules)))


@pytest.fixture(scope="session")
def brain_cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven synthetic brains, volumes of 18 x 16 x 21 and slices of 32 x 37. Not to be written to."""
    return write_sample_cohort(tmp_path_factory.mktemp("brains") / "cohort", 7, (18, 16, 21), (32, 37))


@pytest.fixture(scope="session")
def lung_cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two training, one validation and two test pairs of synthetic lungs of 20 x 16 x 24. Not to be written to."""
    return write_sample_lung_cohort(tmp_path_factory.mktemp("lungs") / "cohort", (2, 1, 2), (20, 16, 24))


@pytest.fixture
def smoothed_on() -> Iterator[list[str]]:
    """Devices of what Gaussian filters are given."""
    devices: list[str] = []

    def note(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if isinstance(module, GaussianFilter):
            devices.append(args[0].device.type)

    with register_module_forward_pre_hook(note):
        yield devices
