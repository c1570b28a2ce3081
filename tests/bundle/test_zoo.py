# SPDX-License-Identifier: Apache-2.0
"""Packages for the Model Zoo, through MONAI's own commands."""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.bundle import ConfigWorkflow, ckpt_export, create_workflow, load, verify_metadata, verify_net_in_out
from shell import BUNDLES, as_before, output_of, run_bundle

from monai_deq.bundle import write_zoo_package
from monai_deq.bundle.zoo import REQUIRED_METADATA
from monai_deq.networks import NetworkRecord, describe, load_weights
from monai_deq.networks.nets import DEQRegistrationNet, GradientSettings, RestSettings, coarse_to_fine
from monai_deq.solvers import SolverSettings


def network_of(spatial_dims: int, steps: int) -> DEQRegistrationNet:
    return DEQRegistrationNet(
        spatial_dims=spatial_dims,
        solver=SolverSettings(max_steps=steps, tolerance=0.0),
        gradient=GradientSettings(num_states=0),
        rest=RestSettings(relaxation=0.5, proximal_weight=0.1),
    )


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a network for slices with a coarser one, both with steps that are not small."""
    folder = tmp_path_factory.mktemp("run")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = coarse_to_fine(network_of(2, 3), 2, 2)
        for net in (network, network.coarse):
            torch.nn.init.normal_(net.update.backbone.flow.weight, std=0.02)
    return save(network, folder)


def save(network: DEQRegistrationNet, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    torch.save(network.state_dict(), folder / "model.pt")
    record = NetworkRecord(describe(network), "DEQReg-pool", steps=3, preprocessing={"window": [-1000.0, 500.0]})
    record.write(folder / "model.json")
    return folder / "model.pt"


@pytest.fixture(scope="module")
def volume_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(network_of(3, 3), tmp_path_factory.mktemp("volumes"))


@pytest.fixture(scope="module")
def package(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_zoo_package(BUNDLES / "oasis", weights, tmp_path_factory.mktemp("zoo"), overlays=["slices.json"])


def expected_solution(weights: Path, pair: torch.Tensor) -> torch.Tensor:
    """By hand: two steps at half the size, three at full size with a pull to what came of them."""
    network = network_of(2, 3)
    network.coarse = network_of(2, 2)
    load_weights(network, weights)
    with torch.no_grad():
        return network.eval()(pair[:, :1], pair[:, 1:])[1]


def test_layout(package: Path, weights: Path) -> None:
    names = {str(p.relative_to(package)) for p in package.rglob("*") if p.is_file()}
    configs = {f"configs/{n}" for n in ("train.json", "evaluate.json", "inference.json", "metadata.json")}
    configs |= {f"configs/multi_gpu_{n}.json" for n in ("train", "evaluate", "inference")}
    assert configs | {"LICENSE", "docs/README.md", "docs/data_license.txt", "models/model.pt"} <= names
    assert (package / "models" / "model.pt").read_bytes() == weights.read_bytes()
    metadata = json.loads((package / "configs" / "metadata.json").read_text())
    assert not set(REQUIRED_METADATA) - set(metadata)
    assert metadata["network_data_format"]["outputs"]["pred"]["num_channels"] == 2
    assert "bundles/oasis" not in (package / "docs" / "README.md").read_text()
    with zipfile.ZipFile(package.parent / f"{package.name}_v{metadata['version']}.zip") as file:
        assert set(file.namelist()) == {f"{package.name}/{name}" for name in names}
    assert {p.name for p in package.parent.iterdir()} == {package.name, f"{package.name}_v{metadata['version']}.zip"}


def test_metadata_pass_a_schema(package: Path, tmp_path: Path) -> None:
    # the Zoo's schema cannot be fetched here: one that asks for the same entries stands in for it
    tensor = {"type": "object", "required": ["type", "format", "num_channels", "spatial_shape", "dtype", "value_range"]}
    tensors = {"type": "object", "minProperties": 1, "additionalProperties": tensor}
    schema = {
        "type": "object",
        "required": list(REQUIRED_METADATA),
        "properties": {
            "network_data_format": {
                "type": "object",
                "required": ["inputs", "outputs"],
                "properties": {"inputs": tensors, "outputs": tensors},
            }
        },
    }
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    verify_metadata(meta_file=str(package / "configs" / "metadata.json"), filepath=str(tmp_path / "schema.json"))


@pytest.mark.parametrize(("workflow", "kind"), [("train", "train"), ("evaluate", "eval"), ("inference", "infer")])
def test_properties(
    workflow: str, kind: str, package: Path, brain_cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with as_before():
        created = create_workflow(
            config_file=str(package / "configs" / f"{workflow}.json"),
            workflow_type=kind,
            bundle_root=str(package),
            dataset_dir=str(brain_cohort),
            split_sizes=[3, 2, 2],
            output_dir=str(tmp_path / "out"),
            ckpt_dir=str(package / "models") if workflow != "train" else str(tmp_path / "models"),
            logging_file=False,
        )
        assert isinstance(created, ConfigWorkflow)
        assert created.check_properties() == []


def test_the_package_registers(package: Path, brain_cohort: Path, tmp_path: Path) -> None:
    scans = [brain_cohort / f"OASIS_OAS1_900{n}_MR1" / "slice_norm.nii.gz" for n in (1, 2)]
    settings = {"bundle_root": package, "fixed": scans[0], "moving": scans[1], "output_dir": tmp_path}
    output_of(run_bundle("run", package / "configs" / "inference.json", tmp_path, **settings))
    (record,) = tmp_path.glob("*_record.json")
    assert json.loads(record.read_text())["steps"] == 3


def test_network_of_one_tensor(package: Path, weights: Path, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {
        "net_id": "network_def",
        "config_file": str(package / "configs" / "inference.json"),
        "bundle_root": str(package),
    }
    shape = {f"_meta_#network_data_format#{k}#spatial_shape": [32, 48] for k in ("inputs#image", "outputs#pred")}
    verify_net_in_out(meta_file=str(package / "configs" / "metadata.json"), **arguments, **shape)
    exported = tmp_path / "model.ts"
    ckpt_export(
        **arguments,
        ckpt_file=str(package / "models" / "model.pt"),
        filepath=str(exported),
        use_trace=True,
        input_shape=[1, 2, 32, 48],
    )
    pair = torch.rand(1, 2, 32, 48)
    script = torch.jit.load(exported)
    expected = expected_solution(weights, pair)
    torch.testing.assert_close(script(pair), expected, rtol=1e-4, atol=1e-4)
    assert expected.abs().max() > 0.1


@pytest.mark.parametrize("workflow", ["inference", "train"])
def test_load(workflow: str, package: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # from another folder, without a word on where the bundle lies
    monkeypatch.chdir(tmp_path)
    network = load(package.name, bundle_dir=package.parent, workflow_type=workflow, device="cpu")
    pair = torch.rand(1, 2, 32, 48)
    with torch.no_grad():
        ddf, _ = network.eval().solve(pair[:, :1], pair[:, 1:], max_steps=3, tolerance=0.0)
    torch.testing.assert_close(ddf, expected_solution(weights, pair), rtol=1e-4, atol=1e-4)


def test_large_weights(volume_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("monai_deq.bundle.zoo._LARGEST_FILE", 1000)
    with pytest.raises(ValueError, match="weights_url"):
        write_zoo_package(BUNDLES / "nlst", volume_weights, tmp_path)
    assert not list(tmp_path.iterdir())
    root = write_zoo_package(BUNDLES / "nlst", volume_weights, tmp_path, weights_url="https://example.org/model.pt")
    assert root.name == "nlst_deq_registration" and not (root / "models" / "model.pt").exists()
    (entry,) = json.loads((root / "large_files.yml").read_text())["large_files"]
    assert entry["path"] == "models/model.pt" and entry["url"] == "https://example.org/model.pt"


def test_replaced_when_asked(volume_weights: Path, tmp_path: Path) -> None:
    root = write_zoo_package(BUNDLES / "nlst", volume_weights, tmp_path, name="lungs")
    (root / "mark").touch()
    with pytest.raises(FileExistsError, match="with --overwrite, or"):
        write_zoo_package(BUNDLES / "nlst", volume_weights, tmp_path, name="lungs")
    assert (root / "mark").exists()
    write_zoo_package(BUNDLES / "nlst", volume_weights, tmp_path, name="lungs", overwrite=True)
    assert not (root / "mark").exists() and (root / "configs" / "train.json").exists()


def test_what_is_absent_is_named(weights: Path, volume_weights: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none.*model.pt"):
        write_zoo_package(BUNDLES / "nlst", tmp_path / "none" / "model.pt", tmp_path / "zoo")
    with pytest.raises(FileNotFoundError, match="other.json"):
        write_zoo_package(BUNDLES / "nlst", volume_weights, tmp_path / "zoo", overlays=["other.json"])
    # slices without the configuration of slices
    with pytest.raises(ValueError, match="of a 2-D network, the metadata of a 3-D one"):
        write_zoo_package(BUNDLES / "oasis", weights, tmp_path / "zoo")
    other = tmp_path / "bundle"
    shutil.copytree(BUNDLES / "nlst", other)
    metadata = json.loads((other / "metadata.json").read_text())
    (other / "metadata.json").write_text(json.dumps({**metadata, "version": "9.9.9"}))
    with pytest.raises(ValueError, match="9.9.9 has no entry in the changelog"):
        write_zoo_package(other, volume_weights, tmp_path / "zoo")
    (other / "metadata.json").write_text(json.dumps({k: v for k, v in metadata.items() if k != "authors"}))
    with pytest.raises(ValueError, match="lacks 'authors'"):
        write_zoo_package(other, volume_weights, tmp_path / "zoo")
    assert not (tmp_path / "zoo").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": ""}, "name: expected that of a folder, got ''"),
        ({"name": ".."}, "name: expected that of a folder, got '..'"),
        ({"name": "a/b"}, "name: expected that of a folder, got 'a/b'"),
        ({"weights_url": "banana"}, "weights_url: expected an address that begins with https://"),
    ],
)
def test_names_and_addresses_that_are_none(changes: dict[str, str], words: str, tmp_path: Path) -> None:
    weights = BUNDLES / "oasis" / "models" / "slices" / "model.pt"
    with pytest.raises(ValueError, match=re.escape(words)):
        write_zoo_package(BUNDLES / "oasis", weights, tmp_path / "zoo", overlays=["slices.json"], **changes)
    assert not (tmp_path / "zoo").exists()
