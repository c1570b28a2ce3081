# SPDX-License-Identifier: Apache-2.0
"""Random contrasts of scans, for networks that should not depend on them."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform, RandBiasField, RandGaussianNoise, RandomizableTransform
from monai.utils import ensure_tuple_rep
from torch.nn.functional import avg_pool2d, avg_pool3d

__all__ = ["RandContrastD", "RandContrastDict", "RandContrastd"]

#: of the ways to change a contrast the shares of: an intensity for each label, a curve, a gamma; the rest keep theirs
_SHARES = (0.25, 0.35, 0.25)
#: nodes of a curve
_NODES = 6


class RandContrastd(RandomizableTransform, MapTransform):
    """Give each image ``(1, *spatial)`` with intensities in [0, 1] another contrast, of its own draw:

    - an intensity for each label, with noise, as SynthMorph does (Hoffmann et al., IEEE TMI 2022), where there are
      label maps; what has no label keeps to none but zero;
    - a curve of the intensities through six random points, rising, falling, or neither, with black left black or not;
    - a gamma, log-normal around 1 with 0.4;
    - or the one that it has;

    and then, each in half of the cases, MONAI's :py:class:`monai.transforms.RandBiasField` and
    :py:class:`monai.transforms.RandGaussianNoise`.

    Args:
        keys: of the images.
        label_keys: of their label maps ``(1, *spatial)``, one for each key; an item need not have them. Defaults to
            ``None``: none.
        allow_missing_keys: see MONAI's ``MapTransform``.
    """

    def __init__(
        self, keys: KeysCollection, label_keys: KeysCollection | None = None, allow_missing_keys: bool = False
    ) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        RandomizableTransform.__init__(self)
        self.label_keys: Sequence[Hashable | None] = ensure_tuple_rep(label_keys, len(self.keys))
        self.bias = RandBiasField(coeff_range=(-0.15, 0.15), prob=0.5)
        self.noise = RandGaussianNoise(std=0.06, prob=0.5)
        self._share(self.R)

    def _share(self, state: np.random.RandomState) -> None:
        self.bias.R = self.noise.R = state

    def set_random_state(self, seed: int | None = None, state: np.random.RandomState | None = None) -> RandContrastd:
        """See MONAI's ``Randomizable``."""
        super().set_random_state(seed, state)
        self._share(self.R)
        return self

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key, label_key in self.key_iterator(d, self.label_keys):
            image = d[key].clamp(0.0, 1.0)
            label = None if label_key is None else d.get(label_key)
            kind = np.searchsorted(np.cumsum(_SHARES), self.R.rand())
            if kind == 0 and label is not None:
                image = self._of_labels(image, label)
            elif kind <= 1:
                image = self._along_curve(image)
            elif kind == 2:
                image = image ** float(np.exp(0.4 * self.R.randn()))
            d[key] = self.noise(self.bias(image))
        return d

    def _of_labels(self, image: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """An intensity for each label, where there is something to see."""
        numbers = label.as_subclass(torch.Tensor).long()
        count = int(numbers.max()) + 1
        means, deviations = self.R.rand(count), 0.08 * self.R.rand(count)
        if self.R.rand() < 0.7:
            means[0] = 0.0
        noise = image.new_tensor(self.R.randn(*image.shape))
        painted = image.new_tensor(means)[numbers] + image.new_tensor(deviations)[numbers] * noise
        if self.R.rand() < 0.7:
            pool = avg_pool2d if image.ndim == 3 else avg_pool3d
            painted = pool(painted[None], 3, stride=1, padding=1, count_include_pad=False)[0]
        return torch.where((numbers > 0) | (image > 0.02), painted, float(means[0]))

    def _along_curve(self, image: torch.Tensor) -> torch.Tensor:
        """The intensities by a piecewise linear curve."""
        nodes = self.R.rand(_NODES)
        if self.R.rand() < 0.5:
            nodes = np.sort(nodes)[:: 1 if self.R.rand() < 0.5 else -1].copy()
        if self.R.rand() < 0.7:
            nodes[0] = 0.0
        values = image.new_tensor(nodes)
        place = image * (_NODES - 1)
        left = place.long().clamp(max=_NODES - 2)
        return torch.lerp(values[left], values[left + 1], place - left)


RandContrastD = RandContrastDict = RandContrastd
