# SPDX-License-Identifier: Apache-2.0
"""Losses of features alone, before they go through a registration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
from monai.losses import DiceCELoss

__all__ = ["FeatureLabelLoss"]


class FeatureLabelLoss(nn.Module):
    """MONAI's Dice and, with half the weight, cross-entropy loss of features that should be the probabilities of the
    labels, feature ``k`` that of label ``k``; in float32 with autocast off.

    Args:
        label_keys: keys of the label maps in the target, one for each of the images. Defaults to ``("moving_label",
            "fixed_label")``.
    """

    def __init__(self, label_keys: Sequence[str] = ("moving_label", "fixed_label")) -> None:
        super().__init__()
        #: keys of what the target must have beside the images
        self.target_keys = tuple(label_keys)
        self.loss = DiceCELoss(to_onehot_y=True, softmax=True, batch=True, lambda_ce=0.5)

    def forward(self, prediction: Sequence[torch.Tensor], target: dict[str, Any]) -> torch.Tensor:
        """The loss, a scalar.

        Args:
            prediction: features of each image, ``(B, C, *spatial)`` between 0 and 1, with the sum 1 over the channels.
            target: has the label maps, ``(B, 1, *spatial)``, numbers below ``C``.

        Raises:
            ValueError: When a label map has another shape, or a label that is no channel.
        """
        features = torch.cat(list(prediction)).float()
        labels = torch.cat([target[key] for key in self.target_keys])
        if labels.shape != features[:, :1].shape:
            raise ValueError(
                f"label maps must have shape {tuple(features[:, :1].shape)} in all, got {tuple(labels.shape)}."
            )
        if not (int(labels.min()) >= 0 and int(labels.max()) < features.shape[1]):
            raise ValueError(
                f"labels must be 0 to {features.shape[1] - 1} for {features.shape[1]} features, got "
                f"{int(labels.min())} to {int(labels.max())}."
            )
        with torch.autocast(features.device.type, enabled=False):
            # of logarithms the softmax is what they are of
            return self.loss(features.clamp_min(1e-7).log(), labels)  # type: ignore[no-any-return]
