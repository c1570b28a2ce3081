# SPDX-License-Identifier: Apache-2.0
"""Networks are described and built again; what is none is refused; records of version 0.1.0 give the same networks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.losses import GlobalMutualInformationLoss, LocalNormalizedCrossCorrelationLoss
from nets import Pull, deq_net, pair, tiny_update

from monai_deq.networks import (
    NetworkRecord,
    build_component,
    compile_backbones,
    describe,
    load_network,
    on_device,
    read_record,
)
from monai_deq.networks.blocks import (
    GradientUpdate,
    RecurrentUpdate,
    RegistrationCNN,
    RegistrationUNet,
    UNetUpdate,
    VoxelMorphUpdate,
)
from monai_deq.networks.nets import (
    DEQRegistrationNet,
    GradientSettings,
    RegistrationNet,
    RestSettings,
    UnrolledRegistrationNet,
    coarse_to_fine,
    gradirn_net,
    riir_net,
    unrolling_net,
    voxelmorph_net,
)
from monai_deq.solvers import SolverSettings

SIZE = (16, 12)
NETWORKS: dict[str, Callable[[], RegistrationNet]] = {
    "DEQReg": lambda: DEQRegistrationNet(spatial_dims=2, gradient=GradientSettings(num_states=0)),
    "coarse to fine": lambda: coarse_to_fine(
        deq_net(
            UNetUpdate(2, RegistrationUNet(2, 4, None, (4, 3), (3,), (2,)), "bfloat16"),
            solver="anderson",
            solver_options={"window": 2},
            max_steps=7,
            tolerance=0.01,
            phantom_steps=3,
            phantom_damping=0.5,
            num_states=2,
            relaxation=0.4,
            proximal_weight=0.2,
        ),
        3,
        5,
    ),
    "checkpointed": lambda: deq_net(UNetUpdate(2, checkpoint_parts=3), checkpointed=True, gradient="implicit"),
    "VoxelMorph": lambda: voxelmorph_net(2, 2),
    "Unrolling": lambda: unrolling_net(2, 2, 2),
    "GraDIRN": lambda: gradirn_net(
        2, 1, 2, LocalNormalizedCrossCorrelationLoss(spatial_dims=2, kernel_size=5), autocast_dtype="bfloat16"
    ),
    "RIIR": lambda: riir_net(2, 2, GlobalMutualInformationLoss(num_bins=7)),
    "own sizes": lambda: UnrolledRegistrationNet(
        [
            UNetUpdate(2, RegistrationCNN(2, 4, channels=(3, 2))),
            GradientUpdate(2, torch.nn.SmoothL1Loss(beta=0.3), 0.2, RegistrationCNN(2, 4, channels=(5,))),
            VoxelMorphUpdate(2),
        ],
        steps=(1, 2, 1),
    ),
    "recurrent": lambda: deq_net(RecurrentUpdate(2, hidden_size=3), max_steps=3, num_states=0),
}


def targets(description: Any) -> set[str]:
    """All classes that a description names."""
    if isinstance(description, dict):
        own = {description["_target_"]} if "_target_" in description else set()
        return own.union(*map(targets, description.values()))
    return set().union(*map(targets, description)) if isinstance(description, list) else set()


def layers(network: torch.nn.Module) -> dict[str, str]:
    """All modules by name, in no order."""
    modules = network.named_modules(remove_duplicate=False)
    return {name: str(module) if not list(module.children()) else "" for name, module in modules}


def seen_weights(network: torch.nn.Module, seed: int = 1) -> torch.nn.Module:
    """Weights that make a displacement, other ones for each seed."""
    torch.manual_seed(seed)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.08)
    return network


def save(network: torch.nn.Module, folder: Path, record: Any, name: str = "model.pt") -> Path:
    """Weights, and beside them what is given as a record."""
    torch.save(network.state_dict(), folder / name)
    if isinstance(record, NetworkRecord):
        record.write(folder / "model.json")
    else:
        (folder / "model.json").write_text(json.dumps(record))
    return folder / name


# --- descriptions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
def test_round_trip(name: str, training: bool) -> None:
    network = seen_weights(NETWORKS[name]()).train(training)
    description = json.loads(json.dumps(describe(network), allow_nan=False))
    again = build_component(description)
    assert type(again) is type(network) and layers(again) == layers(network)
    assert describe(again) == describe(network) == description
    for kind in ("solver", "gradient", "rest"):
        assert getattr(again, kind, None) == getattr(network, kind, None)
    again.load_state_dict(network.state_dict())
    images = pair(SIZE)
    with torch.no_grad():
        expected, got = (net.eval()(*images)[1] for net in (network, again))
    assert expected.abs().max() > 1e-3 and torch.equal(got, expected)


def test_description_by_hand() -> None:
    network = deq_net(
        UNetUpdate(2, RegistrationCNN(2, 4, channels=(3,))), max_steps=7, num_states=2, relaxation=0.5, tolerance=0.0
    )
    assert describe(network) == {
        "_target_": "monai_deq.networks.nets.DEQRegistrationNet",
        "update": {
            "_target_": "monai_deq.networks.blocks.UNetUpdate",
            "spatial_dims": 2,
            "backbone": {
                "_target_": "monai_deq.networks.blocks.RegistrationCNN",
                "spatial_dims": 2,
                "in_channels": 4,
                "out_channels": 2,
                "channels": [3],
            },
            "autocast_dtype": None,
        },
        "solver": {
            "_target_": "monai_deq.solvers.SolverSettings",
            "name": "plain",
            "max_steps": 7,
            "tolerance": 0.0,
            "relative_tolerance": 0.0,
            "options": None,
        },
        "gradient": {
            "_target_": "monai_deq.networks.nets.GradientSettings",
            "kind": "phantom",
            "steps": 2,
            "damping": 1.0,
            "num_states": 2,
            "checkpointed": False,
            "implicit_max_steps": 48,
            "implicit_tolerance": 1e-4,
        },
        "rest": {
            "_target_": "monai_deq.networks.nets.RestSettings",
            "relaxation": 0.5,
            "proximal_weight": 0.0,
            "contraction_weight": 0.0,
            "contraction_along_step": 0.5,
            "pool_slots": 32,
            "pool_renewal": 1.0,
            "random_start_share": 0.0,
            "random_start_rms": 3.0,
            "enabled": True,
        },
        "coarse": None,
    }


def test_foreign_similarity() -> None:
    similarity = LocalNormalizedCrossCorrelationLoss(spatial_dims=2, kernel_size=5, smooth_dr=1e-3)
    description = describe(similarity)
    assert description == {
        "_target_": "monai.losses.LocalNormalizedCrossCorrelationLoss",
        "spatial_dims": 2,
        "kernel_size": 5,
        "reduction": "mean",
        "smooth_nr": 0.0,
        "smooth_dr": 1e-3,
    }
    warped, fixed = pair((9, 8))
    assert torch.equal(build_component(description)(warped, fixed), similarity(warped, fixed))


def test_what_does_not_change_the_description() -> None:
    # a mode, a compilation, a device, and what is learned
    net = deq_net(UNetUpdate(2, torch.nn.Conv2d(4, 2, 3, padding=1)), max_steps=2, num_states=0)
    description = describe(net)
    assert targets(description) >= {"torch.nn.Conv2d", "monai_deq.networks.blocks.UNetUpdate"}
    compile_backbones(seen_weights(net))
    assert describe(net) == describe(net.eval()) == describe(on_device(net, "meta")) == description
    counting, fresh = torch.nn.BatchNorm2d(3), torch.nn.BatchNorm2d(3)
    counting(torch.rand(2, 3, 4, 5))
    assert not torch.equal(counting.running_mean, fresh.running_mean) and describe(counting) == describe(fresh)


class Own(torch.nn.Module):
    """Keeps one of its arguments under another name."""

    def __init__(self, kept: int, lost: int = 3, function: Any = None) -> None:
        super().__init__()
        self.kept, self.number, self.function = kept, lost, function


def test_what_cannot_be_described() -> None:
    with pytest.raises(ValueError, match="Sequential cannot be built again from its attributes"):
        describe(UNetUpdate(2, torch.nn.Sequential(torch.nn.Conv2d(4, 2, 3, padding=1))))
    # of the triangular kernel nothing is kept but the kernel
    with pytest.raises(ValueError, match="LocalNormalizedCrossCorrelationLoss cannot be built again from its attri"):
        describe(LocalNormalizedCrossCorrelationLoss(spatial_dims=2, kernel_size=5, kernel_type="triangular"))
    with pytest.raises(ValueError, match="VoxelMorphUNet does not keep its argument 'spatial_dims' as an attribute"):
        describe(VoxelMorphUpdate(2).backbone)
    with pytest.raises(ValueError, match=r"the record names '.*Pull': expected a network or its settings from monai_d"):
        describe(deq_net(Pull()))
    with pytest.raises(TypeError, match="JSON knows no function"):
        describe(Own(1, function=lambda x: x))


@pytest.mark.parametrize("wrap", [lambda d: d, lambda d: {"a": [1, {"b": d}]}, lambda d: [d]])
@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "subprocess.Popen",
        "builtins.eval",
        "nets.Pull",
        "monai_deqq.networks.nets.DEQRegistrationNet",
        "torch.load",  # functions
        "torch.hub.load",
        "monai.bundle.run",
        "monai_deq.networks.load_network",
        "monai_deq.networks",  # a module
        "monai_deq.data.PairDataset",  # neither network nor settings
        "torch.optim.AdamW",
        "monai_deq.networks.nets.Absent",
        "",
        None,
        3,
    ],
)
def test_only_networks_and_their_settings_are_built(target: Any, wrap: Callable[[Any], Any]) -> None:
    with pytest.raises(ValueError, match="expected a network or its settings from monai_deq, monai, torch") as error:
        build_component(wrap({"_target_": target, "cmd": "false"}))
    error.match(f"the record names {target!r}")


def test_arguments_are_refused_before_anything_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[int] = []
    monkeypatch.setattr(torch.nn.Conv2d, "__init__", lambda self, *_, **__: built.append(1))
    outer = {"_target_": "torch.nn.Conv2d", "in_channels": {"_target_": "os.system"}}
    with pytest.raises(ValueError, match="the record names 'os.system'"):
        build_component(outer)
    assert not built


@pytest.mark.parametrize("text", ["$import os", "@network", "%train.json", "$", "@", "%"])
def test_expressions_are_refused(text: str) -> None:
    for description in (text, [text], {"a": text}, {"_target_": "torch.nn.Identity", "a": [text]}):
        with pytest.raises(ValueError, match="the record has the expression .*expected plain values") as error:
            build_component(description)
        assert repr(text) in str(error.value)


def test_plain_values() -> None:
    content = {"a": [1, 2.5, None, True, "plain", [{"b": "5 % of $ 3 @ home"}]]}
    assert build_component(content) == describe(content) == content
    assert describe(range(2, 5)) == [2, 3, 4] and describe((1, Path("a/b"))) == [1, "a/b"]
    assert build_component(describe(SolverSettings("anderson", 5, options={"window": 3}))) == SolverSettings(
        "anderson", 5, options={"window": 3}
    )


# --- records ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["coarse to fine", "RIIR"])
def test_load_network(tmp_path: Path, name: str) -> None:
    network = seen_weights(NETWORKS[name]()).eval()
    record = NetworkRecord(
        describe(network), name, [160, 192], 3, {"window": [-1000, 500]}, {"training_pairs": 12, "epoch": 2}
    )
    path = save(network, tmp_path, record)
    assert read_record(path) == read_record(str(path)) == record
    loaded = load_network(path, autocast_dtype="bfloat16" if name == "coarse to fine" else None)
    assert not any(module.training for module in loaded.modules())
    assert loaded.solver == network.solver.changed(max_steps=3)
    level = getattr(loaded, "coarse", None)
    while level is not None:
        # of another solver, whose options the record has none of
        assert (level.solver.name, level.solver.tolerance, level.solver.max_steps) == ("plain", 2e-4, 5)
        level = level.coarse
    images = pair(SIZE)
    for module in (network, network.coarse, getattr(network.coarse, "coarse", None)):
        if isinstance(module, DEQRegistrationNet) and module is not network:
            module.solver = SolverSettings("plain", 5, 2e-4)
    torch.testing.assert_close(loaded(*images)[1], network(*images, max_steps=3)[1], rtol=0, atol=0)


def test_build_takes_solver_and_precision() -> None:
    network = coarse_to_fine(deq_net(tiny_update(2), solver="anderson", max_steps=6, num_states=0), 2, 5)
    record = NetworkRecord(describe(network), steps=9)
    built = record.build()
    assert built.solver.max_steps == 9 and built.coarse.solver == SolverSettings("plain", 5, 2e-4)
    assert built.update.autocast_dtype is built.coarse.update.autocast_dtype is None and not built.training
    built = record.build(coarse_solver=None, coarse_tolerance=None, autocast_dtype="float16")
    assert built.coarse.solver == network.coarse.solver
    assert built.update.autocast_dtype == built.coarse.update.autocast_dtype == "float16"
    # what it was trained in is not what it is used in
    half = NetworkRecord(describe(riir_net(2, autocast_dtype="bfloat16")), steps=2)
    assert half.build().update.autocast_dtype is None
    with pytest.raises(ValueError, match="there is no record of the network: name a checkpoint .*network_def"):
        NetworkRecord().build()
    for other in (torch.nn.Identity(), SolverSettings()):
        with pytest.raises(ValueError, match=f"describes a {type(other).__name__}, expected a registration network"):
            NetworkRecord(describe(other)).build()


def test_without_a_checkpoint() -> None:
    record = read_record(None)
    assert record == NetworkRecord() and (record.network, record.method, record.steps) == (None, "DEQReg", 48)
    assert (record.spatial_size, record.preprocessing, record.training) == (None, {}, {})


def test_file_of_a_record(tmp_path: Path) -> None:
    record = NetworkRecord(
        None, "own", [8, 6], 5, training={"loss": float("nan"), "folder": Path("a"), "rates": torch.ones(2)}
    )
    path = tmp_path / "deep" / "model.json"
    record.write(path)
    text = path.read_text()
    assert json.loads(text) == {
        "network": None,
        "method": "own",
        "spatial_size": [8, 6],
        "steps": 5,
        "preprocessing": {},
        "training": {"loss": None, "folder": "a", "rates": [1.0, 1.0]},
    }
    # sizes on one line, and the file alone
    assert '"spatial_size": [ 8, 6 ],\n' in text and text.endswith("}\n")
    assert [p.name for p in path.parent.iterdir()] == ["model.json"]


def test_what_a_later_version_adds_is_passed_over(tmp_path: Path) -> None:
    path = save(tiny_update(2), tmp_path, {"network": None, "steps": 7, "new": 3})
    assert read_record(path) == NetworkRecord(steps=7)


@pytest.mark.parametrize("name", NETWORKS)
def test_for_images_of_other_dimensions(tmp_path: Path, name: str) -> None:
    path = save(tiny_update(2), tmp_path, NetworkRecord(describe(NETWORKS[name]())))
    assert read_record(path, 2) == read_record(path, None) == read_record(path)
    with pytest.raises(ValueError, match=r"model\.pt is of a 2-D network, spatial_dims is 3: use the configuration it"):
        read_record(path, 3)
    save(tiny_update(2), tmp_path, {"network": None})
    assert read_record(path, 3).network is None


def test_record_of_the_last_epoch(tmp_path: Path) -> None:
    network = deq_net(tiny_update(2), max_steps=2, num_states=0)
    path = save(network, tmp_path, NetworkRecord(describe(network), steps=7), "last.pt")
    assert read_record(path).steps == 7 and load_network(path).solver.max_steps == 7
    NetworkRecord(describe(network), steps=8).write(tmp_path / "last.json")
    assert read_record(path).steps == 8
    # of that one alone
    (tmp_path / "renamed.pt").write_bytes(path.read_bytes())
    with pytest.raises(FileNotFoundError, match=r"no record at .*renamed\.json beside .*renamed\.pt: .*network_def"):
        read_record(tmp_path / "renamed.pt")


def test_missing_files(tmp_path: Path) -> None:
    for path in (tmp_path / "model.pt", tmp_path):
        for read in (read_record, load_network):
            with pytest.raises(FileNotFoundError, match=f"no checkpoint at {path}: train first, or name a trained one"):
                read(path)
    torch.save({}, tmp_path / "model.pt")
    with pytest.raises(FileNotFoundError, match=r"no record at .*model\.json beside .*model\.pt: restore it"):
        load_network(tmp_path / "model.pt")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"network": 4', r"model\.json is not valid JSON \(.*\): restore it"),
        ("", "is not valid JSON"),
        ("[1]", r"model\.json holds no record of a network"),
        ("3", "holds no record of a network"),
        ('{"network": [1]}', "holds no record of a network"),
        ('{"network": "$import os"}', "holds no record of a network"),
    ],
)
def test_damaged_record(tmp_path: Path, content: str, words: str) -> None:
    torch.save({}, tmp_path / "model.pt")
    (tmp_path / "model.json").write_text(content)
    for read in (read_record, load_network):
        with pytest.raises(ValueError, match=words):
            read(tmp_path / "model.pt")


def test_weights_of_another_network(tmp_path: Path) -> None:
    network = deq_net(tiny_update(2), max_steps=2, num_states=0)
    path = save(voxelmorph_net(2), tmp_path, NetworkRecord(describe(network)))
    with pytest.raises(ValueError, match=r"model\.pt is of another architecture than DEQRegistrationNet"):
        load_network(path)
    path.write_bytes(b"half of a check")
    with pytest.raises(ValueError, match=r"model\.pt is not a readable checkpoint"):
        load_network(path)


# --- records of version 0.1.0 -----------------------------------------------------------------------------------------

#: what the bundles of version 0.1.0 wrote for slices
OLD = {
    "method": "DEQReg",
    "spatial_dims": 2,
    "spatial_size": None,
    "max_steps": 4,
    "val_steps": 6,
    "num_states": 0,
    "gamma": 0.5,
    "phantom_steps": 2,
    "phantom_damping": 1.0,
    "gradient": "phantom",
    "relaxation": 1.0,
    "proximal_weight": 0.0,
    "unwarped_moving": False,
    "coarser_levels": 0,
    "coarse_steps": 96,
    "tolerance": 0.001,
    "smoothness_weight": 1.0,
    "learning_rate": 0.0005,
    "batch_size": 2,
    "accumulation_steps": 1,
    "world_size": 1,
    "ema_momentum": None,
    "residual_weight": 0.0,
    "jacobian_weight": 0.0,
    "contraction_weight": 0.0,
    "contraction_along_step": 0.5,
    "agreement_weight": 0.0,
    "penalty_warmup": 0,
    "pool_slots": 32,
    "pool_starts": 1,
    "pool_renewal": 1.0,
    "random_start_share": 0.0,
    "random_start_rms": 3.0,
    "random_steps": None,
    "use_checkpoint": False,
    "checkpoint_parts": 0,
    "method_settings": {},
    "training_pairs": 12,
    "epoch": 2,
}
POOL = {
    "relaxation": 0.5,
    "proximal_weight": 0.1,
    "contraction_weight": 0.02,
    "contraction_along_step": 0.25,
    "pool_slots": 16,
    "pool_renewal": 0.2,
    "random_start_share": 0.3,
    "random_start_rms": 5.0,
}


def deq(max_steps: int, rest: RestSettings | None = None, **gradient: Any) -> DEQRegistrationNet:
    return DEQRegistrationNet(
        UNetUpdate(2), solver=SolverSettings(max_steps=max_steps), gradient=GradientSettings(**gradient), rest=rest
    )


def coarse_deq() -> DEQRegistrationNet:
    network = deq(4, RestSettings(**POOL), num_states=0, steps=4)
    for _ in range(2):
        coarse = deq(96, RestSettings(**POOL), num_states=0, steps=4)
        finest = network
        while finest.coarse is not None:
            finest = finest.coarse
        finest.coarse = coarse
    return network


@pytest.mark.parametrize(
    ("settings", "by_hand"),
    [
        (
            {"method": "VoxelMorph", "max_steps": 1, "val_steps": 1},
            lambda: UnrolledRegistrationNet(VoxelMorphUpdate(2), steps=1),
        ),
        (
            {"method": "VoxelMorph", "max_steps": 1, "val_steps": 1, "method_settings": {"integration_steps": 5}},
            lambda: UnrolledRegistrationNet(VoxelMorphUpdate(2, 5), steps=1),
        ),
        (
            {"method": "Unrolling", "max_steps": 2, "val_steps": 2, "method_settings": {"num_levels": 2}},
            lambda: UnrolledRegistrationNet([UNetUpdate(2, RegistrationCNN(2, 4)) for _ in range(2)], steps=[2, 2]),
        ),
        (
            {"method": "GraDIRN", "max_steps": 1, "val_steps": 3, "method_settings": {"num_levels": 2}},
            lambda: UnrolledRegistrationNet([GradientUpdate(2) for _ in range(2)], steps=[1, 1]),
        ),
        (
            {"method": "GraDIRN", "max_steps": 1},
            lambda: UnrolledRegistrationNet([GradientUpdate(2) for _ in range(3)], steps=[1, 1, 1]),
        ),
        (
            {"method": "RIIR", "max_steps": 3, "val_steps": 3, "gamma": [0.1, 0.3]},
            lambda: UnrolledRegistrationNet(RecurrentUpdate(2), steps=3, all_states=True),
        ),
        ({"num_states": 3, "tolerance": 0.001}, lambda: deq(4, num_states=3)),
        (
            {"method": "DEQReg-12", "gradient": "implicit", "phantom_steps": 3, "phantom_damping": 0.5},
            lambda: deq(4, num_states=0, kind="implicit", steps=3, damping=0.5),
        ),
        ({"method": "DEQReg-pool", **POOL}, lambda: deq(4, RestSettings(**POOL), num_states=0)),
        ({"method": "DEQReg-pool", **POOL, "phantom_steps": 4, "coarser_levels": 2}, coarse_deq),
    ],
)
def test_old_record_gives_the_same_network(
    tmp_path: Path, settings: dict[str, Any], by_hand: Callable[[], RegistrationNet]
) -> None:
    settings = {**OLD, **settings}
    network = seen_weights(by_hand()).eval()
    path = save(network, tmp_path, settings)
    record = read_record(path)
    assert (record.method, record.steps) == (settings["method"], settings["val_steps"])
    assert record.training == {
        "smoothness_weight": 1.0,
        "learning_rate": 0.0005,
        "batch_size": 2,
        "training_pairs": 12,
        "epoch": 2,
    }
    built = build_component(record.network)
    assert type(built) is type(network) and layers(built) == layers(network)
    # but for how rest was asked for
    for kind in ("steps", "all_states", "solver", "gradient", "proximal_weight"):
        assert getattr(built, kind, None) == getattr(network, kind, None), kind
    if "rest" in vars(network):
        for name in POOL:
            assert getattr(built.rest, name) == getattr(network.rest, name), name
    loaded = load_network(path, coarse_solver=None, coarse_tolerance=None)
    assert loaded.solver.max_steps == settings["val_steps"]
    for (name, value), (other, expected) in zip(loaded.state_dict().items(), network.state_dict().items(), strict=True):
        assert name == other and torch.equal(value, expected)
    images = pair((16, 32), batch=1)
    expected = network(*images, max_steps=settings["val_steps"])[1]
    assert expected.abs().max() > 1e-3 and torch.equal(loaded(*images)[1], expected)


def test_old_record_of_least_words(tmp_path: Path) -> None:
    network = DEQRegistrationNet(solver=SolverSettings(max_steps=9), gradient=GradientSettings(num_states=0))
    record = read_record(save(network, tmp_path, {"max_steps": 9}))
    assert (record.method, record.steps, record.spatial_size, record.preprocessing) == ("DEQReg", 9, None, {})
    assert build_component(record.network).rest.relaxation == 1 and record.training == {}
    assert layers(build_component(record.network)) == layers(network)


def test_preprocessing_of_an_old_record(tmp_path: Path) -> None:
    settings = {**OLD, "spatial_size": [24, 16, 32], "window": [-1000, 500], "spatial_dims": 3}
    record = read_record(save(tiny_update(2), tmp_path, settings))
    assert record.spatial_size == [24, 16, 32] and record.preprocessing == {"window": [-1000, 500]}
    assert build_component(record.network).update.spatial_dims == 3
    with pytest.raises(ValueError, match="of a 3-D network, spatial_dims is 2"):
        read_record(tmp_path / "model.pt", 2)


def test_reading_an_old_record_draws_no_random_numbers(tmp_path: Path) -> None:
    path = save(tiny_update(2), tmp_path, OLD)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    read_record(path)
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize("given", [True, "true"])
def test_old_record_with_the_unwarped_image(tmp_path: Path, given: Any) -> None:
    path = save(tiny_update(2), tmp_path, {**OLD, "unwarped_moving": given})
    with pytest.raises(ValueError, match="weights trained with unwarped_moving need version 0.1.0: the option is no"):
        read_record(path)
    save(tiny_update(2), tmp_path, {**OLD, "unwarped_moving": "false"})
    assert read_record(path).method == "DEQReg"


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": "banana"},
        {"steps": 0},
        {"steps": True},
        {"spatial_size": 16},
        {"spatial_size": [16, "16"]},
        {"spatial_size": []},
        {"method": None},
        {"training": []},
        {"preprocessing": []},
        {"preprocessing": {"window": [400, -1200]}},
        {"preprocessing": {"window": "wide"}},
        {"preprocessing": {"orientation": "RAS"}},
        {"preprocessing": {"orientation": "RL"}},
        {"preprocessing": {"windows": [-1200, 400]}},
    ],
)
def test_fields_that_no_record_has(changes: dict[str, Any], tmp_path: Path) -> None:
    content = {"network": {"spatial_dims": 2}, **changes}
    (tmp_path / "model.pt").touch()
    (tmp_path / "model.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"model\.json: no record has the {next(iter(changes))} .*: restore it"):
        read_record(tmp_path / "model.pt")


def test_a_network_that_cannot_be_built_names_the_file(tmp_path: Path) -> None:
    network = describe(DEQRegistrationNet(spatial_dims=2))
    (tmp_path / "model.pt").touch()
    for changes in (
        {"solver": 3},
        {"gradient": {**network["gradient"], "steps": []}},
        {"update": "banana"},
        {"rest": ""},
    ):
        NetworkRecord(network={**network, **changes}).write(tmp_path / "model.json")
        with pytest.raises(ValueError, match=r"model\.json describes no network: "):
            read_record(tmp_path / "model.pt").build()
    assert read_record(tmp_path / "model.pt") == NetworkRecord(network={**network, "rest": ""})  # wherever it lies
