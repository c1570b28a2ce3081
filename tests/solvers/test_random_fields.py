# SPDX-License-Identifier: Apache-2.0
"""Random smooth fields: their length, their correlation, and where they are smoothed."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import convolve1d

from monai_deq.solvers import random_smooth_ddf


@pytest.mark.parametrize("ndim", [2, 3])
def test_random_smooth_ddf(ndim: int) -> None:
    shape = (2, ndim, *[40, 30, 26][:ndim])
    field = random_smooth_ddf(shape, rms=3.0, smoothness=4.0, seed=1)
    assert field.shape == shape and field.dtype == torch.float32
    np.testing.assert_allclose((field.double() ** 2).sum(1).flatten(1).mean(1).sqrt(), [3.0, 3.0], rtol=1e-6)
    assert torch.equal(field, random_smooth_ddf(shape, rms=3.0, smoothness=4.0, seed=1))
    assert not torch.equal(field, random_smooth_ddf(shape, rms=3.0, smoothness=4.0, seed=2))
    # noise under a Gaussian of sigma s has correlation exp(-d^2 / 4 s^2) at distance d, away from the borders
    inner = field[(..., *[slice(8, -8)] * ndim)].double().numpy()
    d = 4
    a, b = inner[:, :, d:], inner[:, :, :-d]
    assert (a * b).mean() / (inner**2).mean() == pytest.approx(math.exp(-(d**2) / 64), abs=0.12)
    for kwargs in ({"rms": -1.0}, {"rms": math.nan}, {"smoothness": 0.0}):
        with pytest.raises(ValueError, match="rms must not be negative and smoothness above 0"):
            random_smooth_ddf(shape, **kwargs)


@pytest.mark.parametrize("ndim", [2, 3])
def test_random_fields_are_smoothed_where_they_are_used(ndim: int, smoothed_on: list[str]) -> None:
    shape = (1, ndim, *[20, 18, 22][:ndim])
    # no device but the CPU has its own noise, and no autocast reaches the smoothing
    expected = random_smooth_ddf(shape, smoothness=2.0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(random_smooth_ddf(shape, smoothness=2.0), expected)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)[0].numpy()
    # the share of a Gaussian of sigma 2 in each voxel, to four sigma
    weights = np.diff([math.erf((n - 0.5) / (2 * math.sqrt(2))) / 2 for n in range(-8, 10)])
    smooth = noise
    for axis in range(1, ndim + 1):
        smooth = convolve1d(smooth, weights, axis, mode="constant")
    smooth *= 3.0 / np.sqrt((smooth**2).sum(0).mean())
    np.testing.assert_allclose(expected[0], smooth, atol=1e-5)
    assert smoothed_on == ["cpu", "cpu"]
    field = random_smooth_ddf(shape, smoothness=2.0, device="meta", dtype=torch.float64)
    assert (field.device.type, field.dtype) == ("meta", torch.float64) and smoothed_on[2:] == ["meta"]
