# SPDX-License-Identifier: Apache-2.0
"""Label maps for scans without: parcels of one of them, and the label map of one carried to the others."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.utils import ensure_tuple_rep
from scipy.cluster.vq import kmeans2
from scipy.ndimage import binary_fill_holes, gaussian_filter, uniform_filter

from monai_deq.networks.nets import EnergyRegistrationNet, RegistrationNet

from .fixed_point_solver import FixedPointSolver
from .items import PerKeyd, on_grid_of, require_keys
from .warping import WarpByDDFd

__all__ = ["ParcelsD", "ParcelsDict", "Parcelsd", "PropagateLabelD", "PropagateLabelDict", "PropagateLabeld"]

#: intensity that is no background, in images scaled to [0, 1]
_FOREGROUND = 0.02
#: what a standard deviation of the intensity counts beside one of the place
_INTENSITY = 0.8


class Parcelsd(PerKeyd):
    """Divide the foreground of images ``(1, *spatial)``, in [0, 1], into compact parcels of like intensity, numbered
    from 1, by SciPy's k-means of place and smoothed intensity: a label map ``(1, *spatial)`` where nobody drew one.

    Args:
        keys, allow_missing_keys: of the images; see MONAI's ``MapTransform``.
        output_keys: where their label maps go, one for each of ``keys``. Defaults to ``"label"``.
        number: of parcels. Defaults to 40.

    Raises:
        ValueError: When ``number`` is not positive, or the foreground has fewer voxels.
    """

    def __init__(
        self,
        keys: KeysCollection,
        output_keys: KeysCollection = "label",
        number: int = 40,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.beside = (ensure_tuple_rep(output_keys, len(self.keys)),)
        if not number >= 1:
            raise ValueError(f"number must be at least 1, got {number}.")
        self.number = int(number)

    def treat(self, item: dict[Hashable, Any], key: Hashable, output_key: Hashable) -> None:
        image = item[key][0].as_subclass(torch.Tensor).cpu().numpy().astype(np.float64)
        inside = binary_fill_holes(gaussian_filter(image, 0.5) > _FOREGROUND)
        place = np.argwhere(inside)
        if len(place) < self.number:
            raise ValueError(f"{key!r}: {self.number} parcels need as many voxels of foreground, got {len(place)}.")
        place, intensity = place - place.mean(0), gaussian_filter(image, 1.0)[inside]
        points = np.column_stack([place / place.std(), _INTENSITY * intensity / max(intensity.std(), 1e-6)])
        parcels = np.zeros(image.shape, dtype=np.int64)
        parcels[inside] = kmeans2(points, self.number, iter=50, minit="++", seed=0)[1] + 1
        # the most frequent of each neighbourhood: no single voxels
        shares = np.zeros(image.shape)
        smooth = np.zeros_like(parcels)
        for number in range(self.number + 1):
            share = uniform_filter((parcels == number).astype(np.float64), 3)
            smooth = np.where(share > shares, number, smooth)
            shares = np.maximum(share, shares)
        item[output_key] = on_grid_of(torch.from_numpy(smooth.astype(np.float32))[None], item[key])


class PropagateLabeld(PerKeyd):
    """Give images ``(1, *spatial)`` the label map of an atlas, another image of that size, carried there by a
    registration, each voxel from the nearest.

    Args:
        keys, allow_missing_keys: of the images, in [0, 1]; see MONAI's ``MapTransform``.
        atlas: loaded item with an ``"image"``, in [0, 1], and its ``"label"``.
        network: that registers. Defaults to an :py:class:`monai_deq.networks.nets.EnergyRegistrationNet`.
        output_keys: where their label maps ``(1, *spatial)`` go, one for each of ``keys``. Defaults to ``"label"``.

    Raises:
        KeyError: When the atlas has no image or no label map.
    """

    def __init__(
        self,
        keys: KeysCollection,
        atlas: Mapping[Hashable, Any],
        network: RegistrationNet | None = None,
        output_keys: KeysCollection = "label",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.beside = (ensure_tuple_rep(output_keys, len(self.keys)),)
        require_keys(atlas, ("image", "label"), "PropagateLabeld")
        self.atlas = atlas
        dims = atlas["image"].ndim - 1
        self.solve = FixedPointSolver(EnergyRegistrationNet(spatial_dims=dims) if network is None else network)
        self.warp = WarpByDDFd("label", mode="nearest")

    def treat(self, item: dict[Hashable, Any], key: Hashable, output_key: Hashable) -> None:
        _, ddf, _ = self.solve(self.atlas["image"], item[key])
        item[output_key] = self.warp({"label": self.atlas["label"], "ddf": ddf})["label"]


ParcelsD = ParcelsDict = Parcelsd
PropagateLabelD = PropagateLabelDict = PropagateLabeld
