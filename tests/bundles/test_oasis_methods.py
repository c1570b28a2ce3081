# SPDX-License-Identifier: Apache-2.0
"""Every system of the comparison, one overlay away, run through ``python -m monai.bundle``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import pytest
import torch
from monai.bundle import ConfigParser
from shell import output_of, run_bundle

from monai_deq.data import write_sample_cohort
from monai_deq.evaluation import METHODS

BUNDLE = Path(__file__).resolve().parents[2] / "bundles" / "oasis"
CLASSICAL = ("affine", "elastix")
LEARNED = tuple(m for m in METHODS if m not in CLASSICAL)
# so few steps that every schedule still has its shape
STEPS = {"deqreg_pool": 2, "deqreg": 6, "deqreg12": 2, "voxelmorph": 1, "unrolling": 1, "gradirn": 1, "riir": 3}


def configs(name: str, spatial_dims: int, method: str) -> list[str]:
    files = [f"{name}.json", *(["slices.json"] if spatial_dims == 2 else []), f"methods/{method}.json"]
    return [str(BUNDLE / f) for f in files]


def bundle(*args: Any, **overrides: Any) -> str:
    return output_of(run_bundle(*args, **overrides))


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sample_cohort(
        tmp_path_factory.mktemp("data") / "cohort", 5, spatial_size_3d=(18, 16, 21), spatial_size_2d=(32, 37)
    )


def test_every_overlay_is_a_method_of_the_comparison() -> None:
    assert {p.stem for p in (BUNDLE / "methods").glob("*.json")} == set(METHODS)


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("method", LEARNED)
def test_overlay_trains_and_evaluates(method: str, spatial_dims: int, cohort: Path, tmp_path: Path) -> None:
    common = {"dataset_dir": cohort, "bundle_root": tmp_path, "split_sizes": "[2,2,1]"}
    bundle(
        "training",
        configs("train", spatial_dims, method),
        tmp_path,
        **common,
        max_epochs=1,
        pairs_per_epoch=2,
        max_steps=STEPS[method],
    )
    settings = json.loads((tmp_path / "models" / "model.json").read_text())
    title = ConfigParser.load_config_file(str(BUNDLE / "methods" / f"{method}.json"))["method"]
    assert settings["method"] == title and settings["spatial_dims"] == spatial_dims
    assert settings["max_steps"] == STEPS[method]
    assert settings["val_steps"] == (STEPS[method] if method != "deqreg_pool" else {2: 16, 3: 4}[spatial_dims])
    # the paper's systems without what is ours
    plain = {
        "pool_renewal": 1.0,
        "random_start_share": 0.0,
        "contraction_weight": 0.0,
        "relaxation": 1.0,
        "proximal_weight": 0.0,
    }
    assert all((settings[k] == v) == (method != "deqreg_pool") for k, v in plain.items())
    # an option, see methods/ablation/agreement.json
    assert settings["pool_starts"] == 1 and settings["agreement_weight"] == 0.0
    weights = torch.load(tmp_path / "models" / "model.pt", weights_only=True)
    assert all(torch.isfinite(w).all() for w in weights.get("network", weights).values())

    bundle("evaluating", configs("evaluate", spatial_dims, method), tmp_path, **{**common, "split": "validation"})
    summary = json.loads((tmp_path / "eval" / "evaluation_summary.json").read_text())
    assert summary["method"] == title and summary["num_pairs"] == 2
    assert all(pair["steps"] <= settings["val_steps"] for pair in summary["pairs"])


@pytest.mark.parametrize("bundle_name", ["oasis", "nlst"])
def test_recipe_is_the_default_of_real_data(bundle_name: str) -> None:
    recipe = ("pool_renewal", "random_start_share", "contraction_weight", "relaxation", "proximal_weight")

    def settings(is_sample: bool, *overlays: str, **overrides: object) -> list:
        parser = ConfigParser()
        parser.read_config([str(BUNDLE.parent / bundle_name / f) for f in ("train.json", *overlays)])
        parser.update({"is_sample": is_sample, **overrides})
        return [parser.get_parsed_content(k) for k in ("method", *recipe)]

    pooled = ["DEQReg-pool", 0.2, 0.4, 0.03, 0.5, 0.1]
    assert settings(False) == settings(False, "methods/deqreg_pool.json") == pooled
    assert settings(True, "methods/deqreg_pool.json") == pooled
    # a few minutes teach the sample's network to register, not to rest
    assert settings(True) == settings(True, "methods/deqreg.json") == ["DEQReg", 1.0, 0.0, 0.0, 1.0, 0.0]
    # as the command line hands it on
    assert settings(False, pooled="false") == settings(True) and settings(True, pooled="true") == pooled

    parser = ConfigParser()
    parser.read_config(str(BUNDLE.parent / bundle_name / "train.json"))
    parser.update({"is_sample": True, "relaxation": 0.25, "proximal_weight": 0.375, "contraction_weight": 0.0625})
    network, loss = parser.get_parsed_content("finest_network"), parser.get_parsed_content("loss")
    assert (network.relaxation, network.proximal_weight, loss.contraction_weight) == (0.25, 0.375, 0.0625)


ABLATION = sorted(p.stem for p in (BUNDLE / "methods" / "ablation").glob("*.json"))


@pytest.mark.parametrize("name", ABLATION)
def test_ablation_trains_and_evaluates(name: str, cohort: Path, tmp_path: Path) -> None:
    common = {"dataset_dir": cohort, "bundle_root": tmp_path, "split_sizes": "[2,2,1]"}
    files = configs("train", 2, f"ablation/{name}")
    steps = {"max_steps": 2, **({"random_steps": "[1,3]"} if name == "random_steps" else {})}
    bundle("training", files, tmp_path, **common, max_epochs=1, pairs_per_epoch=2, val_steps=3, **steps)
    settings = json.loads((tmp_path / "models" / "model.json").read_text())
    overlay = ConfigParser.load_config_file(files[-1])
    changed = {k: v for k, v in overlay.items() if k not in ("pooled", "random_steps", "update", "backbone_update")}
    assert {k: settings[k] for k in changed} == changed and settings["method"] != "DEQReg-pool"
    bundle("evaluating", configs("evaluate", 2, f"ablation/{name}"), tmp_path, **common, split="validation")
    assert json.loads((tmp_path / "eval" / "evaluation_summary.json").read_text())["method"] == overlay["method"]


def test_evaluation_follows_the_training(tmp_path: Path) -> None:
    def network(name: str, method: str, **overrides: object) -> ConfigParser:
        parser = ConfigParser()
        parser.read_config(configs(name, 2, method))
        parser.update({"bundle_root": str(tmp_path), **overrides})
        return parser

    (tmp_path / "models").mkdir()
    for method, overrides in (("gradirn", {"max_steps": 2, "num_levels": 2}), ("voxelmorph", {"integration_steps": 5})):
        training = network("train", method, **overrides)
        assert "method_settings" in training["train#handlers"][-1]["settings"]
        values = {k: training.get_parsed_content(k) for k in ("max_steps", "val_steps", "method_settings")}
        (tmp_path / "models" / "model.json").write_text(json.dumps(values))
        trained = training.get_parsed_content("network_def")
        for name in ("evaluate", "inference"):
            evaluated = network(name, method).get_parsed_content("network_def")
            assert evaluated.steps == trained.steps
            assert str(evaluated) == str(trained)


@pytest.mark.parametrize("bundle_name", ["oasis", "nlst"])
@pytest.mark.parametrize("given", ["fixed", "moving", "moving_label", "initial_ddf"])
def test_inference_ignores_no_file(given: str, bundle_name: str) -> None:
    messages = {None: "both --fixed and --moving are needed", "a.json": "--pairs a.json cannot go with --fixed"}
    for pairs, message in messages.items():
        parser = ConfigParser()
        parser.read_config(str(BUNDLE.parent / bundle_name / "inference.json"))
        parser.update({given: "scan.nii.gz", "pairs": pairs})
        with pytest.raises(RuntimeError) as caught:
            parser.get_parsed_content("data")
        assert message in str(caught.value.__cause__)


def test_training_keeps_no_labels_in_memory(cohort: Path) -> None:
    parser = ConfigParser()
    parser.read_config(configs("train", 2, "deqreg"))
    parser.update({"dataset_dir": str(cohort), "split_sizes": [2, 2, 1], "rank": 0})
    assert set(parser.get_parsed_content("train#dataset#dataset")[0]) == {"subject", "image"}
    assert set(parser.get_parsed_content("validate#dataset#dataset")[0]) == {"subject", "image", "label"}


def test_device_as_text() -> None:
    for name in ("train", "evaluate", "inference"):
        parser = ConfigParser()
        parser.read_config(configs(name, 3, "riir"))
        parser.update({"device": "cpu"})
        assert parser.get_parsed_content("memory_format") == torch.channels_last_3d


@pytest.mark.parametrize("bundle_name", ["oasis", "nlst"])
def test_mixed_precision_as_text(bundle_name: str) -> None:
    engines = {
        "train": ("train#trainer", "validate#evaluator"),
        "evaluate": ("evaluator",),
        "inference": ("evaluator",),
    }
    for name, ids in engines.items():
        parser = ConfigParser()
        parser.read_config(str(BUNDLE.parent / bundle_name / f"{name}.json"))
        for value in (True, False):
            # as it arrives from the command line
            parser.update({"amp": str(value).lower()})
            assert [parser.get_parsed_content(f"{engine}#amp") for engine in ids] == [value] * len(ids)


@pytest.mark.parametrize("method", ["voxelmorph", "unrolling", "gradirn", "riir"])
def test_overlays_refuse_what_they_do_not_use(method: str, tmp_path: Path) -> None:
    def training(**overrides: object) -> ConfigParser:
        parser = ConfigParser()
        parser.read_config(configs("train", 3, method))
        parser.update({"is_sample": False, "dataset_dir": str(tmp_path / "absent"), **overrides})
        return parser

    def cause(parser: ConfigParser) -> str:
        with pytest.raises(RuntimeError) as caught:
            parser.get_parsed_content("train#trainer")
        error: BaseException = caught.value
        while error.__cause__ is not None:
            error = error.__cause__
        return str(error)

    # model.json says what was done, on real data too
    assert [training().get_parsed_content(k) for k in ("relaxation", "proximal_weight")] == [1.0, 0.0]
    assert "absent" in cause(training(unwarped_moving="false"))
    # those of a package that was made of other weights are not the user's
    packaged = ConfigParser()
    packaged.read_config(configs("train", 3, method)[0])
    packaged.update({"coarser_levels": 2, "coarse_steps": 48, "unwarped_moving": True})
    packaged.update(ConfigParser.load_config_file(configs("train", 3, method)[-1]))
    packaged.update({"is_sample": False, "dataset_dir": str(tmp_path / "absent")})
    assert "absent" in cause(packaged)
    title = training()["method"]
    other = {
        "coarser_levels": 1,
        "coarse_weights": "model.pt",
        "unwarped_moving": "true",
        "relaxation": 0.5,
        "phantom_steps": 4,
        "gradient": "implicit",
        "num_states": 2,
        "random_steps": [1, 3],
        "contraction_weight": 0.03,
        **({"max_steps": 3} if method == "voxelmorph" else {}),
    }
    for name, value in other.items():
        assert f"{title} has no use for {name} {value!r}" in cause(training(**{name: value}))


@pytest.mark.parametrize("run_id", ["training", "run"])
@pytest.mark.parametrize("bundle_name", ["oasis", "nlst"])
def test_coarser_networks_must_be_trained(bundle_name: str, run_id: str, tmp_path: Path) -> None:
    weights = {"coarse_weights": "half.pt"}, {"weights": "full.pt"}, {"resume": "true"}
    for given, message in (({}, "needs the coarser networks trained"), *((w, "absent") for w in weights)):
        parser = ConfigParser()
        parser.read_config(str(BUNDLE.parent / bundle_name / "train.json"))
        absent = str(tmp_path / "absent")
        parser.update({"is_sample": False, "dataset_dir": absent, "coarser_levels": 1, **given})
        with pytest.raises(RuntimeError) as caught:
            parser.get_parsed_content(run_id)
        error: BaseException = caught.value
        while error.__cause__ is not None:
            error = error.__cause__
        assert message in str(error)


@pytest.mark.parametrize("bundle_name", ["oasis", "nlst"])
def test_pairs_are_counted_as_they_are_dealt_out(bundle_name: str) -> None:
    files = [str(BUNDLE.parent / bundle_name / f) for f in ("train.json", "multi_gpu_train.json")]
    for used, count in ((files[:1], 6), (files, 8)):
        parser = ConfigParser()
        parser.read_config(used)
        parser.update({"is_sample": True, "pairs_per_epoch": 6, "world_size": len(used) ** 2})
        parser.update({"count": parser["train#handlers"][-1]["pairs_per_epoch"]})
        assert parser.get_parsed_content("count") == count


@pytest.mark.parametrize("bundle_name", ["oasis", "nlst"])
def test_random_starts_are_those_of_the_seed(bundle_name: str) -> None:
    parser = ConfigParser()
    parser.read_config(str(BUNDLE.parent / bundle_name / "train.json"))
    parser.update({"is_sample": True, "seed": 5, "masked_similarity": False})
    assert parser.get_parsed_content("train#trainer#prepare_batch").seed == 5


@pytest.mark.parametrize("bundle_name", ["oasis", "nlst"])
def test_unwarped_moving_as_text(bundle_name: str) -> None:
    for value in (True, False):
        parser = ConfigParser()
        parser.read_config(str(BUNDLE.parent / bundle_name / "train.json"))
        # as it arrives from the command line
        parser.update({"is_sample": True, "unwarped_moving": str(value).lower()})
        update = parser.get_parsed_content("update")
        assert update.unwarped_moving is value and update.backbone.in_channels == 5 + value


@pytest.mark.parametrize("method", ["riir", "gradirn", *CLASSICAL])
def test_overlay_registers_files(method: str, cohort: Path, tmp_path: Path) -> None:
    subjects = sorted(p for p in cohort.iterdir() if p.is_dir())[:2]
    fixed, moving = (p / "aligned_norm.nii.gz" for p in subjects)
    overrides: dict[str, object] = {"fixed": fixed, "moving": moving, "bundle_root": tmp_path}
    if method not in CLASSICAL:
        network = ConfigParser()
        network.read_config(configs("inference", 3, method))
        (tmp_path / "models").mkdir()
        torch.save(network.get_parsed_content("network_def").state_dict(), tmp_path / "models" / "model.pt")
        overrides["solver_steps"] = 2
    bundle("inference", configs("inference", 3, method), tmp_path, **overrides)
    fields = [p for p in (tmp_path / "output").rglob("*.nii.gz") if nib.load(p).ndim > 3]
    assert len(fields) == 1 and nib.load(fields[0]).shape[:3] == nib.load(fixed).shape
    assert {p.name for p in tmp_path.iterdir()} <= {"models", "output"}
