# SPDX-License-Identifier: Apache-2.0
"""What methods cost, with tiny images and untrained weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from monai_deq.evaluation import BundleMethod, measure_costs
from monai_deq.evaluation.methods import FirstPair

Writer = Callable[..., Path]


@pytest.fixture
def cost(
    oasis: Path, overrides: dict[str, Any], write_checkpoint: Writer, tmp_path: Path
) -> Callable[..., dict[str, Any]]:
    """Costs of a network of slices."""

    def measure(name: str = "deqreg", asked: dict[str, Any] | None = None, **settings: Any) -> dict[str, Any]:
        write_checkpoint(name, tmp_path, **settings)
        method = BundleMethod(name, oasis, tmp_path / name, ["slices.json"], {**overrides, **(asked or {})})
        return measure_costs({name: method}, rounds=1)[name]

    return measure


def test_costs_are_those_of_the_training(cost: Callable[..., dict[str, Any]]) -> None:
    # of the overlay's three states only one was supervised
    one, three = (cost(steps=4, num_states=n)["saved_memory_mb"] for n in (1, 3))
    # two phantom steps for each supervised state and the final one
    assert three / one == pytest.approx(4 / 2, rel=0.1)


def test_costs_are_those_of_a_training_with_recomputation(cost: Callable[..., dict[str, Any]]) -> None:
    kept, recomputed = (cost(num_states=1, checkpointed=c)["saved_memory_mb"] for c in (False, True))
    asked_for = cost(asked={"checkpointed": "true"}, num_states=1)
    assert asked_for["saved_memory_mb"] == pytest.approx(recomputed, rel=0.02)
    assert recomputed < 0.6 * kept


def test_costs_of_a_network_with_coarser_ones(cost: Callable[..., dict[str, Any]]) -> None:
    costs = cost("deqreg_pool", levels=2)
    assert all(isinstance(costs[k], float) for k in ("saved_memory_mb", "training_seconds", "inference_seconds")), costs


@pytest.mark.parametrize("amp", [True, False])
def test_amp_as_text(
    amp: bool, oasis: Path, overrides: dict[str, Any], write_checkpoint: Writer, tmp_path: Path
) -> None:
    write_checkpoint("deqreg", tmp_path)
    # as it arrives from the command line
    options = {**overrides, "amp": str(amp).lower()}
    assert FirstPair(BundleMethod("deqreg", oasis, tmp_path / "deqreg", ["slices.json"], options)).amp is amp


@pytest.mark.parametrize("keypoint_weight", [0.0, 0.1])
def test_costs_of_given_pairs(
    keypoint_weight: float, nlst: Path, lung_cohort: Path, write_checkpoint: Writer, tmp_path: Path
) -> None:
    lungs = str(lung_cohort)
    training = {"keypoint_weight": keypoint_weight}
    write_checkpoint("voxelmorph", tmp_path, 3, 1, record={"spatial_size": [16, 12, 16], "training": training})
    methods = {m: BundleMethod(m, nlst, tmp_path / m, (), {"dataset_dir": lungs}) for m in ("affine", "voxelmorph")}
    costs = measure_costs(methods, rounds=1)
    assert isinstance(costs["affine"]["inference_seconds"], float)
    names = ("saved_memory_mb", "training_seconds", "inference_seconds")
    assert all(isinstance(costs["voxelmorph"][k], float) for k in names), costs
