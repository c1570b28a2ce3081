# SPDX-License-Identifier: Apache-2.0
"""What the transforms share: items treated key by key, and the meta data of what they make."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import Compose, MapTransform
from monai.utils import ensure_tuple

from monai_deq.utils import root_error

__all__ = ["CheckedCompose", "PerKeyOfImaged", "PerKeyd", "on_grid_of", "require_keys"]


def on_grid_of(image: torch.Tensor, reference: Any, source: Any = None) -> torch.Tensor:
    """The image ``(C, *spatial)`` with the meta data of the reference on whose grid it lies, if it is a MetaTensor, and
    the file name of the image it was made from.
    """
    if not isinstance(reference, MetaTensor):
        return image
    meta = dict(reference.meta)
    if source is not None:
        meta.pop("filename_or_obj", None)
        if isinstance(source, MetaTensor) and "filename_or_obj" in source.meta:
            meta["filename_or_obj"] = source.meta["filename_or_obj"]
    # MetaTensor copies what it is given; of a slice it would count the channel as a spatial axis
    return MetaTensor(image, meta=meta, spatial_ndim=image.ndim - 1)


def require_keys(data: Mapping[Any, Any], keys: Sequence[Hashable], transform: str) -> None:
    """Raise ``KeyError`` when the item that ``transform`` is given lacks one of ``keys``."""
    absent = [key for key in keys if key not in data]
    if absent:
        raise KeyError(f"{transform} finds no {absent} in the item, which has {sorted(map(str, data))}.")


class PerKeyd(MapTransform):
    """Base of what treats an item key by key: ``treat`` changes the item, its own copy."""

    #: what goes with each of ``keys``, given to ``treat`` behind the key
    beside: tuple[Sequence[Any], ...] = ()

    def treat(self, item: dict[Hashable, Any], key: Hashable, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for _, key, *args in self.key_iterator(d, self.keys, *self.beside):
            self.treat(d, key, *args)
        return d


class PerKeyOfImaged(PerKeyd):
    """Base where to each of ``keys`` belongs an image of the item, the one of that place in ``image_keys``."""

    def __init__(self, keys: KeysCollection, image_keys: KeysCollection, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        images = ensure_tuple(image_keys)
        if len(images) != len(self.keys):
            raise ValueError(f"image_keys must name one image for each of {tuple(self.keys)}, got {images}.")
        self.beside = (images,)


class CheckedCompose(Compose):
    """MONAI's ``Compose``, which raises the error of a check itself, not ``RuntimeError("applying transform ...")``."""

    def __call__(self, input_: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]  # as Compose
        try:
            return super().__call__(input_, *args, **kwargs)
        except RuntimeError as e:
            error = root_error(e)
            if error is e:
                raise
            raise error from error.__cause__
