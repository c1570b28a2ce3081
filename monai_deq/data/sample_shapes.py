# SPDX-License-Identifier: Apache-2.0
"""Shapes and textures that the synthetic cohorts are made of, as functions of position in mm."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = ["SmoothWaves", "ellipsoid_depth"]


class SmoothWaves:
    """
    A smooth random field of one wavelength: a sum of plane waves, so that it can be evaluated anywhere.

    Args:
        rng: draws the directions and phases of the waves.
        wavelength: in mm.
        count: number of waves. Defaults to 20.
    """

    def __init__(self, rng: np.random.Generator, wavelength: float, count: int = 20) -> None:
        direction = rng.normal(size=(count, 3))
        direction /= np.linalg.norm(direction, axis=1, keepdims=True)
        self.k = (2 * np.pi / wavelength * direction).astype(np.float32)
        self.phase = rng.uniform(0, 2 * np.pi, count).astype(np.float32)

    def __call__(self, points: np.ndarray) -> np.ndarray:
        """
        Args:
            points: ``(3, *spatial)`` in mm.

        Returns:
            ``(*spatial)``, float32, of about zero mean and unit variance.
        """
        total = np.zeros(points.shape[1:], dtype=np.float32)
        for k, phase in zip(self.k, self.phase, strict=True):
            total += np.cos(np.tensordot(k, points, axes=1) + phase)
        return total * np.float32(np.sqrt(2.0 / len(self.k)))


def ellipsoid_depth(q: Sequence[np.ndarray], radii: Sequence[np.ndarray | float]) -> np.ndarray:
    """
    Depth below the surface of an ellipsoid, to first order.

    Args:
        q: position along each axis of the ellipsoid from its centre, in mm.
        radii: its half axes in mm.

    Returns:
        depth in mm, negative outside, of the shape of the positions.
    """
    f = np.sqrt(sum((x / r) ** 2 for x, r in zip(q, radii, strict=True)))
    slope = np.sqrt(sum((x / np.square(r)) ** 2 for x, r in zip(q, radii, strict=True)))
    depth: np.ndarray = (1.0 - f) * f / np.maximum(slope, 1e-6)
    return depth
