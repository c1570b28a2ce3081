# SPDX-License-Identifier: Apache-2.0
"""Compiled backbones."""

from __future__ import annotations

from typing import TypeVar

import torch.nn as nn

from monai_deq.utils import as_flag

__all__ = ["compile_backbones", "is_compiled"]

Network = TypeVar("Network", bound=nn.Module)


def compile_backbones(network: Network, enabled: bool = True) -> Network:
    """
    Have the backbones of a network's updates, their convolutions, compiled by ``torch.compile`` when they are first
    called; the iteration around them is left as it is, as are the names of the parameters. PyTorch needs a C++
    compiler for it on a CPU, and it has no second derivatives, which the penalty of
    :py:class:`monai_deq.losses.EquilibriumLoss` on the Jacobian asks for.

    Args:
        network: changed in place; modules with a backbone are those with an attribute ``backbone``.
        enabled: whether to do so. Defaults to ``True``.

    Returns:
        The network.

    Raises:
        ValueError: When there is no backbone in it, or ``enabled`` is no flag.
    """
    if not as_flag(enabled, "enabled"):
        return network
    candidates = [getattr(module, "backbone", None) for module in network.modules()]
    backbones = {backbone for backbone in candidates if isinstance(backbone, nn.Module)}
    if not backbones:
        raise ValueError(f"{type(network).__name__} has no backbone that could be compiled.")
    for backbone in backbones:
        # images of one size are the rule; another one is compiled anew
        backbone.compile(dynamic=False)
    return network


def is_compiled(network: nn.Module) -> bool:
    """
    Whether there is a module in a network that ``torch.compile`` compiles.

    Args:
        network: the network.
    """
    return any(getattr(module, "_compiled_call_impl", None) is not None for module in network.modules())
