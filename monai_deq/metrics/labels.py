# SPDX-License-Identifier: Apache-2.0
"""Agreement of label maps after registration: Dice and Hausdorff distance, label by label."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

import torch
from monai.metrics import compute_hausdorff_distance
from monai.utils import MetricReduction, convert_to_tensor
from scipy import ndimage

from monai_deq.metrics.base import ReducedIterationMetric, check_spacing, image_spacing

__all__ = ["LabelDiceMetric", "LabelHausdorffMetric", "compute_label_dice", "compute_label_hausdorff"]


def _check_labels(labels: Sequence[int]) -> tuple[int, ...]:
    checked = tuple(labels)
    if not checked or not all(isinstance(label, Integral) and label > 0 for label in checked):
        raise ValueError(f"labels: expected one or more integers above 0 (0 is the background), got {checked}.")
    if len(set(checked)) != len(checked):
        raise ValueError(f"labels: expected each label once, got {checked}.")
    return checked


def _renumber(label_map: torch.Tensor, name: str, labels: Sequence[int]) -> torch.Tensor:
    """Check a label map; put 1, 2, ... for the labels in the order given, 0 for all else: numbers may have gaps."""
    if not isinstance(label_map, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(label_map).__name__}.")
    if label_map.ndim not in (4, 5) or label_map.shape[1] != 1:
        raise ValueError(f"{name}: expected shape (B, 1, H, W) or (B, 1, D, H, W), got {tuple(label_map.shape)}.")
    plain: torch.Tensor = convert_to_tensor(label_map, track_meta=False)
    if plain.is_floating_point() and not torch.equal(plain, plain.round()):
        raise ValueError(f"{name}: expected integer values, got fractions or NaN. Warp labels with nearest neighbour.")
    values, order = torch.sort(torch.tensor([int(label) for label in labels], device=plain.device))
    plain = plain.long().contiguous()
    position = torch.searchsorted(values, plain).clamp(max=len(values) - 1)
    return torch.where(values[position] == plain, order[position] + 1, 0).to(torch.int16)


def _renumber_pair(
    warped_label: torch.Tensor, fixed_label: torch.Tensor, labels: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    warped, fixed = _renumber(warped_label, "warped_label", labels), _renumber(fixed_label, "fixed_label", labels)
    if warped.shape != fixed.shape:
        raise ValueError(
            f"warped_label: expected the shape of fixed_label, {tuple(fixed.shape)}, got {tuple(warped.shape)}."
        )
    return warped, fixed.to(warped.device)


def compute_label_dice(
    warped_label: torch.Tensor,
    fixed_label: torch.Tensor,
    labels: Sequence[int],
    moving_label: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Dice coefficient of each label.

    Args:
        warped_label: moving labels warped with nearest neighbour, shape ``(B, 1, *spatial)``, integer values.
        fixed_label: fixed labels, same shape.
        labels: the labels to score, each once, without the background 0.
        moving_label: moving labels before the warp, shape ``(B, 1, *any spatial shape)``. Where they are given, it is
            they that lack a label, as in Learn2Reg: one that the warp itself made vanish scores 0, not NaN.

    Returns:
        scores in [0, 1] in the order of ``labels``, shape (B, len(labels)); NaN where either image lacks the label.
    """
    labels = _check_labels(labels)
    warped, fixed = _renumber_pair(warped_label, fixed_label, labels)
    source = warped if moving_label is None else _renumber(moving_label, "moving_label", labels).to(warped.device)
    if len(source) != len(warped):
        raise ValueError(f"moving_label: expected {len(warped)} batch items, got {len(source)}.")
    # counted over all labels at once: MONAI's compute_dice takes several passes for each
    both, one, other, there = (
        torch.stack([torch.bincount(item, minlength=len(labels) + 1)[1:] for item in maps.flatten(1)])
        for maps in (torch.where(fixed == warped, fixed, 0), fixed, warped, source)
    )
    dice = (2 * both.double() / (one + other)).float()
    return torch.where((one > 0) & (there > 0), dice, torch.full_like(dice, float("nan")))


def compute_label_hausdorff(
    warped_label: torch.Tensor,
    fixed_label: torch.Tensor,
    labels: Sequence[int],
    spacing: float | Sequence[float] | torch.Tensor | None = None,
    percentile: float | None = None,
) -> torch.Tensor:
    """
    Symmetric Hausdorff distance of each label, between the voxels on the two surfaces: MONAI's
    :py:func:`monai.metrics.compute_hausdorff_distance`, fast on the joint bounding box of each label.

    Args:
        warped_label, fixed_label, labels: see :py:func:`compute_label_dice`.
        spacing: size of a voxel in mm, one number, one per axis, or shape (B, ndim). Defaults to None: 1 mm.
        percentile: above 0, up to 100, e.g. 95 for HD95: the larger of the two directed percentiles, unweighted by
            area. Defaults to None: the largest distance.

    Returns:
        distances in mm in the order of ``labels``, shape (B, len(labels)); NaN where either image lacks the label.
    """
    labels = _check_labels(labels)
    warped, fixed = (item.cpu().numpy()[:, 0] for item in _renumber_pair(warped_label, fixed_label, labels))
    voxel_size = check_spacing(1.0 if spacing is None else spacing, len(warped), warped.ndim - 1).tolist()
    if percentile is not None and not 0 < percentile <= 100:
        raise ValueError(f"percentile: expected a number above 0 and up to 100, or None, got {percentile}.")

    distances = torch.full((len(warped), len(labels)), float("nan"))
    for b in range(len(warped)):
        boxes = (ndimage.find_objects(item[b], max_label=len(labels)) for item in (warped, fixed))
        for i, (box_warped, box_fixed) in enumerate(zip(*boxes, strict=True)):
            if box_warped is None or box_fixed is None:
                continue
            both = zip(box_warped, box_fixed, strict=True)
            box = tuple(slice(min(w.start, f.start), max(w.stop, f.stop)) for w, f in both)
            pred, target = (torch.from_numpy(item[b][box] == i + 1)[None, None] for item in (warped, fixed))
            distances[b, i] = compute_hausdorff_distance(
                pred, target, include_background=True, percentile=percentile, spacing=voxel_size[b]
            )
    return distances.to(warped_label.device)


def _check_fixed(y: torch.Tensor | None) -> torch.Tensor:
    if y is None:
        raise ValueError("y: expected the fixed labels, got None. Call metric(y_pred=warped_label, y=fixed_label).")
    return y


class LabelDiceMetric(ReducedIterationMetric):
    """
    Cumulative form of :py:func:`compute_label_dice`, ``metric(warped_label, fixed_label[, moving_label])``: mean over
    the ``labels`` of a pair, then over the pairs. For the other arguments see :py:class:`ReducedIterationMetric`.
    """

    def __init__(
        self, labels: Sequence[int], reduction: MetricReduction | str = "mean", get_not_nans: bool = False
    ) -> None:
        super().__init__(reduction, get_not_nans)
        self.labels = _check_labels(labels)

    def compute_scores(
        self, y_pred: torch.Tensor, y: torch.Tensor | None = None, moving_label: torch.Tensor | None = None
    ) -> torch.Tensor:
        return compute_label_dice(y_pred, _check_fixed(y), self.labels, moving_label)


class LabelHausdorffMetric(ReducedIterationMetric):
    """
    Cumulative form of :py:func:`compute_label_hausdorff`, ``metric(warped_label, fixed_label)``: mean over the labels
    of a pair, then over the pairs.

    Args:
        labels, percentile: see :py:func:`compute_label_hausdorff`.
        spacing: size of a voxel in mm, one number or one per axis. Defaults to None: that of the fixed labels where
            they are MetaTensors, else 1 mm.
        reduction, get_not_nans: see :py:class:`ReducedIterationMetric`.
    """

    def __init__(
        self,
        labels: Sequence[int],
        spacing: float | Sequence[float] | None = None,
        percentile: float | None = None,
        reduction: MetricReduction | str = "mean",
        get_not_nans: bool = False,
    ) -> None:
        super().__init__(reduction, get_not_nans)
        self.labels, self.spacing, self.percentile = _check_labels(labels), spacing, percentile

    def compute_scores(self, y_pred: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        fixed = _check_fixed(y)
        spacing = image_spacing(fixed) if self.spacing is None else self.spacing
        return compute_label_hausdorff(y_pred, fixed, self.labels, spacing, self.percentile)
