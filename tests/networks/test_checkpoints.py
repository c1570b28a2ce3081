# SPDX-License-Identifier: Apache-2.0
"""Loading of weights, and what is said about files that are none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from monai_deq.networks import load_checkpoint, load_weights
from monai_deq.networks.blocks import RegistrationUNet


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
    torch.save({}, tmp_path / "model.pt")
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
    with pytest.raises(ValueError, match=r"model\.pt is not a readable checkpoint"):
        load_checkpoint(path)


def test_not_a_dictionary(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save([torch.zeros(2)], path)
    with pytest.raises(ValueError, match=r"model\.pt holds a list, expected a dictionary of weights"):
        load_weights(unet(), path)
    torch.save({"network": 3}, path)
    with pytest.raises(ValueError, match=r'model\.pt holds a int under "network"'):
        load_weights(unet(), path)
