# SPDX-License-Identifier: Apache-2.0
"""Learned channels by which images are compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
from monai.networks.nets import BasicUNet

from monai_deq.networks.blocks import standardised

__all__ = ["FeatureUNet"]

#: voxels along each axis that are one on the smallest of the U-Net's five sizes
_LEAST_SIZE = 16


class FeatureUNet(nn.Module):
    """MONAI's :py:class:`monai.networks.nets.BasicUNet` of an image with mean 0 and standard deviation 1, and a softmax
    over its channels: features between 0 and 1, whatever brightness and contrast are. Trained on label maps they are
    the probabilities of the labels, through a registration what makes it good.

    Args:
        spatial_dims: 2 or 3. Defaults to 3.
        channels: number of features. Defaults to 16.
        widths: channels of the U-Net: of its five sizes and at the end. Defaults to ``(16, 24, 32, 48, 64, 16)``.
    """

    def __init__(
        self, spatial_dims: int = 3, channels: int = 16, widths: Sequence[int] = (16, 24, 32, 48, 64, 16)
    ) -> None:
        super().__init__()
        self.spatial_dims, self.channels, self.widths = spatial_dims, channels, list(widths)
        norm = ("group", {"num_groups": 4, "affine": True})
        self.unet = BasicUNet(spatial_dims, 1, channels, self.widths, norm=norm)

    def forward(self, image: torch.Tensor, *others: torch.Tensor) -> Any:
        """``(B, 1, *spatial)`` to ``(B, channels, *spatial)``; of several images of one shape a tuple.

        Raises:
            ValueError: When an axis has fewer than 16 voxels.
        """
        if min(image.shape[2:]) < _LEAST_SIZE:
            raise ValueError(f"features need {_LEAST_SIZE} voxels along each axis, got shape {tuple(image.shape)}.")
        if others:
            images = (image, *others)
            return self(torch.cat(images)).chunk(len(images))
        return self.unet(standardised(image)).softmax(dim=1)
