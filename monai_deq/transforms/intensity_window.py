# SPDX-License-Identifier: Apache-2.0
"""Intensities with units, such as Hounsfield units, to [0, 1]."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from monai.config import KeysCollection
from monai.transforms import ScaleIntensityRange
from monai.transforms.transform import MapTransform

from monai_deq.data.grid import source_of

__all__ = ["WindowToUnitRangeD", "WindowToUnitRangeDict", "WindowToUnitRanged"]


class WindowToUnitRanged(MapTransform):
    """
    Clip intensities to a window and scale the window linearly to [0, 1], the same for all images, by MONAI's
    ``ScaleIntensityRange``.

    Args:
        keys: keys of the images.
        window: lower and upper end, e.g. Hounsfield units of CT.
        allow_missing_keys: leave out keys that are absent. Defaults to False.

    Raises:
        ValueError: When the window is not two ascending numbers, an image lies outside of it altogether, or inside
            [0, 1] although the window is wider: its intensities have been scaled already.
    """

    def __init__(self, keys: KeysCollection, window: Sequence[float], allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        if len(window) != 2 or not window[0] < window[1]:
            raise ValueError(f"window must be its lower and its upper end, got {window!r}.")
        self.low, self.high = (float(end) for end in window)
        self.scaler = ScaleIntensityRange(self.low, self.high, b_min=0.0, b_max=1.0, clip=True)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Scale the images of the item."""
        d = dict(data)
        for key in self.key_iterator(d):
            low, high = float(d[key].min()), float(d[key].max())
            name = source_of(d[key], str(key))
            if high <= self.low or low >= self.high:
                raise ValueError(
                    f"{name}: no intensity is inside the window [{self.low:g}, {self.high:g}], they go from {low:g} to "
                    f"{high:g}. Give a window that fits the image."
                )
            if low >= 0 and high <= 1 < self.high - self.low:
                raise ValueError(
                    f"{name}: the intensities, from {low:g} to {high:g}, are scaled to [0, 1] already; the window "
                    f"[{self.low:g}, {self.high:g}] would flatten them. Give no window."
                )
            d[key] = self.scaler(d[key])
        return d


WindowToUnitRangeD = WindowToUnitRangeDict = WindowToUnitRanged
