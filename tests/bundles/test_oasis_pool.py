# SPDX-License-Identifier: Apache-2.0
"""Training with persistent states, run through ``python -m monai.bundle``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from shell import assert_equal, configs, error_of, output_of, run_bundle

TINY: dict[str, Any] = {
    "split_sizes": "[2,2,1]",
    "max_epochs": 1,
    "pairs_per_epoch": 5,
    "max_steps": 2,
    "val_steps": 2,
    "lr_decay_power": 0.0,
    "rest#enabled": True,
    "rest#pool_slots": 2,
    "rest#pool_renewal": 0.3,
}
# two epochs, stopped after the first
STOPPED = {"max_epochs": 2, "train#trainer#max_epochs": 1}


def files(name: str, spatial_dims: int = 2) -> list[str]:
    return configs("oasis", name, *(["slices.json"] if spatial_dims == 2 else []))


def train(folder: Path, cohort: Path, spatial_dims: int = 2, **overrides: object) -> dict[str, Any]:
    settings = {"dataset_dir": cohort, "bundle_root": folder, **TINY, **overrides}
    output_of(run_bundle("training", files("train", spatial_dims), folder.parent, **settings))
    return torch.load(folder / "models" / "last.pt", weights_only=True)


def test_resumed_training_is_that_of_one_go(brain_cohort: Path, tmp_path: Path) -> None:
    common = {"batch_size": 1, "rest#random_start_share": 0.5}
    whole = train(tmp_path / "whole", brain_cohort, max_epochs=2, **common)
    half = train(tmp_path / "parts", brain_cohort, **common, **STOPPED)
    assert (half["pool"]["tickets"] >= 0).all() and half["pool"]["states"].abs().max() > 0
    parts = train(tmp_path / "parts", brain_cohort, max_epochs=2, resume=True, **common)
    assert_equal(parts, whole)
    # the pairs went on from where they stood
    assert whole["pool"]["tickets"].max() < 10 - 1


def test_running_mean_of_the_weights(brain_cohort: Path, tmp_path: Path) -> None:
    common = {"batch_size": 1, "ema_momentum": 0.25}
    one = {**common, "pairs_per_epoch": 1}
    first = train(tmp_path / "first", brain_cohort, **one)
    # from given weights the mean begins with them
    start = tmp_path / "first" / "models" / "last.pt"
    second = train(tmp_path / "second", brain_cohort, weights=start, **one)
    for name, weight in second["network"].items():
        mean = 0.75 * first["network"][name] + 0.25 * weight
        torch.testing.assert_close(second["averaged"][name], mean)
    assert any(not torch.equal(second["averaged"][k], w) for k, w in second["network"].items())
    best = torch.load(tmp_path / "second" / "models" / "model.pt", weights_only=True)
    assert_equal(best, second["averaged"])
    record = json.loads((tmp_path / "second" / "models" / "model.json").read_text())
    assert record["training"]["training_pairs"] == 2
    # resumed as if in one go; begun without a mean, it starts where the training stands
    two = {**common, "pairs_per_epoch": 2}
    whole = train(tmp_path / "whole", brain_cohort, max_epochs=2, **two)
    train(tmp_path / "parts", brain_cohort, **two, **STOPPED)
    assert_equal(train(tmp_path / "parts", brain_cohort, max_epochs=2, resume=True, **two), whole)
    without = train(tmp_path / "without", brain_cohort, **{**one, "ema_momentum": "$None"})
    assert without["averaged"] == {}
    late = train(tmp_path / "without", brain_cohort, **{**one, "max_epochs": 2, "resume": True})
    for name, weight in late["network"].items():
        torch.testing.assert_close(late["averaged"][name], 0.75 * without["network"][name] + 0.25 * weight)


def test_pool_in_a_file_and_with_workers(brain_cohort: Path, tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    plain = train(tmp_path / "plain", brain_cohort)
    folder = {"pool#folder": tmp_path / "scratch"}
    other = train(tmp_path / "other", brain_cohort, num_workers=1, **folder)
    assert_equal(other["network"], plain["network"])
    assert len(other["pool"]["states"]) == 0 and list((tmp_path / "scratch").iterdir()) == []


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_from_coarse_to_fine(spatial_dims: int, brain_cohort: Path, tmp_path: Path) -> None:
    sizes = ([18, 16], [36, 32]) if spatial_dims == 2 else ([8, 8, 8], [16, 16, 16])
    common: dict[str, Any] = {"cohort": brain_cohort, "spatial_dims": spatial_dims, "pairs_per_epoch": 4}
    train(tmp_path / "half", spatial_size=sizes[0], **common)
    weights = tmp_path / "half" / "models" / "model.pt"
    # a part of the pairs start where the coarser network leaves them
    common.update({"spatial_size": sizes[1], "coarser_levels": 1, "network_def#max_steps": 3})
    levels = {**common, "coarse_weights": weights, "rest#random_start_share": 0.3}
    network = train(tmp_path / "full", **levels)["network"]
    half = torch.load(weights, weights_only=True)
    for name, value in half.items():
        assert torch.equal(network[f"coarse.{name}"], value)
    assert any(not torch.equal(network[name], value) for name, value in half.items())
    assert {name.rsplit(".backbone", 1)[0] for name in network} == {"coarse.update", "update"}
    # known by the checkpoint alone
    settings = {"bundle_root": tmp_path / "full", "dataset_dir": brain_cohort, "split_sizes": "[2,2,1]"}
    config = files("evaluate", spatial_dims)
    output_of(run_bundle("evaluating", config, tmp_path, **settings, split="validation", labels=[2, 3]))
    summary = json.loads((tmp_path / "full" / "eval" / "evaluation_summary.json").read_text())
    assert summary["num_pairs"] == 2 and summary["summary"]["dice"]["mean"] > 0
    record = json.loads((tmp_path / "full" / "models" / "model.json").read_text())
    assert record["network"]["coarse"]["solver"]["max_steps"] == 3 and record["spatial_size"] == sizes[1]
    if spatial_dims == 3:
        return
    # a network of the full size that was trained alone
    alone = {name: value + 1e-3 for name, value in half.items()}
    torch.save(alone, tmp_path / "alone.pt")
    network = train(tmp_path / "both", **levels, weights=tmp_path / "alone.pt", learning_rate=0.0)["network"]
    for name, value in half.items():
        assert torch.equal(network[f"coarse.{name}"], value) and torch.equal(network[name], alone[name])
    # all of it trained before, in another training or in this one
    full = tmp_path / "full" / "models" / "last.pt"
    network = train(tmp_path / "again", **common, weights=full, learning_rate=0.0)["network"]
    assert_equal(network, torch.load(full, weights_only=True)["network"])
    train(tmp_path / "full", **common, max_epochs=2, resume="true", **{"rest#random_start_share": 0.3})
    # left to chance
    for run_id in ("training", "run"):
        untrained = {"dataset_dir": brain_cohort, "split_sizes": "[2,2,1]", "coarser_levels": 1}
        error = error_of(run_bundle(run_id, files("train"), tmp_path, bundle_root="chance", **untrained))
        assert "coarser_levels needs the coarser networks trained" in error


def test_recomputation_changes_nothing(brain_cohort: Path, tmp_path: Path) -> None:
    common = {"pairs_per_epoch": 2, "batch_size": 2, "num_states": 1}
    plain = train(tmp_path / "plain", brain_cohort, **common)
    again = train(tmp_path / "again", brain_cohort, checkpointed=True, checkpoint_parts=2, **common)
    start = train(tmp_path / "start", brain_cohort, **common, learning_rate=0.0)
    for name, weight in plain["network"].items():
        learned = weight - start["network"][name]
        # AdamW's first step is about the sign of the gradient: rounding may turn that of the smallest
        turned = (again["network"][name] - weight).abs() > 0.1 * learned.abs() + 1e-9
        assert turned.float().mean() < 0.02
