# SPDX-License-Identifier: Apache-2.0
"""What a registration did to a pair, in numbers."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from monai.transforms import MapTransform

from monai_deq.data import affine_of
from monai_deq.metrics import compute_label_dice, compute_landmark_errors, jacobian_determinant
from monai_deq.networks.blocks import LocalCorrelationLoss

from .geometry import pull_image
from .items import require_keys

__all__ = ["SummarizeRegistrationD", "SummarizeRegistrationDict", "SummarizeRegistrationd", "summary_lines"]

#: voxels whose determinants are taken at once
_AT_ONCE = 2**22
#: what each number is, in words, how it is written, and what to multiply it with
_WORDS: dict[str, tuple[str, str, float]] = {
    "overlap": ("overlap of the foreground, at the start", ".1f", 100.0),
    "similarity": ("local correlation (%)", ".2f", 100.0),
    "dice": ("Dice, mean over labels (%)", ".2f", 100.0),
    "tre": ("landmarks apart (mm)", ".2f", 1.0),
    "folded_percent": ("folded voxels (%)", ".4f", 1.0),
    "std_log_jacobian": ("std of log |J|", ".3f", 1.0),
}


def _batch(image: torch.Tensor) -> torch.Tensor:
    return image.as_subclass(torch.Tensor)[None].cpu()


def _numbers(label: torch.Tensor) -> set[int]:
    """The numbers in a label map."""
    flat = label.flatten()
    few = int(flat.max()) < 2**16  # counted, which is faster than sorted
    return set((torch.bincount(flat).nonzero()[:, 0] if few else flat.unique()).tolist())


def _determinants(ddf: torch.Tensor) -> Iterator[torch.Tensor]:
    """Jacobian determinants of a field ``(1, ndim, *spatial)``, in parts along its first axis."""
    n = ddf.shape[2]
    each = max(_AT_ONCE * n // ddf[0, 0].numel(), 1)
    for begin in range(0, n, each):
        end = min(begin + each, n)
        # with a neighbour on each side, as central differences need
        first, last = max(begin - 1, 0), min(end + 1, n)
        if last - first < 2:
            first, last = max(n - 2, 0), n
        yield jacobian_determinant(ddf[:, :, first:last])[:, :, begin - first : end - first]


class SummarizeRegistrationd(MapTransform):
    """
    Put what a registration did to an item under ``"summary"``: ``similarity_before`` and ``_after`` (mean squared local
    correlation on the grid that the method works on), ``folded_percent`` and ``std_log_jacobian`` of the whole field;
    where the item has labels of both scans ``dice_before`` and ``_after``, and of each label ``dice_labels``; where it
    has keypoints of both ``tre_before`` and ``_after`` in mm. Before: where the files place the scans.

    It comes behind :py:class:`ComposeDDFd` and :py:class:`ResampleByDDFd`, which leave the displacement ``"ddf"`` and
    ``"warped_label"`` on the grid of ``"fixed_scan"``; ``"fixed"``, ``"moving"`` and ``"warped"`` are the method's.
    """

    def __init__(self) -> None:
        super().__init__(("fixed", "moving", "warped", "ddf", "fixed_scan"))

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        require_keys(d, self.keys, "SummarizeRegistrationd")
        fixed, ddf, scan = _batch(d["fixed"]).float(), _batch(d["ddf"]), d["fixed_scan"]
        loss = LocalCorrelationLoss()
        summary: dict[str, Any] = {}
        if "overlap" in d:
            summary["overlap"] = float(d["overlap"])
        with torch.no_grad():
            summary["similarity_before"] = -float(loss(_batch(d.get("moving_before", d["moving"])).float(), fixed))
            summary["similarity_after"] = -float(loss(_batch(d["warped"]).float(), fixed))
            if {"fixed_label", "moving_label", "warped_label"} <= set(d):
                summary.update(self._dice(d, scan))
            if {"fixed_keypoints", "moving_keypoints"} <= set(d):
                points, moved = d["fixed_keypoints"], in_voxels_of(d["moving_keypoints"], d["moving_scan"], scan)
                spacing = torch.from_numpy(affine_of(scan)[:3, : len(ddf[0])]).norm(dim=0).float()
                for word, field in (("before", torch.zeros_like(ddf)), ("after", ddf)):
                    errors = compute_landmark_errors(field, points[None], moved[None], spacing[None], outside="clamp")
                    summary[f"tre_{word}"] = float(errors.mean())
            found = [part.flatten() for part in _determinants(ddf)]
        determinants = torch.cat(found)
        summary["folded_percent"] = 100.0 * float((determinants <= 0).double().mean())
        summary["std_log_jacobian"] = float(determinants.clamp(1e-9, 1e9).log().std())
        d["summary"] = summary
        return d

    def _dice(self, d: Mapping[Hashable, Any], scan: torch.Tensor) -> dict[str, Any]:
        fixed, warped, moving = (_batch(d[f"{name}_label"]).long() for name in ("fixed", "warped", "moving"))
        before = _batch(pull_image(d["moving_label"], scan, mode="nearest")).long()
        labels = sorted((_numbers(fixed) & _numbers(moving)) - {0})
        if not labels:
            return {}
        # a label that the warp made vanish counts as 0
        scores = [compute_label_dice(label, fixed, labels, moving)[0].tolist() for label in (before, warped)]
        of = {str(label): [a, b] for label, a, b in zip(labels, *scores, strict=True)}
        return {
            "dice_before": sum(scores[0]) / len(labels),
            "dice_after": sum(scores[1]) / len(labels),
            "dice_labels": of,
        }


def in_voxels_of(points: torch.Tensor, image: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Points ``(N, ndim)`` in voxels of one image in voxels of another, by their places in the world."""
    matrix = torch.linalg.solve(torch.from_numpy(affine_of(reference)), torch.from_numpy(affine_of(image))).float()
    ndim = points.shape[1]
    return points @ matrix[:ndim, :ndim].T + matrix[:ndim, 3]


def summary_lines(items: Sequence[Mapping[Any, Any]]) -> list[str]:
    """
    What became of pairs as lines of text: a table of their summaries, of one pair down the page, and where their files
    are.

    Args:
        items: each with ``"summary"``, and where they are there ``"name"`` or the names of the scans, ``"verdict"`` or
            ``"reason"``, ``"seconds"`` and ``"files"``.
    """
    rows = []
    for item in items:
        name = item.get("name") or f"{item['moving_subject']}_to_{item['fixed_subject']}"
        row = {"pair": str(name), "verdict": str(item.get("verdict", item.get("reason", "")))}
        summary = item["summary"]
        for key, (words, form, factor) in _WORDS.items():
            given = [f"{key}_before", f"{key}_after"] if f"{key}_after" in summary else [key]
            if given[-1] in summary:
                row[words] = " -> ".join(format(factor * float(summary[k]), form) for k in given)
        if "seconds" in item:
            row["seconds"] = f"{float(item['seconds']):.0f}"
        rows.append(row)
    if len(rows) == 1:
        width = max(map(len, rows[0]))
        lines = [f"{key:<{width}}  {value}" for key, value in rows[0].items()]
    else:
        lines = pd.DataFrame(rows).fillna("").to_string(index=False).splitlines()
    for item in items:
        files = item.get("files", {})
        lines += [f"wrote {path}" for path in files.values()] if len(items) == 1 else []
    folders = sorted({str(Path(path).parent) for item in items for path in item.get("files", {}).values()})
    return lines if len(items) == 1 else [*lines, *(f"wrote the files of {len(items)} pairs to {f}" for f in folders)]


SummarizeRegistrationD = SummarizeRegistrationDict = SummarizeRegistrationd
