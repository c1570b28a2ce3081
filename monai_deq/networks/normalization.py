# SPDX-License-Identifier: Apache-2.0
"""Weight and spectral normalisation of the convolutions of a module."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn as nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

__all__ = ["normalize_convolutions"]

_NORMS: dict[str, Callable[[nn.Module], nn.Module]] = {"weight": weight_norm, "spectral": spectral_norm}
_CONVOLUTIONS = (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def normalize_convolutions(module: nn.Module, norm: str) -> nn.Module:
    """
    Normalise the weights of all convolutions of a module in place, with PyTorch's parametrizations.

    Both are said to steady an equilibrium network. The weights get other names in the state dict, so that a checkpoint
    is for a network that was normalised likewise. In training mode ``"spectral"`` makes one power iteration each time
    that a convolution is used, and so its weights change a little from step to step; in eval mode they stand.

    Args:
        module: the module, e.g. an update.
        norm: ``"weight"`` (length and direction of each filter are separate parameters; the function stays what it
            was) or ``"spectral"`` (each weight, as a matrix, is divided by its largest singular value).

    Returns:
        The module.

    Raises:
        ValueError: When ``norm`` is none of these, or the module has no convolution.
    """
    if norm not in _NORMS:
        raise ValueError(f'norm must be "weight" or "spectral", got {norm!r}.')
    convolutions = [m for m in module.modules() if isinstance(m, _CONVOLUTIONS)]
    if not convolutions:
        raise ValueError(f"module: expected convolutions in it, a {type(module).__name__} has none.")
    for convolution in convolutions:
        _NORMS[norm](convolution)
    return module
