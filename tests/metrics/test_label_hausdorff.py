# SPDX-License-Identifier: Apache-2.0
"""LabelHausdorffMetric against brute force over all pairs of surface voxels, in mm."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor, decollate_batch, list_data_collate
from scipy import ndimage
from scipy.spatial.distance import cdist

from monai_deq.metrics import LabelHausdorffMetric

SIZES = [(14, 11), (9, 12, 8)]
# columns of different length that lie along other axes of the world than the array's, as those of a coronal slice do
AFFINE = np.array([[0.7, 0, 0, 3], [0, 0, -3.0, 7], [0, 2.5, 0, -4], [0, 0, 0, 1.0]])
SPACING = (0.7, 2.5, 3.0)
OBLIQUE = np.array([[1.2, -0.5, 0, 1], [0.9, 2.0, 0, 0], [0, 0, 0.4, 5], [0, 0, 0, 1.0]])


def surface(mask: np.ndarray, spacing: tuple[float, ...]) -> np.ndarray:
    """Positions in mm of the voxels of a mask that touch its outside."""
    return np.argwhere(mask & ~ndimage.binary_erosion(mask)) * np.asarray(spacing)


def brute_force(a: np.ndarray, b: np.ndarray, label: int, spacing: tuple[float, ...], percentile: float = 100) -> float:
    if not ((a == label).any() and (b == label).any()):
        return float("nan")
    distances = cdist(surface(a == label, spacing), surface(b == label, spacing))
    return max(np.percentile(distances.min(axis=i), percentile) for i in (0, 1))


def label_maps(size: tuple[int, ...], seed: int, batch: int = 1) -> torch.Tensor:
    """Blobs of the labels 1, 2 and 7, (B, 1, *size)."""
    rng = np.random.default_rng(seed)
    smooth = np.stack([ndimage.gaussian_filter(rng.normal(size=size), 1.3) for _ in range(batch)])
    edges = np.quantile(smooth, (0.5, 0.7, 0.85))
    return torch.from_numpy(np.array([0, 1, 2, 7])[np.digitize(smooth, edges)])[:, None].float()


def with_affine(label: torch.Tensor, affine: np.ndarray, ndim: int) -> MetaTensor:
    """One item (1, *size) with a 4x4 affine, as a slice has when it is read from a file."""
    return MetaTensor(label, affine=affine, spatial_ndim=ndim)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("percentile", [None, 95, 50])
def test_spacing_of_the_fixed_labels(size: tuple[int, ...], percentile: float | None) -> None:
    ndim = len(size)
    labels = (2, 1, 7, 9)
    warped, fixed = label_maps(size, 0, 2), label_maps(size, 1, 2)
    affines = (AFFINE, OBLIQUE)
    spacings = SPACING[:ndim], tuple(np.linalg.norm(OBLIQUE[:3, :ndim], axis=0))
    expected = [
        [brute_force(w[0].numpy(), f[0].numpy(), n, s, percentile or 100) for n in labels]
        for w, f, s in zip(warped, fixed, spacings, strict=True)
    ]
    assert np.isfinite(expected).sum() == 6
    items = [with_affine(f, a, ndim) for f, a in zip(fixed, affines, strict=True)]
    batch = list_data_collate(items)
    assert batch.affine.shape == (2, 4, 4)
    forms: list[tuple[Any, Any]] = [(list(warped), items), (warped, batch), (list(warped), decollate_batch(batch))]
    for w, f in forms:
        metric = LabelHausdorffMetric(labels, percentile=percentile)
        np.testing.assert_allclose(metric(y_pred=w, y=f), expected, rtol=1e-5)
        # over the labels of a pair, then over the pairs
        assert float(metric.aggregate()) == pytest.approx(np.nanmean(np.nanmean(expected, axis=1)), rel=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_spacing_that_is_given_or_missing(size: tuple[int, ...]) -> None:
    ndim = len(size)
    warped, fixed = label_maps(size, 2), label_maps(size, 3)
    meta = with_affine(fixed[0], AFFINE, ndim)

    def expected(*spacing: float) -> list[float]:
        return [brute_force(warped[0, 0].numpy(), fixed[0, 0].numpy(), n, spacing) for n in (1, 2)]

    ones, given = (1.0,) * ndim, (2.0, 0.5, 4.0)[:ndim]
    for spacing, truth in [(None, ones), (given, given), (3, (3.0,) * ndim)]:
        scores = LabelHausdorffMetric((1, 2), spacing)(y_pred=warped, y=fixed)
        np.testing.assert_allclose(scores[0], expected(*truth), rtol=1e-5)
    # what is given goes before what the image says; the warped labels' own spacing does not count
    scores = LabelHausdorffMetric((1, 2), given)(y_pred=[warped[0]], y=[meta])
    np.testing.assert_allclose(scores[0], expected(*given), rtol=1e-5)
    elsewhere = with_affine(warped[0], np.diag([9.0, 9, 9, 1]), ndim)
    scores = LabelHausdorffMetric((1, 2))(y_pred=[elsewhere], y=[meta])
    np.testing.assert_allclose(scores[0], expected(*SPACING[:ndim]), rtol=1e-5)


def test_slice_with_a_planar_affine() -> None:
    warped, fixed = label_maps((10, 9), 4), label_maps((10, 9), 5)
    meta = MetaTensor(fixed[0], affine=np.array([[0, 2.0, 0], [0.5, 0, 0], [0, 0, 1.0]]))
    truth = brute_force(warped[0, 0].numpy(), fixed[0, 0].numpy(), 1, (0.5, 2.0))
    assert float(LabelHausdorffMetric([1])(y_pred=[warped[0]], y=[meta])) == pytest.approx(truth, rel=1e-5)


def test_several_calls_are_one_evaluation() -> None:
    metric = LabelHausdorffMetric((1, 9), get_not_nans=True)
    scores = []
    for seed in range(3):
        warped, fixed = label_maps((12, 10), seed), label_maps((12, 10), seed + 10)
        metric(y_pred=warped, y=fixed)
        scores.append(brute_force(warped[0, 0].numpy(), fixed[0, 0].numpy(), 1, (1.0, 1.0)))
    value, not_nans = metric.aggregate()
    assert float(value) == pytest.approx(np.mean(scores), rel=1e-5) and int(not_nans) == 3
    metric.reset()
    metric(y_pred=warped, y=torch.zeros_like(fixed))
    assert np.isnan(float(metric.aggregate()[0]))


def test_errors() -> None:
    for labels in ((), (0, 1), (1, 1)):
        with pytest.raises(ValueError, match="labels"):
            LabelHausdorffMetric(labels)
    metric = LabelHausdorffMetric([1])
    with pytest.raises(ValueError, match="fixed labels, got None"):
        metric(y_pred=torch.zeros(1, 1, 4, 4))
    with pytest.raises(ValueError, match="shape of fixed_label"):
        metric(y_pred=torch.zeros(1, 1, 4, 4), y=MetaTensor(torch.zeros(1, 1, 4, 5)))
    with pytest.raises(ValueError, match="2 items"):
        metric(y_pred=torch.zeros(2, 1, 4, 4), y=MetaTensor(torch.zeros(1, 1, 4, 4)))
