# SPDX-License-Identifier: Apache-2.0
"""Training with persistent states, run through ``python -m monai.bundle``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from shell import output_of, run_bundle

from monai_deq.data import write_sample_cohort

BUNDLE = Path(__file__).resolve().parents[2] / "bundles" / "oasis"


def bundle(run_id: str, config: str, folder: Path, spatial_dims: int, **overrides: object) -> None:
    files = [f"{config}.json", *(["slices.json"] if spatial_dims == 2 else [])]
    overrides = {"bundle_root": folder, "split_sizes": "[2,2,1]", **overrides}
    output_of(run_bundle(run_id, [str(BUNDLE / f) for f in files], folder.parent, **overrides))


def train(folder: Path, spatial_dims: int, **overrides: object) -> dict:
    settings = {"pooled": True, "pairs_per_epoch": 6, "max_steps": 3, "pool_slots": 2, "pool_renewal": 0.3}
    settings["val_steps"] = 4
    bundle("training", "train", folder, spatial_dims, **{**settings, **overrides})
    return torch.load(folder / "models" / "last.pt", weights_only=True)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sample_cohort(
        tmp_path_factory.mktemp("data") / "cohort", 5, spatial_size_3d=(18, 16, 21), spatial_size_2d=(32, 37)
    )


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_resumed_training_is_that_of_one_go(spatial_dims: int, cohort: Path, tmp_path: Path) -> None:
    common = {"dataset_dir": cohort, "lr_decay_power": 0.0, "pool_starts": 2, "batch_size": 1}
    whole = train(tmp_path / "whole", spatial_dims, max_epochs=2, **common)
    half = train(tmp_path / "parts", spatial_dims, max_epochs=1, **common)
    assert (half["pool"]["tickets"] >= 0).all() and half["pool"]["states"].abs().max() > 0
    parts = train(tmp_path / "parts", spatial_dims, max_epochs=2, resume=True, **common)
    assert parts["trainer"] == whole["trainer"]
    torch.testing.assert_close(parts["network"], whole["network"])
    torch.testing.assert_close(parts["pool"], whole["pool"])
    # the pairs went on from where they stood
    tickets = {int(t) for t in whole["pool"]["tickets"]}
    assert max(tickets) // 2 < 12 - 1
    # each pair from two starts, which have not come to the same place after so few steps
    states = whole["pool"]["states"]
    assert len(states) == 4 and (states[::2] - states[1::2]).flatten(1).abs().amax(1).min() > 0.1


def test_running_mean_of_the_weights(cohort: Path, tmp_path: Path) -> None:
    common = {"dataset_dir": cohort, "lr_decay_power": 0.0, "batch_size": 1, "ema_momentum": 0.25}
    one = {**common, "pairs_per_epoch": 1, "max_epochs": 1}
    first = train(tmp_path / "first", 2, **one)
    # from given weights the mean begins with them
    start = tmp_path / "first" / "models" / "last.pt"
    second = train(tmp_path / "second", 2, weights=start, **one)
    for name, weight in second["network"].items():
        mean = 0.75 * first["network"][name] + 0.25 * weight
        torch.testing.assert_close(second["averaged"][name], mean)
    assert any(not torch.equal(second["averaged"][k], w) for k, w in second["network"].items())
    best = torch.load(tmp_path / "second" / "models" / "model.pt", weights_only=True)
    torch.testing.assert_close(best, second["averaged"], rtol=0, atol=0)
    # resumed as if in one go; begun without a mean, it starts where the training stands
    whole = train(tmp_path / "whole", 2, max_epochs=2, **common)
    train(tmp_path / "parts", 2, max_epochs=1, **common)
    parts = train(tmp_path / "parts", 2, max_epochs=2, resume=True, **common)
    for key in ("network", "averaged"):
        torch.testing.assert_close(parts[key], whole[key])
    without = train(tmp_path / "without", 2, **{**one, "ema_momentum": "$None"})
    assert without["averaged"] == {}
    late = train(tmp_path / "without", 2, **{**one, "max_epochs": 2, "resume": True})
    for name, weight in late["network"].items():
        torch.testing.assert_close(late["averaged"][name], 0.75 * without["network"][name] + 0.25 * weight)


def test_pool_in_a_file_and_with_workers(cohort: Path, tmp_path: Path) -> None:
    common = {"dataset_dir": cohort, "max_epochs": 1}
    (tmp_path / "scratch").mkdir()
    plain = train(tmp_path / "plain", 2, **common)
    other = train(tmp_path / "other", 2, num_workers=1, pool_folder=tmp_path / "scratch", **common)
    torch.testing.assert_close(other["network"], plain["network"])
    assert len(other["pool"]["states"]) == 0 and list((tmp_path / "scratch").iterdir()) == []


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_from_coarse_to_fine(spatial_dims: int, cohort: Path, tmp_path: Path) -> None:
    sizes = ([18, 16], [36, 32]) if spatial_dims == 2 else ([9, 8, 10], [18, 16, 20])
    common = {"dataset_dir": cohort, "max_epochs": 1, "coarse_steps": 3}
    train(tmp_path / "half", spatial_dims, spatial_size=sizes[0], **common)
    weights = tmp_path / "half" / "models" / "model.pt"
    # a part of the pairs start where the coarser network leaves them
    levels = {"coarser_levels": 1, "coarse_weights": weights, "random_start_share": 0.3}
    network = train(tmp_path / "full", spatial_dims, spatial_size=sizes[1], **common, **levels)["network"]
    half = torch.load(weights, weights_only=True)
    for name, value in half.items():
        torch.testing.assert_close(network[f"coarse.{name}"], value, rtol=0, atol=0)
    assert any(not torch.equal(network[name], value) for name, value in half.items())
    # a network of the full size that was trained alone
    alone = {name: value + 1e-3 for name, value in half.items()}
    torch.save(alone, tmp_path / "alone.pt")
    both = {"weights": tmp_path / "alone.pt", "learning_rate": 0.0}
    network = train(tmp_path / "both", spatial_dims, spatial_size=sizes[1], **common, **levels, **both)["network"]
    for name, value in half.items():
        torch.testing.assert_close(network[f"coarse.{name}"], value, rtol=0, atol=0)
        torch.testing.assert_close(network[name], alone[name], rtol=0, atol=0)
    bundle("evaluating", "evaluate", tmp_path / "full", spatial_dims, dataset_dir=cohort, split="validation")
    assert {name.rsplit(".backbone", 1)[0] for name in network} == {"coarse.update", "update"}
    summary = json.loads((tmp_path / "full" / "eval" / "evaluation_summary.json").read_text())
    assert summary["num_pairs"] == 2 and summary["summary"]["dice"]["mean"] > 0


def test_recomputation_changes_nothing(cohort: Path, tmp_path: Path) -> None:
    common = {"dataset_dir": cohort, "max_epochs": 1, "pairs_per_epoch": 2, "batch_size": 2, "num_states": 1}
    plain = train(tmp_path / "plain", 2, **common)
    again = train(tmp_path / "again", 2, use_checkpoint=True, checkpoint_parts=2, **common)
    start = train(tmp_path / "start", 2, **{**common, "learning_rate": 0.0})
    for name, weight in plain["network"].items():
        learned = weight - start["network"][name]
        # AdamW's first step is about the sign of the gradient: rounding may turn that of the smallest
        turned = (again["network"][name] - weight).abs() > 0.1 * learned.abs() + 1e-9
        assert turned.float().mean() < 0.02
