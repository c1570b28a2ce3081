# SPDX-License-Identifier: Apache-2.0
"""Tiny images, and networks as training leaves them, with weights that were not trained."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
from shell import BUNDLES

from monai_deq.networks import NetworkRecord, describe, nets
from monai_deq.solvers import SolverSettings

#: of seven subjects two are left for the test: two pairs
SPLIT = [4, 1, 2]


def deqreg(spatial_dims: int, max_steps: int, num_states: int = 0, checkpointed: bool = False) -> nn.Module:
    solver = SolverSettings(max_steps=max_steps)
    gradient = nets.GradientSettings(num_states=num_states, checkpointed=checkpointed)
    return nets.DEQRegistrationNet(spatial_dims=spatial_dims, solver=solver, gradient=gradient)


SYSTEMS: dict[str, tuple[str, Callable[..., nn.Module]]] = {
    "voxelmorph": ("VoxelMorph", lambda spatial_dims, _: nets.voxelmorph_net(spatial_dims)),
    "unrolling": ("Unrolling", nets.unrolling_net),
    "gradirn": ("GraDIRN", nets.gradirn_net),
    "riir": ("RIIR", nets.riir_net),
    "deqreg12": ("DEQReg-12", deqreg),
    "deqreg": ("DEQReg", deqreg),
    "deqreg_pool": ("DEQReg-pool", deqreg),
}


@pytest.fixture(autouse=True)
def quick_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    Each measurement collects garbage: what was there before a test, or before its first measurement of time, need not
    be looked through.
    """
    monkeypatch.setattr(gc, "unfreeze", lambda: None)
    gc.freeze()


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that look at the tables alone."""
    for module in ("benchmarks", "comparison", "convergence"):
        monkeypatch.setattr(f"monai_deq.evaluation.{module}.figures_available", lambda: False)


@pytest.fixture(scope="session")
def overrides(brain_cohort: Path) -> dict[str, Any]:
    return {"dataset_dir": str(brain_cohort), "split_sizes": SPLIT}


def write_checkpoint(
    name: str,
    results: Path,
    spatial_dims: int = 2,
    steps: int = 2,
    motion: float = 0.0,
    levels: int = 1,
    seed: int = 0,
    record: dict[str, Any] | None = None,
    **network_settings: Any,
) -> Path:
    """
    Weights with their record in ``<results>/<name>``: initial ones, or with a share of ``motion`` added to each, which
    moves the images; of coarser levels 0.7 of it, which does not lead out of the image.
    """
    title, build = SYSTEMS[name]
    torch.manual_seed(seed)
    network = build(spatial_dims, steps, **network_settings)
    if levels > 1:
        network = nets.coarse_to_fine(network, levels, max_steps=3)
    weights = network.state_dict()
    for key, value in weights.items():
        if motion and key.endswith("weight") and not key.startswith("coarse."):
            value.add_(max(motion * float(value.std()), motion / 6) * torch.randn_like(value))
            for level in range(1, levels):
                weights["coarse." * level + key].copy_(0.7 * value)
    path = results / name / "models" / "model.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(weights, path)
    content = {"method": title, "steps": steps, "training": {"max_steps": steps}, **(record or {})}
    NetworkRecord(network=describe(network), **content).write(path.with_suffix(".json"))
    return path


@pytest.fixture(name="write_checkpoint", scope="session")
def checkpoint_writer() -> Callable[..., Path]:
    return write_checkpoint


@pytest.fixture
def oasis() -> Path:
    return BUNDLES / "oasis"


@pytest.fixture
def nlst() -> Path:
    return BUNDLES / "nlst"
