# SPDX-License-Identifier: Apache-2.0
"""Random displacement fields to start an iteration from."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from monai.networks.layers import GaussianFilter

__all__ = ["random_smooth_ddf"]


def random_smooth_ddf(
    shape: Sequence[int],
    rms: float = 3.0,
    smoothness: float = 8.0,
    seed: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Random smooth displacement fields: white noise under a Gaussian, scaled. The noise is drawn on the CPU, the same
    for all devices, and smoothed on the one asked for.

    Args:
        shape: ``(B, ndim, *spatial)``.
        rms: RMS over voxels of the length of the displacement, in voxels, of each item. Defaults to 3.
        smoothness: standard deviation of the Gaussian in voxels. Defaults to 8.
        seed: of the noise. Defaults to 0.
        device: device of the fields. Defaults to the CPU.
        dtype: their type. Defaults to ``torch.float32``.

    Raises:
        ValueError: When a number is out of its range.
    """
    if not rms >= 0 or not smoothness > 0:
        raise ValueError(f"rms must not be negative and smoothness above 0, got rms={rms}, smoothness={smoothness}.")
    noise = torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    noise = noise.float().to("cpu" if device is None else device)
    kind = noise.device.type
    # in half precision the field would not be smooth
    with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext():
        field = GaussianFilter(len(shape) - 2, smoothness)(noise).double()
    length = (field.square().sum(dim=1, keepdim=True).flatten(1).mean(dim=1)).sqrt()
    return (field * (rms / length).view(-1, *[1] * (len(shape) - 1))).to(dtype)
