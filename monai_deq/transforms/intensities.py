# SPDX-License-Identifier: Apache-2.0
"""Intensities of scans brought to [0, 1], by one rule for those of a pair, which is kept beside them."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform, ScaleIntensityRange

from monai_deq.data import source_of

from .items import PerKeyd

__all__ = ["ScaleToUnitRanged", "WindowToUnitRangeD", "WindowToUnitRangeDict", "WindowToUnitRanged"]

logger = logging.getLogger("monai_deq")

#: percentile of all voxels that becomes 0, and of those above it that becomes ``_LEVEL``
_LOW, _HIGH = 0.1, 99.0
#: brains as FreeSurfer normalises them, which the weights were trained on, have theirs between 0.41 and 0.44; those
#: networks are as accurate from 0.43 to 0.8, and what is up to twice as bright is not clipped
_LEVEL = 0.5


def _keep(item: dict[Hashable, Any], range_key: str | None, key: Hashable, low: float, high: float) -> None:
    """Note which intensities became 0 and 1."""
    if range_key is not None:
        item[range_key] = {**item.get(range_key, {}), str(key): [low, high]}


class ScaleToUnitRanged(MapTransform):
    """
    Scale intensities of the images ``(C, *spatial)`` under ``keys`` linearly to [0, 1], robustly: of each image the
    0.1th percentile becomes 0 and the 99th of what is above it 0.5; what is then outside of [0, 1] is clipped. Images
    that are all inside [0, 1] pass unchanged, whatever their largest value. What became 0 and 1 is logged.

    Args:
        keys, allow_missing_keys: see MONAI's ``MapTransform``.
        range_key: where what became 0 and 1 is kept, by key. Defaults to None: nowhere.
    """

    def __init__(self, keys: KeysCollection, range_key: str | None = None, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.range_key = range_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        keys = list(self.key_iterator(d))
        inside = all(float(d[key].min()) >= 0.0 and float(d[key].max()) <= 1.0 for key in keys)
        for key in keys:
            low, high = (0.0, 1.0) if inside else _robust_range(d[key])
            if not inside:
                name = source_of(d[key], str(key))
                logger.info("%s: intensities scaled linearly from [%.5g, %.5g] to [0, 1]", name, low, high)
                d[key] = ((d[key] - low) / (high - low)).clamp_(0.0, 1.0)
            _keep(d, self.range_key, key, low, high)
        return d


def _robust_range(image: torch.Tensor) -> tuple[float, float]:
    values = np.asarray(image.as_subclass(torch.Tensor).cpu(), dtype=np.float32).ravel()
    low = float(np.percentile(values, _LOW, method="lower"))
    above = values[values > low]
    if not above.size:  # nearly all voxels have the largest value
        return float(values.min()), float(values.max())
    high = float(np.percentile(above, _HIGH, method="lower"))
    return low, low + (high - low) / _LEVEL


class WindowToUnitRanged(PerKeyd):
    """
    Clip intensities of the images under ``keys`` to a window, e.g. ``(-1200, 400)`` Hounsfield units, and scale it
    linearly to [0, 1]; for the other arguments see :py:class:`ScaleToUnitRanged`. ``ValueError`` for an image outside
    of the window, or scaled to [0, 1] already.
    """

    def __init__(
        self,
        keys: KeysCollection,
        window: Sequence[float],
        range_key: str | None = None,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.range_key = range_key
        if len(window) != 2 or not window[0] < window[1]:
            raise ValueError(f"window must be its lower and its upper end, got {window!r}.")
        self.low, self.high = (float(end) for end in window)
        self.scaler = ScaleIntensityRange(self.low, self.high, b_min=0.0, b_max=1.0, clip=True)

    def treat(self, item: dict[Hashable, Any], key: Hashable) -> None:
        low, high = float(item[key].min()), float(item[key].max())
        name, window = source_of(item[key], str(key)), f"[{self.low:g}, {self.high:g}]"
        if high <= self.low or low >= self.high:
            raise ValueError(
                f"{name}: no intensity is inside the window {window}, they go from {low:g} to {high:g}. Give a window "
                "that fits the image."
            )
        if low >= 0 and high <= 1 < self.high - self.low:
            raise ValueError(
                f"{name}: the intensities, from {low:g} to {high:g}, are scaled to [0, 1] already; the window {window} "
                "would flatten them. Give no window."
            )
        item[key] = self.scaler(item[key])
        _keep(item, self.range_key, key, self.low, self.high)


WindowToUnitRangeD = WindowToUnitRangeDict = WindowToUnitRanged
