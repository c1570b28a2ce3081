# SPDX-License-Identifier: Apache-2.0
"""Dice and Hausdorff distance of label maps against closed forms and brute force over all pairs of surface voxels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor, decollate_batch, list_data_collate
from scipy import ndimage
from scipy.spatial.distance import cdist

from monai_deq.metrics import LabelDiceMetric, LabelHausdorffMetric, compute_label_dice, compute_label_hausdorff

NAN = float("nan")
LABELS = [7, 2035, 1]  # out of order and with gaps, as FreeSurfer numbers
SIZES = [(14, 11), (9, 12, 8)]
# columns of different length that lie along other axes of the world than the array's, as those of a coronal slice do
AFFINE = np.array([[0.7, 0, 0, 3], [0, 0, -3.0, 7], [0, 2.5, 0, -4], [0, 0, 0, 1.0]])
SPACING = (0.7, 2.5, 3.0)
OBLIQUE = np.array([[1.2, -0.5, 0, 1], [0.9, 2.0, 0, 0], [0, 0, 0.4, 5], [0, 0, 0, 1.0]])


def random_labels(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    values = torch.tensor([0, 0, 1, 7, 2035, 99])  # 99 is not scored
    return values[torch.randint(0, len(values), (2, 1, *shape), generator=torch.Generator().manual_seed(seed))]


def dice_brute_force(warped: np.ndarray, fixed: np.ndarray, label: int) -> float:
    w, f = warped == label, fixed == label
    return 2 * (w & f).sum() / (w.sum() + f.sum()) if w.any() and f.any() else NAN


def surface_points(structure: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    """Voxels of the structure with a face neighbour outside it or outside the image, in mm."""
    padded = np.pad(structure, 1)
    inner = np.logical_and.reduce([np.roll(padded, s, axis) for axis in range(padded.ndim) for s in (1, -1)])
    return (np.argwhere(padded & ~inner) - 1) * np.asarray(spacing)


def hausdorff_brute_force(warped, fixed, label: int, spacing, percentile: float = 100) -> float:
    if not (warped == label).any() or not (fixed == label).any():
        return NAN
    distance = cdist(surface_points(warped == label, spacing), surface_points(fixed == label, spacing))
    return max(np.percentile(distance.min(axis=0), percentile), np.percentile(distance.min(axis=1), percentile))


@pytest.mark.parametrize("shape", [(9, 12), (5, 7, 6)])
@pytest.mark.parametrize("dtype", [torch.int16, torch.float32])
def test_dice_agrees_with_numpy(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    warped, fixed = random_labels(shape, 0), random_labels(shape, 1)
    warped[0][warped[0] == 7] = 0
    fixed[1][fixed[1] == 1] = 0
    expected = [[dice_brute_force(w, f, x) for x in LABELS] for w, f in zip(warped.numpy(), fixed.numpy(), strict=True)]
    result = compute_label_dice(warped.to(dtype), fixed.to(dtype), LABELS)
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-6)
    assert np.isnan(expected).sum() == 2


def test_dice_of_shifted_squares() -> None:
    fixed = torch.zeros(1, 1, 10, 10, dtype=torch.long)
    fixed[..., 2:6, 2:6] = 3
    warped = fixed.roll(1, dims=2)
    torch.testing.assert_close(compute_label_dice(warped, fixed, [3, 4]), torch.tensor([[0.75, NAN]]), equal_nan=True)


def test_a_label_lost_in_the_warp_scores_zero_when_the_moving_labels_are_known() -> None:
    fixed = torch.zeros(2, 1, 8, 8, dtype=torch.long)
    fixed[..., :4, :4] = 1
    fixed[..., 6:, :] = 2
    warped = torch.where(fixed == 2, 0, fixed)  # lost by the warp in item 0, not in the moving image of item 1
    moving = torch.zeros(2, 1, 5, 9, dtype=torch.long)
    moving[:, :, 0, 0] = 1
    moving[0, :, 4, 4] = 2
    without = torch.tensor([[1.0, NAN], [1.0, NAN]])
    known = torch.tensor([[1.0, 0.0], [1.0, NAN]])
    torch.testing.assert_close(compute_label_dice(warped, fixed, [1, 2]), without, equal_nan=True)
    torch.testing.assert_close(compute_label_dice(warped, fixed, [1, 2], moving), known, equal_nan=True)
    metric = LabelDiceMetric([1, 2])
    torch.testing.assert_close(metric(warped, fixed, moving_label=moving), known, equal_nan=True)
    torch.testing.assert_close(metric(list(warped), list(fixed), moving_label=list(moving)), known, equal_nan=True)
    assert metric.aggregate().item() == pytest.approx((0.5 + 1 + 0.5 + 1) / 4)
    with pytest.raises(ValueError, match="moving_label: expected 2 items"):
        metric(list(warped), list(fixed), moving_label=[moving[0]])
    with pytest.raises(ValueError, match="moving_label: expected 2 items"):
        metric(warped, fixed, moving_label=moving[:1])
    with pytest.raises(ValueError, match="moving_label: expected 2 batch items, got 1"):
        compute_label_dice(warped, fixed, [1, 2], moving[:1])


@pytest.mark.parametrize(
    ("shape", "spacing"),
    [((9, 12), None), ((9, 12), (0.7, 2.5)), ((6, 8, 7), 1.5), ((6, 8, 7), np.float32([1.5, 0.5, 3.0]))],
)
@pytest.mark.parametrize("percentile", [None, 50.0])
def test_hausdorff_agrees_with_all_pairs(shape, spacing, percentile) -> None:
    warped, fixed = torch.zeros(2, 2, 1, *shape, dtype=torch.long)
    generator = np.random.default_rng(7)
    for item in (*warped, *fixed):  # overlapping boxes, some at the border of the image
        for label in (99, *LABELS):
            start = generator.integers(0, np.array(shape) - 3)
            item[(0, *(slice(a, a + generator.integers(2, 5)) for a in start))] = label
    warped[1][warped[1] == 7] = 0
    voxel_size = np.broadcast_to(1.0 if spacing is None else spacing, len(shape))
    expected = [
        [hausdorff_brute_force(w[0], f[0], x, voxel_size, percentile or 100) for x in LABELS]
        for w, f in zip(warped.numpy(), fixed.numpy(), strict=True)
    ]
    result = compute_label_hausdorff(warped, fixed, LABELS, spacing, percentile)
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-5)
    assert np.isnan(expected[1][0])
    assert np.nanmax(expected) > 0


def test_hausdorff_of_a_shift_is_its_length_in_mm() -> None:
    fixed = torch.zeros(1, 1, 16, 16, 16)
    fixed[..., 4:8, 4:8, 4:8] = 5
    warped = fixed.roll((3, 2), dims=(2, 4))
    result = compute_label_hausdorff(warped, fixed, [5, 6], spacing=(2.0, 1.0, 4.0))
    torch.testing.assert_close(result, torch.tensor([[10.0, NAN]]), equal_nan=True)


@pytest.mark.parametrize("compute", [compute_label_dice, compute_label_hausdorff])
@pytest.mark.parametrize(
    ("warped", "labels", "error", "message"),
    [
        (torch.ones(1, 1, 4, 4), [0, 1], ValueError, "labels: expected one or more integers above 0"),
        (torch.ones(1, 1, 4, 4), [], ValueError, "labels: expected one or more integers above 0"),
        (torch.ones(1, 1, 4, 4), [1.5], ValueError, "labels: expected one or more integers above 0"),
        (torch.ones(1, 1, 4, 4), [2, 2], ValueError, "labels: expected each label once"),
        (torch.full((1, 1, 4, 4), 0.5), [1], ValueError, "warped_label: expected integer values"),
        (torch.full((1, 1, 4, 4), NAN), [1], ValueError, "warped_label: expected integer values"),
        (torch.ones(1, 2, 4, 4), [1], ValueError, r"warped_label: expected shape .* got \(1, 2, 4, 4\)"),
        (torch.ones(1, 1, 4, 5), [1], ValueError, r"expected the shape of fixed_label, \(1, 1, 4, 4\)"),
        (np.ones((1, 1, 4, 4)), [1], TypeError, "warped_label: expected a torch.Tensor, got ndarray"),
    ],
)
def test_bad_input_is_refused(compute, warped, labels, error, message) -> None:
    with pytest.raises(error, match=message):
        compute(warped, torch.ones(1, 1, 4, 4), labels)


@pytest.mark.parametrize("spacing", [0, -1.0, (1.0, 1.0, 1.0), (1.0, NAN)])
def test_bad_spacing_is_refused(spacing) -> None:
    with pytest.raises(ValueError, match="spacing: expected voxel sizes in mm above 0: one number, 2,"):
        compute_label_hausdorff(torch.ones(1, 1, 4, 4), torch.ones(1, 1, 4, 4), [1], spacing=spacing)


@pytest.mark.parametrize("percentile", [0, 101, -5])
def test_bad_percentile_is_refused(percentile) -> None:
    with pytest.raises(ValueError, match="percentile: expected a number above 0 and up to 100"):
        compute_label_hausdorff(torch.ones(1, 1, 4, 4), torch.ones(1, 1, 4, 4), [1], percentile=percentile)


def test_metric_averages_over_labels_then_over_pairs() -> None:
    fixed = torch.zeros(2, 1, 8, 8, dtype=torch.long)
    fixed[:, :, :4] = 1
    fixed[0, :, 4:] = 2  # the second pair has one label only
    warped = fixed.clone()
    warped[1] = torch.where(torch.arange(8)[:, None] < 2, 1, 0)
    metric = LabelDiceMetric([1, 2])
    metric(y_pred=warped[:1], y=fixed[:1])
    metric(y_pred=[warped[1]], y=[fixed[1]])
    # over pairs (1 + 2/3) / 2; over all scores it would be (1 + 1 + 2/3) / 3
    assert metric.aggregate().item() == pytest.approx((1 + 2 / 3) / 2)
    with pytest.raises(ValueError, match="y: expected the fixed labels, got None"):
        metric(y_pred=warped)


def label_maps(size: tuple[int, ...], seed: int, batch: int = 1) -> torch.Tensor:
    """Blobs of the labels 1, 2 and 7, (B, 1, *size)."""
    rng = np.random.default_rng(seed)
    smooth = np.stack([ndimage.gaussian_filter(rng.normal(size=size), 1.3) for _ in range(batch)])
    edges = np.quantile(smooth, (0.5, 0.7, 0.85))
    return torch.from_numpy(np.array([0, 1, 2, 7])[np.digitize(smooth, edges)])[:, None].float()


def with_affine(label: torch.Tensor, affine: np.ndarray, ndim: int) -> MetaTensor:
    """One item (1, *size) with a 4x4 affine, as a slice has when it is read from a file."""
    return MetaTensor(label, affine=affine, spatial_ndim=ndim)


@pytest.mark.parametrize(("size", "percentile"), [(SIZES[0], 95), (SIZES[1], None)])
def test_spacing_of_the_fixed_labels(size: tuple[int, ...], percentile: float | None) -> None:
    ndim = len(size)
    labels = (2, 1, 7, 9)
    warped, fixed = label_maps(size, 0, 2), label_maps(size, 1, 2)
    affines = (AFFINE, OBLIQUE)
    spacings = SPACING[:ndim], tuple(np.linalg.norm(OBLIQUE[:3, :ndim], axis=0))
    expected = [
        [hausdorff_brute_force(w[0].numpy(), f[0].numpy(), n, s, percentile or 100) for n in labels]
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
        return [hausdorff_brute_force(warped[0, 0].numpy(), fixed[0, 0].numpy(), n, spacing) for n in (1, 2)]

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
    truth = hausdorff_brute_force(warped[0, 0].numpy(), fixed[0, 0].numpy(), 1, (0.5, 2.0))
    assert float(LabelHausdorffMetric([1])(y_pred=[warped[0]], y=[meta])) == pytest.approx(truth, rel=1e-5)


def test_several_calls_of_hausdorff_are_one_evaluation() -> None:
    metric = LabelHausdorffMetric((1, 9), get_not_nans=True)
    scores = []
    for seed in range(3):
        warped, fixed = label_maps((12, 10), seed), label_maps((12, 10), seed + 10)
        metric(y_pred=warped, y=fixed)
        scores.append(hausdorff_brute_force(warped[0, 0].numpy(), fixed[0, 0].numpy(), 1, (1.0, 1.0)))
    value, not_nans = metric.aggregate()
    assert float(value) == pytest.approx(np.mean(scores), rel=1e-5) and int(not_nans) == 3
    metric.reset()
    metric(y_pred=warped, y=torch.zeros_like(fixed))
    assert np.isnan(float(metric.aggregate()[0]))


def test_metric_refuses() -> None:
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
