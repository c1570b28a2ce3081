# SPDX-License-Identifier: Apache-2.0
"""Two processes do what one does: the same losses, weights, states, tables and files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from shell import configs, output_of, run_bundle, run_bundle_in_shell, run_bundle_in_two, run_parsed
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from monai_deq.data import PooledSampler, RandomPairSampler

EVALUATE, INFERENCE = (configs("oasis", name, "slices.json") for name in ("evaluate", "inference"))
TRAIN = configs("oasis", "train", "slices.json")
LUNGS = configs("nlst", "train", "methods/deqreg.json")
_CUT_OFF = "terminate called without an active exception"
_FINISHED = "Engine run finished"


def two(run_id: str, files: list[str], folder: Path, **overrides: Any) -> str:
    """Run a configuration in two processes."""
    files = [*files, str(Path(files[0]).with_name(f"multi_gpu_{Path(files[0]).name}"))]
    return "".join(map(output_of, run_bundle_in_two(run_id, files, folder, device="cpu", **overrides)))


def torchrun(run_id: str, files: list[str], folder: Path, **overrides: Any) -> None:
    """The same as a user does it."""
    files = [*files, str(Path(files[0]).with_name(f"multi_gpu_{Path(files[0]).name}"))]
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    result = run_bundle_in_shell(run_id, files, folder, launcher, device="cpu", **overrides)
    # all done, but a thread of Gloo was cut off at the exit, as happens once in a while; the results are what counts
    cut_off = _CUT_OFF in result.stderr and "Traceback" not in result.stderr.split(_CUT_OFF)[0]
    if not (cut_off and _FINISHED in result.stdout):
        output_of(result)


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


def assert_same_curves(a: dict[str, list[float]], b: dict[str, list[float]]) -> None:
    assert a.keys() == b.keys() and len(a) >= 3
    for tag, values in b.items():
        # each value by one process alone
        np.testing.assert_allclose(a[tag], values, rtol=2e-4, atol=1e-6, err_msg=tag)


def assert_same_weights(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    assert a.keys() == b.keys() and len(a)
    # AdamW's first steps are about the sign of the gradient: rounding may turn that of the smallest
    apart = {name: ((a[name] - weight).abs() > tolerance).float() for name, weight in b.items()}
    assert torch.cat([x.flatten() for x in apart.values()]).mean() < 0.01
    assert all(x.mean() < 0.1 for x in apart.values())


class DrawsOfAll:
    """What two processes draw, in turn: one process with twice the slots, each half of them for every other pair."""

    def __init__(self, slots: int, renewal: float, **settings: Any) -> None:
        self.slots = slots
        samplers = [RandomPairSampler(num_replicas=2, rank=rank, **settings) for rank in range(2)]
        self.parts = [PooledSampler(sampler, slots, renewal) for sampler in samplers]
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


POOL: dict[str, Any] = {
    "split_sizes": [2, 2, 3],
    "max_epochs": 2,
    # one more is drawn, so that each process has as many
    "pairs_per_epoch": 7,
    "lr_decay_power": 0.0,
    "max_steps": 2,
    "val_steps": 3,
    "ema_momentum": 0.3,
    "pooled": "true",
    "rest#pool_renewal": 0.3,
    "rest#random_start_share": 0.5,
    "rest#contraction_weight": 0.5,
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, brain_cohort: Path) -> Path:
    """A training of two processes that was stopped and resumed, with all that keeps a state."""
    folder = tmp_path_factory.mktemp("trained")
    settings = {"dataset_dir": brain_cohort, "bundle_root": folder, **POOL, "batch_size": 1, "rest#pool_slots": 2}
    torchrun("training", TRAIN, folder, **{**settings, "max_epochs": 1})
    assert len(last(folder)["pool"]["tickets"]) == 4
    two("training", TRAIN, folder, **settings, resume="true")
    return folder


def test_a_pool_in_two_processes_and_resumed(brain_cohort: Path, trained: Path, tmp_path: Path) -> None:
    draws = DrawsOfAll(2, 0.3, num_subjects=2, pairs_per_epoch=7)
    pool = {"rest#pool_slots": 4, "batch_size": 2, "train#sampler": draws, "device": "cpu"}
    run_parsed("training", TRAIN, dataset_dir=str(brain_cohort), bundle_root=str(tmp_path), **POOL, **pool)
    found, expected = curves(trained), curves(tmp_path)
    assert_same_curves(found, expected)
    assert any(len(set(values)) > 2 for values in expected.values())
    x, y = last(trained), last(tmp_path)
    for key in ("epoch", "iteration", "epoch_length", "best_epoch", "pairs"):
        assert x["training"][key] == y["training"][key]
    assert x["training"]["pairs"] == 2 * 8
    assert_same_weights(x["network"], y["network"])
    assert_same_weights(x["averaged"], y["averaged"])
    assert torch.equal(x["loss"]["_extra_state"]["generator"], y["loss"]["_extra_state"]["generator"])
    assert torch.equal(x["pool"]["tickets"], y["pool"]["tickets"]) and (x["pool"]["tickets"] >= 0).all()
    torch.testing.assert_close(x["pool"]["states"], y["pool"]["states"], rtol=1e-3, atol=1e-4)
    # what one process loads
    assert not [name for name in x["network"] if name.startswith("module.")]
    assert {p.name for p in (trained / "models").iterdir()} == {"last.pt", "model.pt", "model.json"}
    record = json.loads((trained / "models" / "model.json").read_text())
    assert record["training"]["training_pairs"] == 8 * record["training"]["epoch"]


def assert_same_table(found: Path, expected: Path, num_pairs: int) -> None:
    for name in ("evaluation_pairs.csv", "evaluation_summary.json"):
        assert (found / name).read_text() == (expected / name).read_text()
    assert {p.name for p in found.iterdir()} == {p.name for p in expected.iterdir()}
    pictures = [picture["file"] for picture in json.loads((found / "evaluation_summary.json").read_text())["pictures"]]
    assert len(pictures) == min(num_pairs, 2)
    for name in pictures:
        assert (found / name).read_bytes() == (expected / name).read_bytes()
    assert json.loads((found / "evaluation_summary.json").read_text())["num_pairs"] == num_pairs


def test_plain_training_of_volumes_with_accumulated_gradients(lung_cohort: Path, tmp_path: Path) -> None:
    # every pair of the two processes, four to a step: what one process does with a batch of four
    common = {"dataset_dir": lung_cohort, "max_epochs": 1, "pairs_per_epoch": 8, "max_steps": 2, "keypoint_weight": 0.1}
    common.update(spatial_size=[12, 12, 12], learning_rate=0.001, num_states=1, val_steps=2)
    parallel = {"batch_size": 1, "accumulation_steps": 2, "checkpointed": "true", "checkpoint_parts": 2}
    two("training", LUNGS, tmp_path, bundle_root=tmp_path / "two", **common, **parallel)
    output_of(run_bundle("training", LUNGS, tmp_path, bundle_root=tmp_path / "one", **common, batch_size=4))
    a, b = curves(tmp_path / "two"), curves(tmp_path / "one")
    # the losses of the iterations and their mean
    *iterations, mean = a["train_loss"]
    a["train_loss"] = [*np.reshape(iterations, (2, 2)).mean(axis=1), mean]
    # the one pair of validation is with the first process
    assert_same_curves(a, b)
    assert "val_tre" in a
    assert_same_weights(last(tmp_path / "two")["network"], last(tmp_path / "one")["network"], 1e-4)
    # and a process without a pair in evaluation
    evaluate = configs("nlst", "evaluate")
    settings = {"dataset_dir": lung_cohort, "split": "validation", "bundle_root": tmp_path / "two"}
    two("evaluating", evaluate, tmp_path, **settings, output_dir="eval_two")
    output_of(run_bundle("evaluating", evaluate, tmp_path, **settings, output_dir="eval_one"))
    assert_same_table(tmp_path / "eval_two", tmp_path / "eval_one", 1)


def test_evaluation_over_uneven_shards(brain_cohort: Path, trained: Path, tmp_path: Path) -> None:
    settings = {"dataset_dir": brain_cohort, "bundle_root": trained, "split_sizes": [2, 2, 3]}
    out = two("evaluating", EVALUATE, tmp_path, **settings, output_dir="two")
    assert out.count("3 pairs, label set") == 1
    output_of(run_bundle("evaluating", EVALUATE, tmp_path, **settings, output_dir="one"))
    assert_same_table(tmp_path / "two", tmp_path / "one", 3)


def test_inference_writes_each_pair_once(brain_cohort: Path, trained: Path, tmp_path: Path) -> None:
    settings = {"dataset_dir": brain_cohort, "bundle_root": trained, "split_sizes": [2, 2, 3]}
    two("inference", INFERENCE, tmp_path, **settings, output_dir="two")
    output_of(run_bundle("inference", INFERENCE, tmp_path, **settings, output_dir="one"))
    files = {p.name for p in (tmp_path / "one").iterdir()}
    assert files == {p.name for p in (tmp_path / "two").iterdir()} and len(files) == 3 * 5
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


@pytest.mark.parametrize("run_id, files", [("evaluating", EVALUATE), ("inference", INFERENCE)])
def test_pairs_that_fail_in_one_process(
    run_id: str, files: list[str], brain_cohort: Path, trained: Path, tmp_path: Path
) -> None:
    """No process waits for another, and one that goes on from two does what is missing."""
    broken = shutil.copytree(brain_cohort, tmp_path / "broken")
    scan = broken / "OASIS_OAS1_9007_MR1" / "slice_norm.nii.gz"
    whole = scan.read_bytes()
    scan.write_bytes(whole[:-50])
    settings = {"dataset_dir": broken, "bundle_root": trained, "split_sizes": [1, 1, 5]}
    parallel = [*files, str(Path(files[0]).with_name(f"multi_gpu_{Path(files[0]).name}"))]
    results = run_bundle_in_two(run_id, parallel, tmp_path, **settings, output_dir="two", on_error="skip", device="cpu")
    assert [result.returncode for result in results] == [1, 1]
    assert sorted("2 of 5 pairs failed; the same" in result.stdout for result in results) == [False, True]
    assert all("2 of 5 pairs failed, see above" in result.stderr for result in results)
    scan.write_bytes(whole)
    assert "3 of 5 pairs are there already" in two(run_id, files, tmp_path, **settings, output_dir="two", resume="true")
    output_of(run_bundle(run_id, files, tmp_path, **settings, output_dir="one"))
    names = {p.name for p in (tmp_path / "one").iterdir()}
    assert names == {p.name for p in (tmp_path / "two").iterdir()}
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_features_on_labels_and_through_the_solution(brain_cohort: Path, tmp_path: Path) -> None:
    common = {"dataset_dir": brain_cohort, "split_sizes": "[3,2,2]", "max_epochs": 1, "steps": [3, 2], "channels": 25}
    files = [*TRAIN, TRAIN[0].replace("train.json", "methods/energy_features.json")]
    labels = [*files, TRAIN[0].replace("train.json", "features.json")]
    # a Dice loss of a batch is not the mean of those of its halves: that it is trained, and by both, is looked at
    two("training", labels, tmp_path, **common, bundle_root=tmp_path / "labels", pairs_per_epoch=2, batch_size=1)
    weights = tmp_path / "labels" / "models" / "last.pt"
    assert not [name for name in last(tmp_path / "labels")["network"] if name.startswith("module.")]
    through = {**common, "weights": weights, "pairs_per_epoch": 2, "label_weight": 1.0}
    two("training", files, tmp_path, **through, bundle_root=tmp_path / "two", batch_size=1)
    output_of(run_bundle("training", files, tmp_path, **through, bundle_root=tmp_path / "one", batch_size=2))
    # AdamW's first step is the sign of the gradient, which rounding in the descent turns here and there
    before, *after = (last(tmp_path / name)["network"] for name in ("labels", "two", "one"))
    changes = [torch.cat([(x[name] - before[name]).flatten() for name in before]) for x in after]
    assert float(torch.cosine_similarity(*changes, dim=0)) > 0.8
