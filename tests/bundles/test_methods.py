# SPDX-License-Identifier: Apache-2.0
"""Every system of the comparison, one overlay away; settings and parts of both bundles."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import pytest
import torch
from shell import BUNDLES, assert_equal, configs, error_of, output_of, parse, run_bundle

from monai_deq.evaluation import METHODS
from monai_deq.networks import NetworkRecord, describe, load_network
from monai_deq.networks.nets import DEQRegistrationNet, EnergyRegistrationNet, RestSettings, UnrolledRegistrationNet

CLASSICAL = ("affine", "elastix", "energy")
ALL = (*METHODS, "energy", "energy_features")
LEARNED = tuple(m for m in METHODS if m not in CLASSICAL)
# so few steps that every schedule still has its shape
STEPS = {"deqreg_pool": 2, "deqreg": 6, "deqreg12": 2, "voxelmorph": 1, "unrolling": 1, "gradirn": 1, "riir": 3}
STEPS["energy_features"] = 2
WORKFLOWS = ("train", "evaluate", "inference")


def files(name: str, spatial_dims: int, method: str | None = None) -> list[str]:
    overlays = [] if method is None else [f"methods/{method}.json"]
    return configs("oasis", name, *(["slices.json"] if spatial_dims == 2 else []), *overlays)


def cause(error: BaseException) -> str:
    """What MONAI's parser has wrapped."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error)


def test_every_overlay_is_a_method_of_the_comparison() -> None:
    assert {p.stem for p in (BUNDLES / "oasis" / "methods").glob("*.json")} == {*ALL}


@pytest.mark.parametrize(
    "method, bundle",
    [(m, b) for m in ALL for b in ("oasis", "nlst") if (m, b) != ("elastix", "oasis")],
)
def test_method_trains_evaluates_and_registers(
    method: str, bundle: str, brain_cohort: Path, lung_cohort: Path, tmp_path: Path
) -> None:
    """Slices of one bundle, volumes of the other; evaluation and inference know the method by the checkpoint."""
    overlays = (f"methods/{method}.json",)
    title = parse(configs(bundle, "train", *overlays))["method"]
    common: dict[str, object] = {"dataset_dir": lung_cohort, "bundle_root": tmp_path}
    dims: tuple[str, ...] = ()
    if bundle == "oasis":
        common, dims = {**common, "dataset_dir": brain_cohort, "split_sizes": "[3,2,2]"}, ("slices.json",)
    # the pool's are those of the sample's schedule
    steps = {**STEPS, "deqreg_pool": 8 if bundle == "nlst" else 16, "affine": 0, "elastix": 0, "energy": 40}[method]
    if method not in CLASSICAL:
        tiny = {"max_epochs": 1, "pairs_per_epoch": 2}
        # smaller than the scans along two axes
        tiny.update({"spatial_size": [16, 16, 16], "batch_size": 2} if bundle == "nlst" else {"label_weight": 1.0})
        if method == "energy_features":
            tiny["steps"] = [3, STEPS[method]]
        elif method != "voxelmorph":
            tiny["max_steps"] = STEPS[method]
        output_of(run_bundle("training", configs(bundle, "train", *dims, *overlays), tmp_path, **common, **tiny))
        check_record(method, title, steps, tmp_path)
        overlays = ()

    settings: dict[str, Any] = {"network_def#iterations": 2} if method == "elastix" else {}
    config = configs(bundle, "evaluate", *dims, *overlays)
    output_of(run_bundle("evaluating", config, tmp_path, **common, **settings, split="validation", labels=[1]))
    summary = json.loads((tmp_path / "eval" / "evaluation_summary.json").read_text())
    assert summary["method"] == title and summary["num_pairs"] == {"oasis": 2, "nlst": 1}[bundle]
    scores = {name: value["mean"] for name, value in summary["summary"].items()}
    assert (scores["std_log_jacobian"] == 0) == (method == "affine")
    if bundle == "nlst":
        assert (scores["tre"] == pytest.approx(scores["tre_before"])) == (method == "affine")
    levels = 3 if method in ("unrolling", "gradirn") else 1
    assert all(pair["steps"] <= steps * levels for pair in summary["pairs"])
    assert (scores["steps"] > 0) == (steps > 0)

    config = configs(bundle, "inference", *dims, *overlays)
    if bundle == "oasis":
        scans = [brain_cohort / f"OASIS_OAS1_900{n}_MR1" / "slice_norm.nii.gz" for n in (1, 2)]
    else:
        scans = [lung_cohort / "imagesTr" / f"NLST_0001_000{n}.nii.gz" for n in (0, 1)]
    pair = {"fixed": scans[0], "moving": scans[1], "bundle_root": tmp_path}
    output_of(run_bundle("inference", config, tmp_path, **pair, **settings))
    (field,) = (tmp_path / "output").glob("*_ddf.nii.gz")
    assert nib.load(field).shape[:3] == nib.load(scans[0]).shape
    assert {p.name for p in tmp_path.iterdir()} - {"models"} == {"eval", "output"}


def test_features_are_trained_on_labels_then_through_the_solution(brain_cohort: Path, tmp_path: Path) -> None:
    given = {"dataset_dir": brain_cohort, "split_sizes": "[3,2,2]", "steps": [3, 2]}
    config = configs("oasis", "train", "slices.json", "methods/energy_features.json", "features.json")
    labels = {**given, "train#handlers#1#interval": 1, "max_epochs": 2, "pairs_per_epoch": 6, "learning_rate": 0.01}
    run_all = {"bundle_root": "whole", **labels}
    out = output_of(run_bundle("training", config, tmp_path, **run_all))
    losses = [float(loss) for loss in re.findall(r"train_loss: (\S+)", out)]
    assert len(losses) == 2 and losses[1] < losses[0]
    record = json.loads((tmp_path / "whole" / "models" / "model.json").read_text())
    assert record["network"]["features"]["channels"] == 25 and record["training"]["label_weight"] == 1
    # stopped and resumed the draws are the same
    parts = {"bundle_root": "parts", **labels}
    output_of(run_bundle("training", config, tmp_path, **parts, **{"train#trainer#max_epochs": 1}))
    output_of(run_bundle("training", config, tmp_path, **parts, resume="true"))
    states = [torch.load(tmp_path / n / "models" / "last.pt", weights_only=True) for n in ("whole", "parts")]
    assert_equal(*(state["network"] for state in states))

    weights = tmp_path / "whole" / "models" / "model.pt"
    further = {**given, "max_epochs": 1, "pairs_per_epoch": 2, "label_weight": 1.0, "channels": 25, "weights": weights}
    output_of(run_bundle("training", config[:-1], tmp_path, bundle_root="through", **further))
    before, after = (load_network(tmp_path / n / "models" / "model.pt").state_dict() for n in ("whole", "through"))
    assert all(not torch.equal(before[name], after[name]) for name in before if name.endswith("weight"))
    # what is trained on labels needs them, unless those of one image are carried to the others
    bare = shutil.copytree(brain_cohort, tmp_path / "bare")
    for n in (1, 2, 3):
        (bare / f"OASIS_OAS1_900{n}_MR1" / "slice_seg24.nii.gz").unlink()
    without = {**run_all, "dataset_dir": bare, "bundle_root": "without", "max_epochs": 1}
    error = error_of(run_bundle("training", config, tmp_path, **without))
    assert "The training part needs a label" in error
    propagated = configs(
        "oasis", "train", "slices.json", "methods/energy_features.json", "features.json", "propagated.json"
    )
    output_of(run_bundle("training", propagated, tmp_path, **without, parcels=5))
    record = json.loads((tmp_path / "without" / "models" / "model.json").read_text())
    assert record["network"]["features"]["channels"] == 6 and record["training"]["label_weight"] == 0


def check_record(method: str, title: str, steps: int, folder: Path) -> None:
    record = json.loads((folder / "models" / "model.json").read_text())
    assert (record["method"], record["steps"]) == (title, steps)
    assert record["training"].get("label_weight", 1.0) == 1.0
    network = load_network(folder / "models" / "model.pt")
    if method.startswith("deqreg"):
        assert isinstance(network, DEQRegistrationNet) and network.solver.max_steps == steps
        assert record["network"]["solver"]["max_steps"] == STEPS[method]
        assert network.rest.enabled == (method == "deqreg_pool")
        assert network.gradient.num_states == (3 if method == "deqreg" else 0)
    elif method == "energy_features":
        assert isinstance(network, EnergyRegistrationNet) and network.steps == (3, STEPS[method])
        assert network.features is not None and network.features.channels == 16
    else:
        assert isinstance(network, UnrolledRegistrationNet)
        levels = 3 if method in ("unrolling", "gradirn") else 1
        assert network.steps == (STEPS[method],) * levels and network.all_states == (method == "riir")
    assert all(torch.isfinite(w).all() for w in network.parameters())


@pytest.mark.parametrize("bundle", ["oasis", "nlst"])
def test_recipe_is_the_default_of_real_data(bundle: str) -> None:
    def rest(is_sample: bool, *overlays: str, **overrides: object) -> tuple[str, RestSettings]:
        found = SimpleNamespace(is_sample=is_sample)
        parser = parse(configs(bundle, "train", *overlays), found=found, **overrides)
        return parser.get_parsed_content("method"), parser.get_parsed_content("rest")

    slots = {"oasis": 32, "nlst": 16}[bundle]
    recipe = {"relaxation": 0.5, "proximal_weight": 0.1, "contraction_weight": 0.03, "pool_slots": slots}
    recipe.update(pool_renewal=0.2, random_start_share=0.4, random_start_rms=3.0, contraction_along_step=0.5)
    papers = {"relaxation": 1.0, "proximal_weight": 0.0, "contraction_weight": 0.0, "pool_renewal": 1.0}
    papers["random_start_share"] = 0.0
    for given in (
        rest(False),
        *(rest(sample, "methods/deqreg_pool.json") for sample in (False, True)),
        rest(True, pooled="true"),  # as the command line hands it on
    ):
        assert given[0] == "DEQReg-pool" and asdict(given[1]) == {**recipe, "enabled": True}
    # a few minutes teach the sample's network to register, not to rest
    plain = [rest(sample, "methods/deqreg.json") for sample in (False, True)]
    for method, settings in (rest(True), rest(False, pooled="false"), *plain):
        assert method == "DEQReg" and {k: asdict(settings)[k] for k in papers} == papers
    for method in LEARNED:
        _, settings = rest(False, f"methods/{method}.json")
        assert ({k: asdict(settings)[k] for k in papers} == papers) == (method != "deqreg_pool")

    values = {"relaxation": 0.25, "proximal_weight": 0.375, "contraction_weight": 0.0625}
    given = {f"rest#{name}": value for name, value in values.items()}
    parser = parse(
        configs(bundle, "train"),
        found=SimpleNamespace(is_sample=False),
        spatial_dims=2,
        **given,
    )
    network, loss = parser.get_parsed_content("network_def"), parser.get_parsed_content("loss")
    assert (network.rest.relaxation, network.proximal_weight, loss.rest.contraction_weight) == (0.25, 0.375, 0.0625)


def test_evaluation_follows_the_training(tmp_path: Path) -> None:
    for method, settings in (("gradirn", {"steps": 2, "num_levels": 2}), ("voxelmorph", {"integration_steps": 5})):
        overrides = {f"network_def#{name}": value for name, value in settings.items()}
        trained = parse(files("train", 2, method), **overrides).get_parsed_content("network_def")
        assert str(trained) != str(parse(files("train", 2, method)).get_parsed_content("network_def"))
        torch.save(trained.state_dict(), tmp_path / "model.pt")
        NetworkRecord(describe(trained)).write(tmp_path / "model.json")
        for name in ("evaluate", "inference"):
            found = parse(files(name, 2), ckpt_dir=tmp_path).get_parsed_content("network_def")
            assert found.steps == trained.steps and str(found) == str(trained)


@pytest.mark.parametrize("bundle", ["oasis", "nlst"])
@pytest.mark.parametrize("given", ["fixed", "moving", "moving_label", "initial_ddf"])
def test_inference_ignores_no_file(given: str, bundle: str) -> None:
    messages = {None: "both --fixed and --moving are needed", "a.json": "--pairs a.json cannot go with --fixed"}
    for pairs, message in messages.items():
        parser = parse(configs(bundle, "inference"), **{given: "scan.nii.gz"}, pairs=pairs)
        with pytest.raises(RuntimeError) as caught:
            parser.get_parsed_content("data")
        assert message in cause(caught.value)


def test_training_keeps_no_labels_in_memory(brain_cohort: Path) -> None:
    parser = parse(files("train", 2), dataset_dir=brain_cohort, split_sizes=[3, 2, 2])
    assert set(parser.get_parsed_content("train#pairs").dataset[0]) == {"subject", "image"}
    assert set(parser.get_parsed_content("validate#dataset").dataset[0]) == {"subject", "image", "label"}


def test_device_as_text() -> None:
    parser = parse(files("train", 3, "riir"), device="cpu", found=SimpleNamespace(is_sample=True))
    weights = [p for p in parser.get_parsed_content("network").parameters() if p.ndim == 5]
    assert weights and all(w.is_contiguous(memory_format=torch.channels_last_3d) for w in weights)


@pytest.mark.parametrize("bundle", ["oasis", "nlst"])
def test_mixed_precision_as_text(bundle: str) -> None:
    engines = {"train": ("train#trainer", "validate#evaluator")}
    for name in WORKFLOWS:
        for value in (True, False):
            # as it arrives from the command line
            parser = parse(configs(bundle, name), amp=str(value).lower())
            for engine in engines.get(name, ("evaluator",)):
                assert parser.get_parsed_content(f"{engine}#amp") is value


@pytest.mark.parametrize("bundle", ["oasis", "nlst"])
@pytest.mark.parametrize("method", ["voxelmorph", "unrolling", "gradirn", "riir"])
def test_overlays_refuse_what_they_do_not_use(
    method: str, bundle: str, brain_cohort: Path, lung_cohort: Path, tmp_path: Path
) -> None:
    config = configs(bundle, "train", f"methods/{method}.json")
    unused: dict[str, Any] = {
        "coarser_levels": 1,
        "coarse_weights": "model.pt",
        "phantom_steps": 4,
        "num_states": 2,
        "checkpoint_parts": 2,
        "gradient#kind": "implicit",
        "solver#tolerance": 0.1,
        **({"max_steps": 3} if method == "voxelmorph" else {}),
    }
    # the weights that coarser levels start from are the checkpoint's affair too
    refused = sorted(name.split("#")[0] for name in unused if name != "coarse_weights")
    result = run_bundle("training", config, tmp_path, dataset_dir="absent", **unused)
    assert f"{parse(config)['method']} has no use for {', '.join(refused)}:" in error_of(result)
    assert "'absent' does not exist" in error_of(run_bundle("training", config, tmp_path, dataset_dir="absent"))
    # what makes an iteration come to rest is for an equilibrium
    common = {"dataset_dir": {"oasis": brain_cohort, "nlst": lung_cohort}[bundle]}
    if bundle == "oasis":
        common["split_sizes"] = "[3,2,2]"
    rest = run_bundle("training", config, tmp_path, **common, **{"rest#relaxation": 0.3})
    assert "relaxation 0.3 does nothing unless rest is enabled" in error_of(rest)
    rest = run_bundle("training", config, tmp_path, **common, pooled="true")
    assert "the contraction is for a DEQRegistrationNet" in error_of(rest)


def test_evaluation_of_what_is_not_trained_refuses_its_settings(tmp_path: Path) -> None:
    for name in ("evaluate", "inference"):
        result = run_bundle("run", files(name, 3, "affine"), tmp_path, coarse_solver="anderson", ckpt_dir="models")
        assert "Affine has no use for ckpt_dir, coarse_solver:" in error_of(result)


@pytest.mark.parametrize("bundle", ["oasis", "nlst"])
def test_random_starts_are_those_of_the_seed(bundle: str, brain_cohort: Path) -> None:
    parser = parse(configs(bundle, "train"), found=SimpleNamespace(is_sample=True), seed=5)
    assert parser.get_parsed_content("train#trainer#prepare_batch").seed == 5
    assert parser.get_parsed_content("loss").generator.initial_seed() == 5
