# SPDX-License-Identifier: Apache-2.0
"""How a solution answers to changes of the images that should not matter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from monai_deq.networks.blocks import identity_grid, points_outside, warp_by_ddf
from monai_deq.networks.nets import RegistrationNet

__all__ = ["HARMLESS_CHANGES", "harmless_answers"]

#: changes of a pair that are harmless
HARMLESS_CHANGES = ("offset", "scale", "flip", "shift", "swap")

_OFFSET, _SCALE = 0.1, 0.9
#: voxels; odd, for the sizes that are halved on the way see it
_SHIFT = 3

_Change = Callable[[torch.Tensor], torch.Tensor]


def harmless_answers(
    network: RegistrationNet,
    moving: torch.Tensor,
    fixed: torch.Tensor,
    ddf: torch.Tensor,
    initial_ddf: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    **changes: Any,
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Register a batch of pairs ``(B, 1, *spatial)`` again with their images changed, and compare the displacements
    when the change is undone. Both images are changed alike, as the network is given them:

    - ``"offset"``: 0.1 is added to the intensities;
    - ``"scale"``: they are multiplied by 0.9;
    - ``"flip"``: they are flipped, along each axis alone; the worst one counts;
    - ``"shift"``: they are moved by 3 voxels along all axes, what comes in repeating the border. Compared is what lies
      at least an eighth of the axis away from the border in both;
    - ``"swap"``: moving and fixed exchanged, ``ddf(x) + backward(x + ddf(x))``, where that lies in the image. Left out
      with a mask, which is known on the fixed images alone.

    Costs as many solves: 6 in 2-D and 7 in 3-D.

    Args:
        network: the network.
        moving: moving images.
        fixed: fixed images.
        ddf: what the network found for them, ``(B, ndim, *spatial)`` in voxels.
        initial_ddf: what it started from, as ``ddf``; all but the swapped pairs start from it, changed too. Defaults to
            the method's own.
        mask: what it was given as such, ``(B, 1, *spatial)``; compared is inside. Defaults to ``None``: everywhere.
        changes: settings of the solves in place of the network's own.

    Returns:
        By change the largest and the mean length of the difference over the voxels, ``(B,)`` each, in voxels; NaN where
        no voxel is left to compare.
    """
    inside = torch.ones_like(fixed, dtype=torch.bool) if mask is None else mask > 0
    answers: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    with torch.no_grad():
        for name, place, tone, sign in _changes(fixed):
            given = {} if mask is None else {"mask": place(mask)}
            start = None if initial_ddf is None else sign * place(initial_ddf)
            other, _ = network.solve(tone(place(moving)), tone(place(fixed)), start, **given, **changes)
            region = place(inside)
            if name == "shift":
                region = region & _common_region(fixed)
            answer = _statistics(other - sign * place(ddf), region)
            before = answers.get(name, answer)
            answers[name] = (torch.maximum(before[0], answer[0]), torch.maximum(before[1], answer[1]))
        if mask is None:
            backward, _ = network.solve(fixed, moving, **changes)
            size = tuple(fixed.shape[2:])
            found = identity_grid(size, ddf.device, ddf.dtype) + ddf
            answers["swap"] = _statistics(
                ddf + warp_by_ddf(backward, ddf), ~points_outside(found.movedim(1, -1), size)[:, None]
            )
    return answers


def _changes(fixed: torch.Tensor) -> Iterator[tuple[str, _Change, _Change, torch.Tensor]]:
    """Of each change its name, what it does to places and to intensities, and to the components of a field."""
    ndim = fixed.ndim - 2
    ones = torch.ones(1, ndim, *[1] * ndim, device=fixed.device)
    yield "offset", torch.clone, lambda image: image + _OFFSET, ones
    yield "scale", torch.clone, lambda image: image * _SCALE, ones
    for axis in range(ndim):
        sign = ones.clone()
        sign[:, axis] = -1
        yield "flip", lambda image, axis=axis: image.flip(axis + 2), torch.clone, sign  # type: ignore[misc]
    yield "shift", _shifted, torch.clone, ones


def _shift(length: int) -> int:
    """By how many voxels an axis is shifted: a short one by half of it at most."""
    return min(_SHIFT, length // 2)


def _shifted(image: torch.Tensor) -> torch.Tensor:
    for dim in range(2, image.ndim):
        n = image.shape[dim]
        image = image.index_select(dim, (torch.arange(n, device=image.device) - _shift(n)).clamp(min=0))
    return image


def _common_region(fixed: torch.Tensor) -> torch.Tensor:
    """What lies away from the border before and after a shift."""
    region = torch.ones_like(fixed, dtype=torch.bool)
    for dim, n in enumerate(fixed.shape[2:], start=2):
        place = torch.arange(n, device=fixed.device).view(-1, *[1] * (fixed.ndim - 1 - dim))
        region &= (place >= n // 8 + _shift(n)) & (place < n - n // 8)
    return region


def _statistics(difference: torch.Tensor, region: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Largest and mean length of a field within a region ``(B, 1, *spatial)``, of each item."""
    lengths = torch.linalg.vector_norm(difference.double(), dim=1).flatten(1)
    parts = [length[inside] for length, inside in zip(lengths, region.flatten(1), strict=True)]
    largest = [part.max() if len(part) else part.new_tensor(torch.nan) for part in parts]
    return torch.stack(largest).cpu(), torch.stack([part.mean() for part in parts]).cpu()
