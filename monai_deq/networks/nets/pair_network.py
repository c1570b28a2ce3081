# SPDX-License-Identifier: Apache-2.0
"""A registration network with one argument and one result."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn

__all__ = ["PairNetwork"]


class PairNetwork(nn.Module):
    """
    A registration network that takes the pair as one tensor and gives back the displacement alone, for tools that know
    networks of one argument only: MONAI's ``verify_net_in_out``, ``ckpt_export`` and the like. Its weights have the
    names that they have in the network itself, so that the checkpoints are the same.

    Args:
        network: called as ``network(moving, fixed)``; it returns ``(warped, ddf, ...)``.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.register_state_dict_post_hook(_without_prefix)
        self.register_load_state_dict_pre_hook(_with_prefix)

    def forward(self, pair: torch.Tensor) -> torch.Tensor:
        """
        Args:
            pair: the moving and the fixed image, ``(B, 2, *spatial)``, intensities in [0, 1].

        Returns:
            The displacement, ``(B, ndim, *spatial)``, voxels.

        Raises:
            ValueError: When there are not two channels.
        """
        if pair.ndim not in (4, 5) or pair.shape[1] != 2:
            raise ValueError(f"pair must have the shape (B, 2, H, W[, D]), moving and fixed, got {tuple(pair.shape)}.")
        return self.network(pair[:, :1], pair[:, 1:])[1]  # type: ignore[no-any-return]


def _without_prefix(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    inner = f"{prefix}network."
    for key in [k for k in state if k.startswith(inner)]:
        state[prefix + key[len(inner) :]] = state.pop(key)


def _with_prefix(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for key in [k for k in state if k.startswith(prefix)]:
        state[f"{prefix}network.{key[len(prefix) :]}"] = state.pop(key)
