# SPDX-License-Identifier: Apache-2.0
"""Checkpoint files and the weights in them."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from monai_deq.utils import replace_file

__all__ = ["load_checkpoint", "load_weights", "save_checkpoint"]


def save_checkpoint(content: Mapping[str, Any], path: str | Path) -> None:
    """
    Write a checkpoint file, whole or not at all. Equal content makes equal bytes; each part has its checksum, which
    :py:func:`load_checkpoint` compares.
    """
    with replace_file(path) as temporary, open(temporary, "wb") as file:
        torch.save(content, file)  # of a path PyTorch would write the name into the file, here the temporary one


def load_checkpoint(path: str | Path, map_location: torch.device | str = "cpu") -> Mapping[str, Any]:
    """Read a checkpoint file, weights only, with its tensors on a device, by default the CPU.

    Raises:
        FileNotFoundError: When there is no such file.
        ValueError: When the file is not a checkpoint, or not a whole and undamaged one.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}: train first, or name a trained one (ckpt_path).")
    try:
        if zipfile.is_zipfile(path):  # PyTorch writes the checksums of its parts, and does not compare them
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged is not None:
                raise zipfile.BadZipFile(f"the checksum of {damaged} does not fit; restore it from a copy")
        checkpoint = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as e:
        said = " ".join(str(e).split())[:200]
        raise ValueError(f"{path} is not a readable checkpoint ({type(e).__name__}: {said}).") from e
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"{path} holds a {type(checkpoint).__name__}, expected a dictionary of weights.")
    return checkpoint


def load_weights(network: nn.Module, path: str | Path, without: str | None = None) -> nn.Module:
    """Load the weights of a network in place, and return the network.

    Args:
        network: the network.
        path: checkpoint file: a state dict, or dictionaries nested in each other with a state dict in them. What all
            names begin with, such as ``"module."`` of ``DistributedDataParallel``, ``"_orig_mod."`` of
            ``torch.compile`` or the name of an attribute, is left out where the others then fit. Of several that fit,
            as in the checkpoint of a training, it is the one under ``"network"``.
        without: weights whose names begin with it, such as ``"coarse."``, stay as they are. Defaults to none.

    Raises:
        FileNotFoundError: When there is no such file.
        ValueError: When the file is not a checkpoint, is one of another architecture, has several that fit, or weights
            that are not finite.
    """
    checkpoint = load_checkpoint(path)
    own = {k: v for k, v in network.state_dict().items() if not (without and k.startswith(without))}
    tried = []
    for name, saved in _states(checkpoint):
        for short in _without_prefix(saved):
            state = {k: v for k, v in short.items() if not (without and k.startswith(without))}
            tried.append((name, state, _differences(own, state)))
    if not tried:
        got = ", ".join(repr(k) for k in list(checkpoint)[:5]) or "an empty one"
        raise ValueError(f"{path} holds no weights: expected a dictionary of tensors, or others around it, got {got}.")
    fitting = {name: state for name, state, differences in tried if not any(differences.values())}
    if not fitting:
        name, _, differences = min(tried, key=lambda attempt: sum(map(len, attempt[2].values())))
        parts = [f"{len(v)} {what} ({v[0]}{', ...' if len(v) > 1 else ''})" for what, v in differences.items() if v]
        raise ValueError(
            f"the checkpoint {path} is of another architecture than {type(network).__name__}: weights "
            f"{name and f'under {name!r} '}{'; '.join(parts)}. Use the configuration (2-D or 3-D, channels, method) it "
            "was trained with."
        )
    if len(fitting) > 1 and "network" not in fitting:
        raise ValueError(
            f"{path} holds several networks that fit, under {', '.join(map(repr, fitting))}: save the weights of the "
            "one that is meant alone."
        )
    state = fitting.get("network", next(iter(fitting.values())))
    if lost := [k for k in own if state[k].is_floating_point() and not torch.isfinite(state[k]).all()]:
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise ValueError(
            f"{path} has weights that are not finite, NaN or infinity: {lost[0]}{more}. Take an earlier checkpoint."
        )
    network.load_state_dict(state, strict=not without)
    return network


def _states(content: Mapping[Any, Any], name: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The dictionaries with tensors in them, and the names they are under, joined by dots."""
    if any(isinstance(v, torch.Tensor) for v in content.values()) and all(isinstance(k, str) for k in content):
        yield name, content
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from _states(value, f"{name}.{key}" if name else str(key))


def _without_prefix(state: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The state as it is, and without the first one, two, ... parts of the names while all of them share these."""
    names = [k.split(".") for k in state]
    for n in range(len(os.path.commonprefix([parts[:-1] for parts in names])) + 1):
        yield {".".join(parts[n:]): v for parts, v in zip(names, state.values(), strict=True)}


def _shown(value: Any) -> str:
    """The shape of a tensor of real numbers, else what it is."""
    if not isinstance(value, torch.Tensor):
        return f"a {type(value).__name__}"
    return f"{'complex ' * value.is_complex()}{tuple(value.shape)}"


def _differences(own: Mapping[str, Any], state: Mapping[str, Any]) -> dict[str, list[str]]:
    """What is wrong with a state for a network of its ``own`` weights, each kind as a list."""
    return {
        "missing": [k for k in own if k not in state],
        "unexpected": [k for k in state if k not in own],
        "of another shape": [
            f"{k}: expected {tuple(v.shape)}, got {_shown(state[k])}"
            for k, v in own.items()
            if k in state and (_shown(state[k]) != str(tuple(v.shape)))
        ],
    }
