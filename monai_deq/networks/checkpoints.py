# SPDX-License-Identifier: Apache-2.0
"""Checkpoint files and the weights in them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

__all__ = ["load_checkpoint", "load_weights"]


def load_checkpoint(path: str | Path, map_location: torch.device | str = "cpu") -> Mapping[str, Any]:
    """Read a checkpoint file, weights only, with its tensors on a device, by default the CPU.

    Raises:
        FileNotFoundError: When there is no such file.
        ValueError: When the file is not a checkpoint, or not a whole one.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}: train first, or name a trained one (ckpt_path).")
    try:
        checkpoint = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as e:
        raise ValueError(f"{path} is not a readable checkpoint ({type(e).__name__}: {str(e)[:200]}).") from e
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"{path} holds a {type(checkpoint).__name__}, expected a dictionary of weights.")
    return checkpoint


def load_weights(network: nn.Module, path: str | Path, without: str | None = None) -> nn.Module:
    """Load the weights of a network in place, and return the network.

    Args:
        network: the network.
        path: checkpoint file: a state dict, or a training checkpoint that has one under ``"network"``.
        without: weights whose names begin with it, such as ``"coarse."``, stay as they are. Defaults to none.

    Raises:
        FileNotFoundError: When there is no such file.
        ValueError: When the file is not a checkpoint, or is one of another architecture.
    """
    checkpoint = load_checkpoint(path)
    state = checkpoint.get("network", checkpoint)
    if not isinstance(state, Mapping):
        raise ValueError(f'{path} holds a {type(state).__name__} under "network", expected a dictionary of weights.')
    own = network.state_dict()
    if without:
        own = {k: v for k, v in own.items() if not k.startswith(without)}
        state = {k: v for k, v in state.items() if not k.startswith(without)}
    missing = [k for k in own if k not in state]
    unexpected = [k for k in state if k not in own]
    shapes = [
        f"{k}: expected {tuple(own[k].shape)}, got {tuple(state[k].shape)}"
        for k in own
        if k in state and own[k].shape != state[k].shape
    ]
    if missing or unexpected or shapes:
        parts = [
            f"{len(v)} {what} ({v[0]}{', ...' if len(v) > 1 else ''})"
            for what, v in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
            if v
        ]
        raise ValueError(
            f"the checkpoint {path} is of another architecture than {type(network).__name__}: weights "
            f"{'; '.join(parts)}. Use the configuration (2-D or 3-D, channels, method) it was trained with."
        )
    network.load_state_dict(state, strict=not without)
    return network
