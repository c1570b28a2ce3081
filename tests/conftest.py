# SPDX-License-Identifier: Apache-2.0
"""One thread a test process: the images are tiny, and several processes run beside each other."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from monai.networks.layers import GaussianFilter
from torch.nn.modules.module import register_module_forward_pre_hook

torch.set_num_threads(1)


@pytest.fixture
def smoothed_on() -> Iterator[list[str]]:
    """Devices of what Gaussian filters are given."""
    devices: list[str] = []

    def note(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if isinstance(module, GaussianFilter):
            devices.append(args[0].device.type)

    with register_module_forward_pre_hook(note):
        yield devices
