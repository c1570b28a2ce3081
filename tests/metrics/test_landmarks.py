# SPDX-License-Identifier: Apache-2.0
"""Target registration error against closed forms and a float64 computation with SciPy."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor, list_data_collate
from scipy import ndimage

from monai_deq.metrics import (
    TargetRegistrationErrorMetric,
    compute_landmark_errors,
    compute_target_registration_error,
)

SIZES = [(9, 14), (7, 12, 5)]
SPACING = (0.7, 2.0, 3.5)


def draw(
    size: tuple[int, ...], batch: int = 3, number: int = 17, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ddf = 2 * torch.randn(batch, len(size), *size, generator=generator)
    fixed, moving = (
        torch.rand(batch, number, len(size), generator=generator) * (torch.tensor(size) - 1) for _ in range(2)
    )
    return ddf, fixed, moving


def brute_force(
    ddf: torch.Tensor, fixed: torch.Tensor, moving: torch.Tensor, spacing: Any, order: int = 1
) -> np.ndarray:
    """Errors of one pair, point by point."""
    field, p, q = (tensor.double().numpy() for tensor in (ddf, fixed, moving))
    displacement = np.stack([ndimage.map_coordinates(channel, p.T, order=order) for channel in field], axis=1)
    return np.sqrt((((p + displacement - q) * np.asarray(spacing)) ** 2).sum(axis=1))


@pytest.mark.parametrize("size", SIZES)
def test_agrees_with_scipy(size: tuple[int, ...]) -> None:
    ddf, fixed, moving = draw(size)
    spacing = SPACING[: len(size)]
    expected = np.stack([brute_force(*item, spacing) for item in zip(ddf, fixed, moving, strict=True)])
    errors = compute_landmark_errors(ddf, fixed, moving, spacing)
    assert errors.shape == (3, 17) and errors.dtype == torch.float64
    np.testing.assert_allclose(errors, expected, rtol=1e-12)
    score = compute_target_registration_error(ddf, fixed, moving, spacing)
    np.testing.assert_allclose(score, expected.mean(axis=1, keepdims=True), rtol=1e-12)
    for percentile in (0, 25, 70, 95, 100):
        score = compute_target_registration_error(ddf, fixed, moving, spacing, percentile)
        np.testing.assert_allclose(score, np.percentile(expected, percentile, axis=1, keepdims=True), rtol=1e-12)


@pytest.mark.parametrize("size", SIZES)
def test_form_of_learn2reg(size: tuple[int, ...]) -> None:
    """Cubic splines; a field that is zero beyond the outermost voxel centres."""
    ddf, fixed, moving = draw(size)
    fixed[0, 3] = -0.4
    expected = np.stack([brute_force(*item, 2.0, order=3) for item in zip(ddf, fixed, moving, strict=True)])
    errors = compute_landmark_errors(ddf, fixed, moving, 2.0, form="learn2reg")
    np.testing.assert_allclose(errors, expected, rtol=1e-9)
    assert float(errors[0, 3]) == pytest.approx(2 * float((fixed[0, 3] - moving[0, 3]).norm()), rel=1e-6)
    assert not np.allclose(errors, compute_landmark_errors(ddf, fixed, moving, 2.0), rtol=0.01)
    metric = TargetRegistrationErrorMetric(spacing=2, percentile=70, form="learn2reg")
    metric(list(ddf), list(fixed), moving_points=list(moving))
    np.testing.assert_allclose(metric.aggregate(), [np.percentile(expected, 70, axis=1).mean()], rtol=1e-6)
    nothing = torch.zeros(3, 0, len(size))
    assert compute_target_registration_error(ddf, nothing, nothing, 1, form="learn2reg").isnan().all()


@pytest.mark.parametrize("size", SIZES)
def test_known_lengths(size: tuple[int, ...]) -> None:
    ndim = len(size)
    fixed = draw(size)[1] / 2 + 1
    shift = torch.tensor([3.0, -4.0, 12.0][:ndim])
    ddf = torch.zeros(3, ndim, *size)
    lengths = {2: 5.0, 3: 13.0}
    np.testing.assert_allclose(compute_landmark_errors(ddf, fixed, fixed + shift, 2.0), 2 * lengths[ndim], rtol=1e-6)
    # 12 mm along each axis
    spacing = [4.0, 3.0, 1.0][:ndim]
    expected = {2: np.sqrt(288), 3: np.sqrt(432)}[ndim]
    np.testing.assert_allclose(compute_landmark_errors(ddf, fixed, fixed + shift, spacing), expected, rtol=1e-6)
    # the field of the shift itself takes the fixed points to the moving ones; its opposite doubles the error
    field = shift.view(1, ndim, *[1] * ndim).expand(3, ndim, *size)
    assert compute_target_registration_error(field, fixed, fixed + shift, spacing).max() < 1e-5
    opposite = compute_target_registration_error(-field, fixed, fixed + shift, spacing)
    np.testing.assert_allclose(opposite, 2 * expected, rtol=1e-6)


def test_each_item_has_its_own_spacing() -> None:
    ddf, fixed, moving = draw((9, 14), batch=2)
    spacing = torch.tensor([[1.0, 2.0], [0.5, 3.0]])
    both = compute_landmark_errors(ddf, fixed, moving, spacing)
    for i in range(2):
        one = compute_landmark_errors(ddf[i : i + 1], fixed[i : i + 1], moving[i : i + 1], spacing[i])
        torch.testing.assert_close(both[i : i + 1], one)
    assert (both[0] != compute_landmark_errors(ddf, fixed, moving, spacing[1])[0]).all()


def test_points_outside(caplog: pytest.LogCaptureFixture) -> None:
    ddf = torch.zeros(1, 2, 5, 6)
    ddf[:, 0, -1] = 1.5
    fixed = torch.tensor([[[6.0, 2.0], [1.0, 1.0]]])
    moving = torch.tensor([[[7.0, 2.0], [-8.0, 1.0]]])  # the moving landmarks may lie anywhere
    with pytest.raises(ValueError, match="1 of 2 points lie outside"):
        compute_landmark_errors(ddf, fixed, moving, 1)
    with caplog.at_level(logging.WARNING, logger="monai_deq"):
        errors = compute_landmark_errors(ddf, fixed, moving, 1, outside="clamp")
    assert errors.tolist() == [[0.5, 9.0]] and "1 of 2 points lie outside" in caplog.text


def test_no_landmarks_is_no_score() -> None:
    ddf, none = torch.zeros(2, 2, 4, 4), torch.zeros(2, 0, 2)
    assert compute_target_registration_error(ddf, none, none, 1).isnan().all()
    assert compute_target_registration_error(ddf, none, none, 1, percentile=70).isnan().all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"moving_points": torch.zeros(1, 4, 2)}, ValueError, r"moving_points: expected shape \(1, 5, 2\).*\(1, 4, 2"),
        ({"fixed_points": torch.zeros(1, 5, 3)}, ValueError, r"moving_points: expected shape \(1, 5, 3\)"),
        ({"fixed_points": torch.full((1, 5, 2), float("inf"))}, ValueError, "fixed_points: expected finite"),
        ({"moving_points": torch.full((1, 5, 2), float("nan"))}, ValueError, "moving_points: expected finite"),
        ({"fixed_points": [[0.0, 0.0]]}, TypeError, "fixed_points: expected a torch.Tensor, got list"),
        ({"ddf": torch.full((1, 2, 6, 6), float("nan"))}, ValueError, "ddf: expected finite"),
        ({"spacing": (1.0, 2.0, 3.0)}, ValueError, "spacing: expected voxel sizes"),
        ({"spacing": 0.0}, ValueError, "spacing: expected voxel sizes"),
        ({"spacing": (1.0, float("nan"))}, ValueError, "spacing: expected voxel sizes"),
        ({"outside": "zeros"}, ValueError, "outside: expected"),
        ({"form": "cubic"}, ValueError, "form: expected 'linear' or 'learn2reg', got 'cubic'"),
        ({"percentile": 101}, ValueError, "percentile: expected None or a number from 0 to 100, got 101"),
    ],
)
def test_bad_input_is_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {
        "ddf": torch.zeros(1, 2, 6, 6),
        "fixed_points": torch.zeros(1, 5, 2),
        "moving_points": torch.zeros(1, 5, 2),
        "spacing": 1.0,
        **change,
    }
    with pytest.raises(error, match=message):
        compute_target_registration_error(**arguments)


def test_metric_takes_sets_of_different_length() -> None:
    """Mean over the landmarks of a pair, then over pairs: not over all landmarks."""
    size = (7, 12, 5)
    metric = TargetRegistrationErrorMetric(spacing=SPACING)
    expected = []
    for number in (4, 30):
        ddf, fixed, moving = draw(size, batch=1, number=number, seed=number)
        expected.append(brute_force(ddf[0], fixed[0], moving[0], SPACING).mean())
        if number == 4:
            scores = metric(y_pred=ddf, y=fixed, moving_points=moving)
            assert scores.shape == (1, 1)
            before = [ddf[0]], [fixed[0]], [moving[0]]
    metric(y_pred=list(ddf), y=list(fixed), moving_points=list(moving))
    np.testing.assert_allclose(metric.aggregate(), [np.mean(expected)], rtol=1e-6)
    metric.reset()
    both = [a + list(b) for a, b in zip(before, (ddf, fixed, moving), strict=True)]
    scores = metric(both[0], both[1], moving_points=both[2])
    np.testing.assert_allclose(scores[:, 0], expected, rtol=1e-6)


def test_percentile_over_pairs_is_that_of_learn2reg() -> None:
    """The challenge reports the 0.7 quantile of the mean errors of the pairs."""
    ddf, fixed, moving = draw((9, 14), batch=6, number=8)
    means = [brute_force(*item, 1.0).mean() for item in zip(ddf, fixed, moving, strict=True)]
    metric = TargetRegistrationErrorMetric(spacing=1, pair_percentile=70, get_not_nans=True)
    metric(ddf[:2], fixed[:2], moving_points=moving[:2])
    metric(list(ddf[2:]), list(fixed[2:]), moving_points=list(moving[2:]))
    nothing = torch.zeros(1, 0, 2)  # a pair without landmarks does not count
    metric(ddf[:1], nothing, moving_points=nothing)
    score, number = metric.aggregate()
    assert float(score) == pytest.approx(np.quantile(means, 0.7), rel=1e-6) and number == 6
    assert float(metric.aggregate("mean")[0]) == pytest.approx(np.mean(means), rel=1e-6)
    worst = TargetRegistrationErrorMetric(spacing=1, percentile=100)
    worst(ddf, fixed, moving_points=moving)
    errors = [brute_force(*item, 1.0).max() for item in zip(ddf, fixed, moving, strict=True)]
    assert float(worst.aggregate()) == pytest.approx(np.mean(errors), rel=1e-6)


@pytest.mark.parametrize("ndim", [2, 3])
def test_spacing_comes_from_the_affine(ndim: int) -> None:
    """Of a slice that lies in x and z, where MONAI's own ``pixdim`` is wrong."""
    size = (7, 12, 5)[:ndim]
    affine = np.array([[0.7, 0, 0, 3], [0, 0, -3.5, 7], [0, 2.0, 0, -4], [0, 0, 0, 1.0]])
    ddf, fixed, moving = draw(size, batch=2)
    means = [brute_force(*item, SPACING[:ndim]).mean() for item in zip(ddf, fixed, moving, strict=True)]
    fields = [MetaTensor(field, affine=affine, spatial_ndim=ndim) for field in ddf]
    images = [MetaTensor(torch.zeros(1, *size), affine=affine, spatial_ndim=ndim) for _ in ddf]
    for y_pred, reference in ((fields, None), (list(ddf), images)):
        metric = TargetRegistrationErrorMetric()
        scores = metric(y_pred, list(fixed), moving_points=list(moving), reference=reference)
        np.testing.assert_allclose(scores[:, 0], means, rtol=1e-6)
    own = TargetRegistrationErrorMetric(spacing=1)(fields, list(fixed), moving_points=list(moving))
    assert not np.allclose(own[:, 0], means)
    with pytest.raises(ValueError, match="spacing: the field carries no affine"):
        TargetRegistrationErrorMetric()(ddf, fixed, moving_points=moving)


def test_metric_refuses() -> None:
    ddf, fixed, moving = draw((9, 14), batch=2)
    metric = TargetRegistrationErrorMetric(spacing=1)
    with pytest.raises(ValueError, match="y: expected landmarks, got None"):
        metric(ddf, moving_points=moving)
    with pytest.raises(ValueError, match="moving_points: expected landmarks, got None"):
        metric(list(ddf), list(fixed))
    with pytest.raises(ValueError, match="moving_points: expected 2 items, as in y_pred, got 1"):
        metric(list(ddf), list(fixed), moving_points=[moving[0]])
    with pytest.raises(ValueError, match=r"moving_points: expected shape \(1, 17, 2\)"):
        metric(list(ddf), list(fixed), moving_points=[moving[0], moving[1, :5]])
    with pytest.raises(ValueError, match="1 of 17 points lie outside"):
        far = fixed.clone()
        far[1, 3] = 50
        metric(list(ddf), list(far), moving_points=list(moving))
    for argument in ("percentile", "pair_percentile"):
        with pytest.raises(ValueError, match=f"^{argument}: expected None or a number"):
            TargetRegistrationErrorMetric(**{argument: -1})
    with pytest.raises(ValueError, match="outside: expected"):
        TargetRegistrationErrorMetric(outside="keep")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="form: expected"):
        TargetRegistrationErrorMetric(form="paper")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="holds no scores"):
        TargetRegistrationErrorMetric(pair_percentile=70).aggregate()


@pytest.mark.parametrize("form", ["linear", "learn2reg"])
@pytest.mark.parametrize("ndim", [2, 3])
def test_no_field_is_the_error_before_registration(ndim: int, form: Any) -> None:
    size = (7, 12, 5)[:ndim]
    _, fixed, moving = draw(size, batch=2)
    affines = [np.diag([0.7, 2.0, 3.5, 1.0]), np.diag([1.5, 0.5, 1.0, 1.0])]
    images = [MetaTensor(torch.zeros(1, *size), affine=affine, spatial_ndim=ndim) for affine in affines]
    expected = [
        np.linalg.norm((p.double() - q.double()).numpy() * np.diag(affine)[:ndim], axis=1).mean()
        for p, q, affine in zip(fixed, moving, affines, strict=True)
    ]
    for points, reference in (((list(fixed), list(moving)), images), ((fixed, moving), list_data_collate(images))):
        scores = TargetRegistrationErrorMetric(form=form)(None, *points, reference)
        np.testing.assert_allclose(scores[:, 0], expected, rtol=1e-9)
    # the pairs may have different numbers of landmarks, and points outside the image are seen
    metric = TargetRegistrationErrorMetric(spacing=1, form=form)
    scores = metric(None, [fixed[0, :4], fixed[1]], [moving[0, :4], moving[1]], images)
    assert float(scores[0]) == pytest.approx(float((fixed[0, :4] - moving[0, :4]).norm(dim=1).mean()), rel=1e-5)
    with pytest.raises(ValueError, match="1 of 17 points lie outside"):
        fixed[0, 2] = 50
        metric(None, list(fixed), list(moving), images)
    with pytest.raises(ValueError, match="reference: expected an image where y_pred is None"):
        metric(None, fixed, moving)
