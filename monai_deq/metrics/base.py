# SPDX-License-Identifier: Apache-2.0
"""What all metrics share: calling forms, reduction over pairs and processes, checks, voxel sizes."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from monai.config import TensorOrList
from monai.data import MetaTensor
from monai.metrics import CumulativeIterationMetric
from monai.metrics.utils import do_metric_reduction
from monai.utils import MetricReduction, convert_to_tensor, look_up_option

from monai_deq.utils import gather_items


def require_ddf(ddf: torch.Tensor, min_size: int = 2) -> torch.Tensor:
    """A displacement field ``(B, ndim, *spatial)``, checked, as a plain float32 or float64 tensor."""
    if not isinstance(ddf, torch.Tensor):
        raise TypeError(f"ddf: expected a torch.Tensor, got {type(ddf).__name__}.")
    if ddf.ndim not in (4, 5) or ddf.shape[1] != ddf.ndim - 2 or ddf.shape[0] == 0:
        raise ValueError(f"ddf: expected shape (B, 2, H, W) or (B, 3, D, H, W) with B >= 1, got {tuple(ddf.shape)}.")
    if min(ddf.shape[2:]) < min_size:
        raise ValueError(
            f"ddf: expected at least {min_size} voxels along every spatial axis, got spatial shape "
            f"{tuple(ddf.shape[2:])}. Drop an axis of length 1 together with its channel."
        )
    field: torch.Tensor = convert_to_tensor(ddf, track_meta=False)
    # NaN <= 0 is false: a field that diverged would pass for one without folds
    if bad := [i for i, item in enumerate(field) if not torch.isfinite(item).all()]:
        raise ValueError(f"ddf: expected finite displacements, got NaN or infinity in batch item(s) {bad}.")
    return field if field.dtype == torch.float64 else field.float()


def check_spacing(spacing: float | Sequence[float] | torch.Tensor, batch: int, ndim: int) -> torch.Tensor:
    """Voxel sizes in mm, one number, ``(ndim,)`` or ``(batch, ndim)``, checked, as ``(batch, ndim)``."""
    given = torch.as_tensor(spacing, dtype=torch.float64)
    if tuple(given.shape) not in ((), (ndim,), (batch, ndim)) or not (torch.isfinite(given) & (given > 0)).all():
        raise ValueError(
            f"spacing: expected voxel sizes in mm above 0: one number, {ndim}, or {ndim} for each of {batch} items; "
            f"got {given.tolist()}."
        )
    return given.expand(batch, ndim)


def image_spacing(image: torch.Tensor) -> torch.Tensor | None:
    """Voxel sizes of a batch-first image in mm, shape (B, ndim), from its affine; None without one."""
    if not isinstance(image, MetaTensor):
        return None
    affines = np.asarray(image.affine, dtype=np.float64)
    # a batch that a data loader has collated carries one affine an item
    affines = np.broadcast_to(affines, (len(image), *affines.shape[-2:]))
    # MONAI's ``pixdim`` is wrong for a 2-D slice with a 4x4 affine that does not lie in x and y
    return torch.from_numpy(np.linalg.norm(affines[:, :-1, : image.ndim - 2], axis=1))


class ReducedIterationMetric(CumulativeIterationMetric):
    """
    Base of the cumulative metrics: keeps (B, C) scores, NaN where there is none, and reduces them.

    Unlike with MONAI's metrics the reduction is NaN without any score, and lists of different length or what is no
    tensor are refused. Of several processes each gets the scores of all, in their order. A subclass implements
    ``compute_scores``, whose parameters take None where that is their default.

    Args:
        reduction: one of :py:class:`monai.utils.MetricReduction`; NaN scores are left out. ``"mean"`` averages over
            channels, then over items.
        get_not_nans: whether ``aggregate`` returns ``(score, number of scores that are not NaN)``.
    """

    def __init__(self, reduction: MetricReduction | str = "mean", get_not_nans: bool = False) -> None:
        super().__init__()
        self.reduction = look_up_option(reduction, MetricReduction)
        self.get_not_nans = get_not_nans

    def compute_scores(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Scores (B, C) of batch-first tensors."""
        raise NotImplementedError(f"{type(self).__name__} must implement compute_scores.")

    def _compute_tensor(self, y_pred: torch.Tensor, y: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
        return self.compute_scores(y_pred, y, **kwargs)  # abstract in MONAI

    @torch.no_grad()
    def __call__(
        self, y_pred: TensorOrList | None, y: TensorOrList | None = None, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """
        Compute the scores of a batch, shape (B, C), and keep them.

        Args:
            y_pred: batch-first tensor, or a list of tensors without the batch axis (``TypeError`` for what is neither).
            y: the same, of as many items (``ValueError``), or None for a metric that does without.
            args, kwargs: what else the metric takes, in the same forms.
        """
        signature = inspect.signature(self.compute_scores)
        given: dict[str, Any] = {}
        for name, value in signature.bind(y_pred, y, *args, **kwargs).arguments.items():
            if value is None and signature.parameters[name].default is None:
                continue
            items = value if isinstance(value, (list, tuple)) else [value]
            if not all(isinstance(item, torch.Tensor) for item in items):
                kinds = ", ".join(sorted({type(item).__name__ for item in items}))
                raise TypeError(f"{name}: expected a torch.Tensor or a list of torch.Tensor, got {kinds}.")
            given[name] = value
        first, count = next(((name, len(value)) for name, value in given.items()), ("y_pred", 0))
        for name, value in given.items():
            if len(value) != count:
                raise ValueError(f"{name}: expected {count} items, as in {first}, got {len(value)}.")
        if all(isinstance(value, torch.Tensor) for value in given.values()):
            scores = self.compute_scores(**given)
        else:
            items = [{name: value[i].unsqueeze(0) for name, value in given.items()} for i in range(count)]
            scores = torch.cat([self.compute_scores(**item) for item in items])
        self.extend(scores)
        return scores

    def reset(self) -> None:
        """Forget all scores."""
        super().reset()
        self.scores: list[torch.Tensor] = []

    def extend(self, *data: torch.Tensor) -> None:
        """Keep scores, shape (B, C)."""
        self.scores.extend(data)

    def append(self, *data: torch.Tensor) -> None:
        """Keep scores, shape (C,)."""
        self.extend(*(scores.unsqueeze(0) for scores in data))

    def get_buffer(self) -> torch.Tensor | None:
        """The scores of all processes, shape (N, C); None where there is none. All processes must call it."""
        device = self.scores[0].device if self.scores else torch.device("cpu")
        # MONAI's own gathering waits for ever when one process has no scores
        scores = gather_items([part.cpu() for part in self.scores])
        return torch.cat(scores).to(device) if scores else None

    def __len__(self) -> int:
        scores = self.get_buffer()
        return 0 if scores is None else len(scores)

    def aggregate(
        self, reduction: MetricReduction | str | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """
        The scores kept so far reduced, by ``self.reduction`` unless another one is given, or ``(score, not_nans)`` with
        ``get_not_nans``; ``ValueError`` when there is none.
        """
        scores = self.get_buffer()
        if scores is None:
            raise ValueError(f"{type(self).__name__} holds no scores: call it on a batch before aggregate().")
        reduced, not_nans = do_metric_reduction(scores, reduction or self.reduction)
        reduced = torch.where(not_nans > 0, reduced, torch.full_like(reduced, float("nan")))
        return (reduced, not_nans) if self.get_not_nans else reduced
