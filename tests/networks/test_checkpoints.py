# SPDX-License-Identifier: Apache-2.0
"""Loading of weights, and what is said about files that are none."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nets import deq_net, tiny_update

from monai_deq.networks import load_checkpoint, load_weights, save_checkpoint
from monai_deq.networks.blocks import RegistrationUNet
from monai_deq.networks.nets import coarse_to_fine


def unet(spatial_dims: int = 2, in_channels: int = 4, **kwargs: Any) -> RegistrationUNet:
    settings = {"encoder_channels": (2, 2), "decoder_channels": (2,), "final_channels": (2,), **kwargs}
    return RegistrationUNet(spatial_dims, in_channels, **settings)


def weights(network: torch.nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in network.parameters()]


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("form", ["state dict", "training checkpoint"])
def test_loads_in_place(tmp_path: Path, spatial_dims: int, form: str) -> None:
    source, network = unet(spatial_dims), unet(spatial_dims)
    assert not all(map(torch.equal, weights(source), weights(network)))
    state: dict[str, Any] = dict(source.state_dict())
    path = tmp_path / "model.pt"
    torch.save(state if form == "state dict" else {"network": state, "epoch": 3}, path)
    assert load_weights(network, str(path)) is network
    assert all(map(torch.equal, weights(source), weights(network)))


class Inside(torch.nn.Module):
    """The network as an attribute of something else, as Lightning's modules have it."""

    def __init__(self, name: str, network: torch.nn.Module) -> None:
        super().__init__()
        setattr(self, name, network)


#: what is around a network when its weights are saved
WRAPPED: dict[str, Callable[[torch.nn.Module], torch.nn.Module]] = {
    "nothing": lambda network: network,
    "data parallel": torch.nn.DataParallel,
    "compiled": torch.compile,
    "compiled in parallel": lambda network: torch.nn.DataParallel(torch.compile(network)),
    "parallel and compiled": lambda network: torch.compile(torch.nn.DataParallel(network)),
    **{f"as {name}": partial(Inside, name) for name in ("network", "net", "model", "registration")},
    "deep inside": lambda network: Inside("method", torch.compile(Inside("network", network))),
}
#: what is around a state dict in the file
FORMS: dict[str, Callable[[Any, torch.optim.Optimizer], Any]] = {
    "alone": lambda state, _: state,
    **{name: partial(lambda name, state, _: {name: state}, name) for name in ("model", "model_state_dict", "network")},
    "with its optimizer": lambda state, optimizer: {
        "epoch": 3,
        "optimizer_state_dict": optimizer.state_dict(),
        "model_state_dict": state,
        "loss": torch.tensor(0.25),
    },
    "Lightning": lambda state, optimizer: {
        "epoch": 3,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": state,
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.5)}},
        "optimizer_states": [optimizer.state_dict()],
        "hyper_parameters": {"rate": 1e-3},
    },
    "nested": lambda state, optimizer: {"run": {"best": {"weights": state}, "optimizer": optimizer.state_dict()}},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("wrap", WRAPPED)
@pytest.mark.parametrize("without", [None, "coarse."])
def test_habits_of_others(tmp_path: Path, wrap: str, form: str, without: str | None) -> None:
    def net(seed: int) -> torch.nn.Module:
        network = coarse_to_fine(deq_net(tiny_update(2), spatial_dims=2), 2)
        torch.manual_seed(seed)
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter)
        return network

    source, network = net(1), net(2)
    optimizer = torch.optim.Adam(source.parameters())
    for parameter in source.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    torch.save(FORMS[form](WRAPPED[wrap](source).state_dict(), optimizer), tmp_path / "model.pt")
    kept = {k: v.clone() for k, v in network.state_dict().items() if without and k.startswith(without)}
    assert load_weights(network, tmp_path / "model.pt", without) is network
    expected = {**source.state_dict(), **kept}
    state = network.state_dict()
    assert state.keys() == expected.keys() and all(torch.equal(state[k], v) for k, v in expected.items())
    assert bool(kept) == bool(without)


def test_a_prefix_of_some_names_is_none_of_all(tmp_path: Path) -> None:
    # the coarser network of two sizes is no network of one, though its names fit when the rest is passed over
    two = coarse_to_fine(deq_net(tiny_update(2), spatial_dims=2), 2)
    torch.save({"state_dict": {f"net.{k}": v for k, v in two.state_dict().items()}}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"model.pt is .* weights under 'state_dict' 10 unexpected \(coarse\.update"):
        load_weights(deq_net(tiny_update(2), spatial_dims=2), tmp_path / "model.pt")
    # nor is one of two that lie side by side taken for the other
    both = {f"{name}.{k}": v for name in ("student", "teacher") for k, v in unet().state_dict().items()}
    torch.save(both, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"10 missing .* 20 unexpected \(student\.encoder"):
        load_weights(unet(), tmp_path / "model.pt")


def test_several_that_fit(tmp_path: Path) -> None:
    first, second = unet(), unet()
    path = tmp_path / "model.pt"
    # as our trainings write it
    torch.save({"averaged": first.state_dict(), "network": second.state_dict()}, path)
    assert all(map(torch.equal, weights(load_weights(unet(), path)), weights(second)))
    torch.save({"model": first.state_dict(), "ema": {"module": second.state_dict()}}, path)
    with pytest.raises(ValueError, match=r"several networks that fit, under 'model', 'ema.module': save"):
        load_weights(unet(), path)
    # one of another size is in nobody's way
    torch.save({"generator": unet(3).state_dict(), "critic": second.state_dict()}, path)
    assert all(map(torch.equal, weights(load_weights(unet(), path)), weights(second)))


def test_leaves_weights_as_they_are(tmp_path: Path) -> None:
    source, network = unet(), unet()
    prefix = next(iter(source.state_dict())).split(".")[0] + "."
    before, own = source.state_dict(), {k: v.clone() for k, v in network.state_dict().items()}
    for name, state in {
        "with them": before,
        "without them": {k: v for k, v in before.items() if not k.startswith(prefix)},
    }.items():
        torch.save(state, tmp_path / "model.pt")
        load_weights(network, tmp_path / "model.pt", without=prefix)
        kept = {k: torch.equal(v, own[k]) for k, v in network.state_dict().items() if k.startswith(prefix)}
        assert kept and all(kept.values()), name
        assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items() if k not in kept), name
    torch.save({next(iter(before)): torch.zeros(2)}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="missing"):
        load_weights(network, tmp_path / "model.pt", without=prefix)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        # the same names, another number of kernel axes and of outputs
        (unet(3), [r"expected \(2, 4, 3, 3\), got \(2, 4, 3, 3, 3\)", "6 of another shape", "2-D or 3-D"]),
        (unet(2, 5), [r"expected \(2, 4, 3, 3\), got \(2, 5, 3, 3\)", "1 of another shape"]),
        (unet(final_channels=(2, 2)), [r"2 unexpected \(final.1.conv.weight, ...\)"]),
        (unet(final_channels=()), [r"2 missing \(final.0.conv.weight, ...\)"]),
        (torch.nn.Linear(2, 2), ["10 missing", "2 unexpected"]),
    ],
)
def test_another_architecture(tmp_path: Path, source: torch.nn.Module, words: list[str]) -> None:
    path = tmp_path / "model.pt"
    torch.save(source.state_dict(), path)
    network = unet()
    before = weights(network)
    with pytest.raises(ValueError, match="is of another architecture than RegistrationUNet") as error:
        load_weights(network, path)
    error.match("model.pt")
    for word in words:
        error.match(word)
    assert all(map(torch.equal, weights(network), before))  # not half loaded


def test_absent_file(tmp_path: Path) -> None:
    for path in (tmp_path / "model.pt", tmp_path):
        with pytest.raises(FileNotFoundError, match=f"no checkpoint at {path}.*ckpt_path"):
            load_weights(unet(), path)


@pytest.mark.parametrize("kind", ["empty", "truncated", "text", "code"])
def test_not_a_checkpoint(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "model.pt"
    if kind == "code":  # a pickle that would run something
        torch.save(unet(), path)
    else:
        torch.save(unet().state_dict(), path)
        content = path.read_bytes()
        path.write_bytes({"empty": b"", "truncated": content[: len(content) // 2], "text": b"epoch,loss\n"}[kind])
    with pytest.raises(ValueError, match=r"model\.pt is not a readable checkpoint") as error:
        load_checkpoint(path)
    assert "\n" not in str(error.value)


def test_not_a_dictionary(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save([torch.zeros(2)], path)
    with pytest.raises(ValueError, match=r"model\.pt holds a list, expected a dictionary of weights"):
        load_weights(unet(), path)


@pytest.mark.parametrize(
    ("content", "got"),
    [({"network": 3}, "'network'"), ({}, "an empty one"), ({"state_dict": {}, "epoch": 3}, "'state_dict', 'epoch'")],
)
def test_no_weights(tmp_path: Path, content: Any, got: str) -> None:
    path = tmp_path / "model.pt"
    torch.save(content, path)
    with pytest.raises(ValueError, match=rf"model\.pt holds no weights: expected a dictionary of tensors.*got {got}\."):
        load_weights(unet(), path)


def test_equal_content_makes_equal_bytes(tmp_path: Path) -> None:
    content = {"network": torch.nn.Conv2d(2, 3, 3).state_dict(), "epoch": 3}
    save_checkpoint(content, tmp_path / "a.pt")
    save_checkpoint(content, tmp_path / "folder" / "b.pt")
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "folder" / "b.pt").read_bytes()
    assert [p.name for p in tmp_path.iterdir()] != [] and not list(tmp_path.rglob(".*"))


def test_a_flipped_bit_is_refused_or_harmless(tmp_path: Path) -> None:
    content = torch.nn.Conv2d(3, 8, 3).state_dict()
    file = tmp_path / "model.pt"
    save_checkpoint(content, file)
    whole, refused = file.read_bytes(), 0
    rng = np.random.default_rng(0)
    for bit in rng.choice(8 * len(whole), 100, replace=False):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        file.write_bytes(damaged)
        try:
            loaded = load_checkpoint(file)
        except ValueError as e:
            assert str(file) in str(e)
            refused += 1
        else:
            assert loaded.keys() == content.keys() and all(torch.equal(loaded[k], v) for k, v in content.items())
    assert refused > 50


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(tmp_path: Path, value: float) -> None:
    network = torch.nn.Conv2d(1, 2, 3)
    state = {k: v.clone() for k, v in network.state_dict().items()}
    state["weight"][1, 0, 2, 2] = value
    save_checkpoint(state, tmp_path / "model.pt")
    before = network.weight.detach().clone()
    with pytest.raises(ValueError, match=r"model.pt has weights that are not finite.*: weight\. Take an earlier"):
        load_weights(network, tmp_path / "model.pt")
    assert torch.equal(network.weight, before)


@pytest.mark.parametrize(
    ("value", "got"),
    [
        (None, "a NoneType"),
        ([[1.0]], "a list"),
        ("banana", "a str"),
        (torch.zeros(2, 1, 3, 3) * 1j, "complex (2, 1, 3, 3)"),
    ],
)
def test_weights_that_are_no_real_numbers(tmp_path: Path, value: Any, got: str) -> None:
    network = torch.nn.Conv2d(1, 2, 3)
    torch.save({**network.state_dict(), "weight": value}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=rf"model.pt is of another .*weight: expected .*, got {re.escape(got)}"):
        load_weights(network, tmp_path / "model.pt")
