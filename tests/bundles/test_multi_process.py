# SPDX-License-Identifier: Apache-2.0
"""Two processes under ``torchrun`` do what one does: the same losses, weights, states, tables and files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from shell import output_of, run_bundle
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from monai_deq.data import PooledPairSampler, write_sample_cohort, write_sample_lung_cohort

BUNDLES = Path(__file__).resolve().parents[2] / "bundles"
OASIS = ("oasis", "slices.json")
NLST = ("nlst", "methods/deqreg.json")
_CUT_OFF = "terminate called without an active exception"
_FINISHED = "Engine run finished"


def configs(bundle: tuple[str, ...], name: str) -> list[str]:
    return [str(BUNDLES / bundle[0] / file) for file in (f"{name}.json", *bundle[1:])]


def two(run_id: str, bundle: tuple[str, ...], name: str, folder: Path, **overrides: Any) -> str:
    """Run a configuration in two processes, from the shell."""
    files = configs((*bundle, f"multi_gpu_{name}.json"), name)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    result = run_bundle(run_id, files, folder, launcher, device="cpu", **overrides)
    # all done, but a thread of Gloo was cut off at the exit, as happens once in a while; the results are what counts
    if _CUT_OFF in result.stderr and "Traceback" not in result.stderr.split(_CUT_OFF)[0] and _FINISHED in result.stdout:
        return result.stdout
    return output_of(result)


def one(run_id: str, bundle: tuple[str, ...], name: str, **overrides: Any) -> None:
    """Run a configuration in this process."""
    parser = ConfigParser()
    parser.read_config(configs(bundle, name))
    overrides = {"device": "cpu", **overrides}
    parser.update({k: str(v) if isinstance(v, Path) else v for k, v in overrides.items()})
    parser.get_parsed_content("initialize")
    parser.get_parsed_content(run_id)


def curves(folder: Path) -> dict[str, list[float]]:
    """All that the one writer of the logs has written: losses, scores."""
    found: dict[str, list[float]] = {}
    for file in sorted(folder.glob("eval/events.out.tfevents.*")):
        events = EventAccumulator(str(file)).Reload()
        for tag in events.Tags()["scalars"]:
            found.setdefault(tag, []).extend(event.value for event in events.Scalars(tag))
    return found


def last(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "models" / "last.pt", weights_only=True)


def assert_same_training(found: Path, expected: Path) -> None:
    a, b = curves(found), curves(expected)
    assert a.keys() == b.keys() and len(a) >= 3
    for tag, values in b.items():
        # each value by one process alone
        np.testing.assert_allclose(a[tag], values, rtol=2e-4, atol=1e-6, err_msg=tag)
    assert any(len(set(values)) > 2 for values in b.values())
    x, y = last(found), last(expected)
    assert x["trainer"] == y["trainer"] and x["best_epoch"] == y["best_epoch"]
    for name, weight in y["network"].items():
        # AdamW's first steps are about the sign of the gradient: rounding may turn that of the smallest
        apart = (x["network"][name] - weight).abs() > 1e-5
        assert apart.float().mean() < 0.02, name
    assert x["loss"]["_extra_state"]["calls"] == y["loss"]["_extra_state"]["calls"]
    assert torch.equal(x["loss"]["_extra_state"]["generator"], y["loss"]["_extra_state"]["generator"])
    assert torch.equal(x["pool"]["tickets"], y["pool"]["tickets"])
    torch.testing.assert_close(x["pool"]["states"], y["pool"]["states"], rtol=1e-3, atol=1e-4)


class DrawsOfAll:
    """What two processes draw, in turn: one process with twice the slots, each half of them for every other pair."""

    def __init__(self, slots: int, **settings: Any) -> None:
        self.slots = slots
        self.parts = [PooledPairSampler(slots=slots, num_replicas=2, rank=rank, **settings) for rank in range(2)]
        self.state_dict = self.parts[0].state_dict

    def set_epoch(self, epoch: int) -> None:
        for part in self.parts:
            part.set_epoch(epoch)

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __iter__(self) -> Iterator[Any]:
        for pairs in zip(*self.parts, strict=True):
            for rank, pair in enumerate(pairs):
                yield pair._replace(slot=pair.slot + rank * self.slots)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sample_cohort(
        tmp_path_factory.mktemp("data") / "cohort", 8, spatial_size_3d=(16, 16, 16), spatial_size_2d=(32, 37)
    )


@pytest.fixture(scope="module")
def lung_cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sample_lung_cohort(tmp_path_factory.mktemp("data") / "cohort", (4, 1, 1), (20, 16, 24))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, cohort: Path) -> Path:
    """A training of two processes that was stopped and resumed, with all that keeps a state."""
    folder = tmp_path_factory.mktemp("trained")
    settings = {"dataset_dir": cohort, "bundle_root": folder / "two", **POOL, "batch_size": 1, "pool_slots": 2}
    two("training", OASIS, "train", folder, **{**settings, "max_epochs": 1})
    assert len(last(folder / "two")["pool"]["tickets"]) == 4
    two("training", OASIS, "train", folder, **settings, resume="true")
    return folder / "two"


POOL: dict[str, Any] = {
    "split_sizes": [2, 3, 3],
    "max_epochs": 2,
    "pairs_per_epoch": 12,
    "lr_decay_power": 0.0,
    "max_steps": 2,
    "val_steps": 3,
    "pool_renewal": 0.3,
    "random_start_share": 0.5,
    "contraction_weight": 0.5,
    "residual_weight": 0.1,
    "ema_momentum": 0.3,
    "proximal_weight": 0.1,
}


def test_a_pool_in_two_processes_and_resumed(cohort: Path, trained: Path, tmp_path: Path) -> None:
    draws = DrawsOfAll(2, num_subjects=2, pairs_per_epoch=12, renewal=0.3)
    pool = {"pool_slots": 4, "batch_size": 2, "train#sampler": draws}
    one("training", OASIS, "train", dataset_dir=cohort, bundle_root=tmp_path, **POOL, **pool)
    assert_same_training(trained, tmp_path)
    assert (last(trained)["pool"]["tickets"] >= 0).all()
    a, b = last(trained)["averaged"], last(tmp_path)["averaged"]
    assert a.keys() == b.keys() and len(a)
    for name, weight in b.items():
        assert ((a[name] - weight).abs() > 1e-5).float().mean() < 0.02, name
    # what one process loads
    assert not [name for name in last(trained)["network"] if name.startswith("module.")]
    assert {p.name for p in (trained / "models").iterdir()} == {"last.pt", "model.pt", "model.json"}


def test_plain_training_of_volumes_with_accumulated_gradients(lung_cohort: Path, tmp_path: Path) -> None:
    # every pair of the two processes, four to a step: what one process does with a batch of four
    common = {"dataset_dir": lung_cohort, "max_epochs": 1, "pairs_per_epoch": 8, "max_steps": 2, "keypoint_weight": 0.1}
    common.update(split_sizes=[4, 1, 1], spatial_size=[12, 12, 12], learning_rate=0.001, num_states=1, val_steps=2)
    parallel = {"batch_size": 1, "accumulation_steps": 2, "use_checkpoint": "true", "checkpoint_parts": 2}
    two("training", NLST, "train", tmp_path, bundle_root=tmp_path / "two", **common, **parallel)
    one("training", NLST, "train", bundle_root=tmp_path / "one", **common, batch_size=4)
    a, b = curves(tmp_path / "two"), curves(tmp_path / "one")
    # the one pair of validation is with the first process
    assert a.keys() == b.keys() and "val_tre" in a
    # the losses of the iterations and their mean
    *iterations, mean = a.pop("train_loss")
    a["train_loss"] = [*np.reshape(iterations, (2, 2)).mean(axis=1), mean]
    for tag, values in b.items():
        np.testing.assert_allclose(a[tag], values, rtol=2e-4, atol=1e-6, err_msg=tag)
    x, y = last(tmp_path / "two"), last(tmp_path / "one")
    for name, weight in y["network"].items():
        assert ((x["network"][name] - weight).abs() > 1e-4).float().mean() < 0.02, name
    # and a process without a pair in evaluation
    for run, name in ((two, "two"), (one, "one")):
        where = (tmp_path,) if run is two else ()
        settings = {"dataset_dir": lung_cohort, "split_sizes": [4, 1, 1], "output_dir": tmp_path / f"eval_{name}"}
        run("evaluating", NLST, "evaluate", *where, bundle_root=tmp_path / "two", **settings)  # type: ignore[operator]
    assert_same_table(tmp_path / "eval_two", tmp_path / "eval_one")


def assert_same_table(found: Path, expected: Path) -> None:
    for name in ("evaluation_pairs.csv", "evaluation_summary.json"):
        assert (found / name).read_text() == (expected / name).read_text()
    assert {p.name for p in found.iterdir()} == {p.name for p in expected.iterdir()}


def test_evaluation_over_uneven_shards(cohort: Path, trained: Path, tmp_path: Path) -> None:
    settings = {"dataset_dir": cohort, "bundle_root": trained, "split_sizes": [2, 3, 3]}
    out = two("evaluating", OASIS, "evaluate", tmp_path, **settings, output_dir=tmp_path / "two")
    assert out.count("3 pairs, label set") == 1
    one("evaluating", OASIS, "evaluate", **settings, output_dir=tmp_path / "one")
    assert_same_table(tmp_path / "two", tmp_path / "one")
    assert json.loads((tmp_path / "two" / "evaluation_summary.json").read_text())["num_pairs"] == 3


def test_inference_writes_each_pair_once(cohort: Path, trained: Path, tmp_path: Path) -> None:
    settings = {"dataset_dir": cohort, "bundle_root": trained, "split_sizes": [2, 3, 3]}
    two("inference", OASIS, "inference", tmp_path, **settings, output_dir=tmp_path / "two")
    one("inference", OASIS, "inference", **settings, output_dir=tmp_path / "one")
    files = {p.name for p in (tmp_path / "one").iterdir()}
    assert files == {p.name for p in (tmp_path / "two").iterdir()} and len(files) == 3 * 4
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
