# SPDX-License-Identifier: Apache-2.0
"""Jacobian determinant, folded voxels, std(log |J|) and non-diffeomorphic volume against closed forms and NumPy."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from scipy import ndimage

from monai_deq.metrics import (
    FoldedVoxelsMetric,
    NonDiffeomorphicVolumeMetric,
    StdLogJacobianMetric,
    compute_folded_voxels,
    compute_non_diffeomorphic_volume,
    compute_std_log_jacobian,
    jacobian_determinant,
)

SHAPES = [(5, 8), (2, 3), (4, 7, 5), (2, 2, 3)]


def jacobian_by_numpy(ddf: np.ndarray) -> np.ndarray:
    """|J| of one field (ndim, *spatial) in float64 by np.gradient and np.linalg.det."""
    n = len(ddf)
    gradients = np.stack([np.stack(np.gradient(ddf[i].astype(np.float64), axis=tuple(range(n)))) for i in range(n)])
    return np.linalg.det(np.moveaxis(gradients, (0, 1), (-2, -1)) + np.eye(n))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_jacobian_agrees_with_numpy(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    ddf = torch.randn(2, len(shape), *shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    jacobian = jacobian_determinant(ddf)
    assert jacobian.shape == (2, 1, *shape)
    assert jacobian.dtype == dtype
    expected = np.stack([jacobian_by_numpy(item) for item in ddf.numpy()])[:, None]
    np.testing.assert_allclose(jacobian.numpy(), expected, atol=1e-12 if dtype == torch.float64 else 1e-4)


@pytest.mark.parametrize("matrix", [[[1.2, 0.3], [-0.4, 0.7]], [[1.1, 0.2, -0.3], [0.4, 0.9, 0.1], [-0.2, 0.5, 1.3]]])
def test_affine_map_has_the_determinant_of_its_matrix_everywhere(matrix: list[list[float]]) -> None:
    n = len(matrix)
    grid = np.stack(np.meshgrid(*(np.arange(s) for s in (4, 6, 5)[:n]), indexing="ij")).astype(float)
    ddf = np.einsum("ij,j...->i...", np.array(matrix), grid) - grid
    jacobian = jacobian_determinant(torch.from_numpy(ddf)[None])
    np.testing.assert_allclose(jacobian.numpy(), np.linalg.det(matrix), rtol=1e-12)


@pytest.mark.parametrize("n", [2, 3])
def test_error_falls_with_the_square_of_the_voxel_size(n: int) -> None:
    errors = []
    for size in (16, 32):
        x = np.stack(np.meshgrid(*[np.arange(size)] * n, indexing="ij")) / size
        # component i depends on axis i and the next one, so that every element of the matrix takes part
        ddf = size * 0.05 * np.stack([np.sin(2 * np.pi * x[i]) + np.cos(2 * np.pi * x[(i + 1) % n]) for i in range(n)])
        matrix = np.tile(np.eye(n), (*x.shape[1:], 1, 1))
        for i in range(n):
            matrix[..., i, i] += 0.1 * np.pi * np.cos(2 * np.pi * x[i])
            matrix[..., i, (i + 1) % n] -= 0.1 * np.pi * np.sin(2 * np.pi * x[(i + 1) % n])
        difference = jacobian_determinant(torch.from_numpy(ddf)[None])[0, 0].numpy() - np.linalg.det(matrix)
        same_points = difference[(slice(None, None, size // 16),) * n][(slice(1, -1),) * n]
        errors.append(np.abs(same_points).max())
    assert errors[0] / errors[1] == pytest.approx(4.0, rel=0.05)


def test_half_precision_is_computed_in_float32() -> None:
    ddf = torch.full((1, 2, 6, 6), 200.0).half()
    ddf[:, 0] += torch.arange(6).half()[:, None] / 8  # exact in half precision: slope 1/8
    jacobian = jacobian_determinant(ddf)
    assert jacobian.dtype == torch.float32
    torch.testing.assert_close(jacobian, torch.full((1, 1, 6, 6), 1.125))


def test_metadata_is_dropped() -> None:
    assert type(jacobian_determinant(MetaTensor(torch.zeros(1, 2, 4, 4)))) is torch.Tensor


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 8, 8), r"expected shape .* got \(2, 8, 8\)"),
        ((1, 3, 8, 8), r"expected shape .* got \(1, 3, 8, 8\)"),
        ((1, 2, 8, 8, 8), r"expected shape .* got \(1, 2, 8, 8, 8\)"),
        ((0, 2, 8, 8), "B >= 1"),
        ((1, 3, 8, 8, 1), r"at least 2 voxels .* got spatial shape \(8, 8, 1\)"),
    ],
)
def test_wrong_shapes_are_refused(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        jacobian_determinant(torch.zeros(shape))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_field_that_is_not_finite_is_refused(value: float) -> None:
    ddf = torch.zeros(3, 2, 4, 4)
    ddf[1, 0, 2, 2] = value
    with pytest.raises(ValueError, match=r"batch item\(s\) \[1\]"):
        jacobian_determinant(ddf)


def test_arrays_are_refused() -> None:
    with pytest.raises(TypeError, match="got ndarray"):
        jacobian_determinant(np.zeros((1, 2, 4, 4)))  # type: ignore[arg-type]


def strip_fold(shape: tuple[int, ...], start: int, stop: int) -> torch.Tensor:
    """The map runs backwards from start to stop along the first axis: |J| is -1 between, 0 at both, 1 elsewhere."""
    displacement = -2.0 * (torch.arange(shape[0]).clamp(start, stop) - start)
    ddf = torch.zeros(1, len(shape), *shape)
    ddf[:, 0] = displacement.reshape(-1, *[1] * (len(shape) - 1))
    return ddf


@pytest.mark.parametrize("shape", [(11, 4), (11, 3, 5)])
def test_known_fold_counts_its_border(shape: tuple[int, ...]) -> None:
    ddf = torch.cat([strip_fold(shape, 3, 6), torch.zeros(1, len(shape), *shape)])
    torch.testing.assert_close(compute_folded_voxels(ddf), torch.tensor([[100.0 * 4 / 11], [0.0]]))


@pytest.mark.parametrize("offset", [1e3, 1e5, -1e6])
@pytest.mark.parametrize("shape", [(19, 16), (9, 8, 7)])
def test_folds_of_a_field_that_is_far_away(shape: tuple[int, ...], offset: float) -> None:
    # differences of neighbours in single precision are exact there; positions or means would not be
    ddf = 0.6 * torch.randn(2, len(shape), *shape, generator=torch.Generator().manual_seed(3)) + offset
    expected = np.stack([jacobian_by_numpy(item) for item in ddf.numpy()])[:, None]
    np.testing.assert_allclose(jacobian_determinant(ddf).numpy(), expected, atol=1e-5)
    folded = 100 * (expected <= -1e-9).reshape(2, -1).mean(axis=1)
    at_most = 100 * (expected <= 1e-9).reshape(2, -1).mean(axis=1)
    found = compute_folded_voxels(ddf)[:, 0].numpy()
    assert (folded - 1e-4 <= found).all() and (found <= at_most + 1e-4).all() and (folded > 1).all()
    # the simplices, by the same field in double precision without the constant
    near = compute_non_diffeomorphic_volume(ddf.double() - offset)
    torch.testing.assert_close(compute_non_diffeomorphic_volume(ddf).double(), near, rtol=1e-5, atol=0)


def test_mask_restricts_the_count() -> None:
    ddf = strip_fold((11, 4), 3, 6).expand(3, -1, -1, -1)
    mask = torch.zeros(3, 1, 11, 4)
    mask[0, :, 5:10, 1:3] = 7  # rows 5, 6 of 5 rows fold
    mask[1, :, :2] = 1
    folded = compute_folded_voxels(ddf, mask)
    torch.testing.assert_close(folded, torch.tensor([[40.0], [0.0], [float("nan")]]), equal_nan=True)


@pytest.mark.parametrize("shape", [(9, 6), (5, 7, 4)])
def test_folded_agrees_with_numpy(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(1)
    ddf = torch.randn(2, len(shape), *shape, generator=generator)
    mask = torch.rand(2, 1, *shape, generator=generator) > 0.4
    expected = [
        100 * np.mean(jacobian_by_numpy(d)[m] <= 0) for d, m in zip(ddf.numpy(), mask[:, 0].numpy(), strict=True)
    ]
    np.testing.assert_allclose(compute_folded_voxels(ddf, mask)[:, 0].numpy(), expected, rtol=1e-6)
    assert 0 < expected[0] < 100


@pytest.mark.parametrize("shape", [(1, 11, 4), (2, 2, 11, 4), (2, 1, 4, 11)])
def test_mask_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"mask: expected shape \(2, 1, 11, 4\)"):
        compute_folded_voxels(torch.zeros(2, 2, 11, 4), torch.ones(shape))


def test_folded_metric_averages_over_calls_in_either_form() -> None:
    folded, flat = strip_fold((10, 4), 3, 6), torch.zeros(1, 2, 10, 4)
    mask = torch.zeros(1, 10, 4)
    mask[:, 6:] = 1  # row 6 of 4 rows folds
    metric = FoldedVoxelsMetric(get_not_nans=True)
    torch.testing.assert_close(metric(y_pred=torch.cat([folded, flat])), torch.tensor([[40.0], [0.0]]))
    metric(y_pred=[folded[0], flat[0]], y=[mask, mask])
    metric(y_pred=[folded[0]])
    score, count = metric.aggregate()
    assert score.item() == pytest.approx((40 + 0 + 25 + 0 + 40) / 5)
    assert count.item() == 5


FORMS = ["paper", "learn2reg"]


def paper_form(ddf: np.ndarray, mask: np.ndarray) -> float:
    return np.log(np.clip(jacobian_by_numpy(ddf), 1e-9, 1e9))[mask].std()


def learn2reg_form(ddf: np.ndarray, mask: np.ndarray) -> float:
    """As the challenge has it: correlation with (-0.5, 0, 0.5), zeros outside, then the outer 2 voxels dropped."""
    n = len(ddf)
    matrix = np.empty((*ddf.shape[1:], n, n))
    for component in range(n):
        for axis in range(n):
            matrix[..., component, axis] = ndimage.correlate1d(
                ddf[component].astype(np.float64), [-0.5, 0, 0.5], axis=axis, mode="constant", cval=0.0
            ) + (component == axis)
    inner = (slice(2, -2),) * n
    return np.log(np.clip(np.linalg.det(matrix)[inner] + 3, 1e-9, 1e9))[mask[inner]].std()


@pytest.mark.parametrize("shape", [(9, 12), (7, 10, 6)])
@pytest.mark.parametrize(("form", "reference"), [("paper", paper_form), ("learn2reg", learn2reg_form)])
@pytest.mark.parametrize("masked", [False, True])
def test_std_agrees_with_an_independent_form(shape, form, reference, masked) -> None:
    generator = torch.Generator().manual_seed(2)
    # strong enough for folds, which the clip catches
    ddf = torch.randn(2, len(shape), *shape, generator=generator, dtype=torch.float64)
    mask = torch.rand(2, 1, *shape, generator=generator) > (0.4 if masked else -1)
    result = compute_std_log_jacobian(ddf, mask if masked else None, form=form)
    assert result.shape == (2, 1)
    expected = [reference(d, m) for d, m in zip(ddf.numpy(), mask[:, 0].numpy(), strict=True)]
    np.testing.assert_allclose(result[:, 0].numpy(), expected, rtol=1e-10)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("n", [2, 3])
def test_affine_map_has_no_spread(form, n: int) -> None:
    x = torch.stack(torch.meshgrid(*[torch.arange(7.0)] * n, indexing="ij"))
    ddf = torch.stack([0.3 * x, -0.2 * x.flip(0)])
    torch.testing.assert_close(compute_std_log_jacobian(ddf, form=form), torch.zeros(2, 1), atol=1e-5, rtol=0)


def test_two_halves_of_known_volume_change() -> None:
    x = torch.arange(12.0)
    ddf = torch.zeros(1, 2, 12, 8)
    ddf[:, 0] = torch.where(x < 6, x, 6 + 3 * (x - 6))[:, None]  # |J| is 2 below, 4 above the middle
    mask = torch.zeros(1, 1, 12, 8)
    mask[:, :, [3, 9], 2:-2] = 1
    torch.testing.assert_close(compute_std_log_jacobian(ddf, mask), torch.tensor([[np.log(4 / 2) / 2]]).float())
    torch.testing.assert_close(
        compute_std_log_jacobian(ddf, mask, form="learn2reg"), torch.tensor([[np.log(7 / 5) / 2]]).float()
    )


def test_std_of_empty_masks_is_nan() -> None:
    mask = torch.zeros(2, 1, 8, 8)
    mask[1, :, 1] = 1  # all of it within the border that learn2reg drops
    assert compute_std_log_jacobian(torch.zeros(2, 2, 8, 8), mask).isnan().flatten().tolist() == [True, False]
    assert compute_std_log_jacobian(torch.zeros(2, 2, 8, 8), mask, form="learn2reg").isnan().all()


def test_std_refuses_bad_input() -> None:
    with pytest.raises(ValueError, match=r"form: expected one of \['paper', 'learn2reg'\], got 'L2R'"):
        compute_std_log_jacobian(torch.zeros(1, 2, 8, 8), form="L2R")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="form: expected one of"):
        StdLogJacobianMetric(form="L2R")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"at least 5 voxels .* got spatial shape \(8, 4\)"):
        compute_std_log_jacobian(torch.zeros(1, 2, 8, 4), form="learn2reg")


@pytest.mark.parametrize("form", FORMS)
def test_std_metric_averages_over_items(form) -> None:
    ddf = torch.randn(3, 2, 8, 9, generator=torch.Generator().manual_seed(3))
    metric = StdLogJacobianMetric(form=form)
    metric(y_pred=ddf[:1])
    metric(y_pred=list(ddf[1:]))
    torch.testing.assert_close(metric.aggregate(), compute_std_log_jacobian(ddf, form=form).mean(dim=0))


def divisions_of_a_cell(n: int) -> list[list[np.ndarray]]:
    """The two divisions of a unit cell into simplices, each a list of n + 1 vertices."""
    corners = [np.array(c) for c in product((0, 1), repeat=n)]

    def corner_simplex(c: np.ndarray) -> np.ndarray:
        return np.array([c, *(np.where(np.arange(n) == axis, 1 - c, c) for axis in range(n))])

    if n == 2:  # cut along the one or the other diagonal
        return [[corner_simplex(c) for c in corners if c.sum() % 2 == parity] for parity in (0, 1)]
    return [
        [corner_simplex(c) for c in corners if c.sum() % 2 == parity]
        + [np.array([c for c in corners if c.sum() % 2 != parity])]
        for parity in (0, 1)
    ]


def negative_volume_of_the_grid(ddf: np.ndarray) -> float:
    """Mean over both divisions of the grid of the volume of the simplices that the field turns inside out."""
    n = len(ddf)
    positions = np.stack(np.meshgrid(*(np.arange(s) for s in ddf.shape[1:]), indexing="ij"), axis=-1)
    deformed = positions + np.moveaxis(ddf, 0, -1)
    total, factorial = 0.0, 2 if n == 2 else 6
    for cell in product(*(range(s - 1) for s in ddf.shape[1:])):
        for simplex in (simplex for division in divisions_of_a_cell(n) for simplex in division):
            orientation = np.sign(np.linalg.det(simplex[1:] - simplex[0]))
            vertices = np.array([deformed[tuple(v)] for v in simplex + np.array(cell)])
            total += 0.5 * max(-orientation * np.linalg.det(vertices[1:] - vertices[0]) / factorial, 0.0)
    return total


def ten_determinants(ddf: np.ndarray) -> np.ndarray:
    """Non-diffeomorphic volume voxel by voxel, from the finite differences as the paper names them."""
    n = len(ddf)
    padded = np.pad(ddf, [(0, 0)] + [(1, 1)] * n, mode="edge")
    padded += np.stack(np.meshgrid(*(np.arange(-1, s + 1) for s in ddf.shape[1:]), indexing="ij"))
    volume = np.zeros(ddf.shape[1:])
    e = np.eye(n, dtype=int)
    for voxel in np.ndindex(*ddf.shape[1:]):
        p = np.array(voxel) + 1

        def phi(q: np.ndarray) -> np.ndarray:
            return padded[(slice(None), *q)]

        dets = []
        for signs in product((1, -1), repeat=n):
            columns = [
                phi(p + e[a]) - phi(p) if s > 0 else phi(p) - phi(p - e[a])
                for a, s in zip(range(n), signs, strict=True)
            ]
            dets.append(np.linalg.det(np.stack(columns, axis=1)))
        if n == 3:
            back = [phi(p - e[a] - e[b]) - phi(p) for a, b in ((0, 1), (0, 2), (1, 2))]
            ahead = [phi(p + e[a] + e[b]) - phi(p) for a, b in ((0, 1), (1, 2), (0, 2))]
            dets += [np.linalg.det(np.stack(back, axis=1)), np.linalg.det(np.stack(ahead, axis=1))]
        volume[voxel] = 0.5 * np.maximum(-np.array(dets), 0).sum() / (2 if n == 2 else 6)
    return volume


@pytest.mark.parametrize("shape", [(7, 9), (6, 7, 5)])
def test_ndv_is_the_negative_volume_of_the_triangulated_grid(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(4)
    ddf = torch.zeros(2, len(shape), *shape, dtype=torch.float64)
    inner = (
        slice(None),
        slice(None),
        *(slice(1, -1) for _ in shape),
    )  # at rest at the border: nothing beyond it counts
    ddf[inner] = 2 * torch.randn(ddf[inner].shape, generator=generator, dtype=torch.float64)
    expected = [100 * negative_volume_of_the_grid(item) / np.prod(shape) for item in ddf.numpy()]
    assert min(expected) > 1
    np.testing.assert_allclose(compute_non_diffeomorphic_volume(ddf)[:, 0].numpy(), expected, rtol=1e-10)


@pytest.mark.parametrize("shape", [(4, 7), (2, 2), (4, 3, 5)])
@pytest.mark.parametrize("masked", [False, True])
def test_ndv_agrees_with_the_determinants_of_the_paper(shape: tuple[int, ...], masked: bool) -> None:
    generator = torch.Generator().manual_seed(5)
    ddf = 1.5 * torch.randn(2, len(shape), *shape, generator=generator, dtype=torch.float64)
    mask = torch.rand(2, 1, *shape, generator=generator) > (0.5 if masked else -1)
    expected = [100 * ten_determinants(d)[m].mean() for d, m in zip(ddf.numpy(), mask[:, 0].numpy(), strict=True)]
    result = compute_non_diffeomorphic_volume(ddf, mask if masked else None)
    np.testing.assert_allclose(result[:, 0].numpy(), expected, rtol=1e-10)


def test_ndv_of_the_authors_example() -> None:
    # 3x3 identity whose centre goes to (0, 2): a quarter of a pixel folds, all of it at the centre
    ddf = torch.zeros(1, 2, 3, 3)
    ddf[0, :, 1, 1] = torch.tensor([-1.0, 1.0])
    centre = torch.zeros(1, 1, 3, 3)
    centre[..., 1, 1] = 1
    torch.testing.assert_close(compute_non_diffeomorphic_volume(ddf), torch.tensor([[25.0 / 9]]))
    torch.testing.assert_close(compute_non_diffeomorphic_volume(ddf, centre), torch.tensor([[25.0]]))


@pytest.mark.parametrize("n", [2, 3])
def test_reflection_turns_all_the_volume_inside_out(n: int) -> None:
    shape = (6, 5, 7)[:n]
    ddf = torch.zeros(1, n, *shape)
    ddf[:, 0] = -2 * torch.arange(6.0).reshape(-1, *[1] * (n - 1))
    mask = torch.zeros(1, 1, *shape)
    mask[(..., *[slice(1, -1)] * n)] = 1
    torch.testing.assert_close(compute_non_diffeomorphic_volume(ddf, mask), torch.tensor([[100.0]]))


@pytest.mark.parametrize("n", [2, 3])
def test_ndv_sees_the_fold_that_central_differences_step_over(n: int) -> None:
    ddf = torch.zeros(2, n, *[5] * n)
    ddf[(0, 0, *[2] * n)] = 3.0
    centre = torch.zeros(2, 1, *[5] * n)
    centre[(slice(None), 0, *[2] * n)] = 1
    assert compute_folded_voxels(ddf, centre).tolist() == [[0.0], [0.0]]
    assert compute_non_diffeomorphic_volume(ddf, centre)[0] > 0
    assert compute_non_diffeomorphic_volume(ddf, centre)[1] == 0


def test_ndv_of_an_empty_mask_is_nan_and_other_masks_are_refused() -> None:
    ddf = torch.zeros(1, 2, 4, 5)
    assert compute_non_diffeomorphic_volume(ddf, torch.zeros(1, 1, 4, 5)).isnan().all()
    with pytest.raises(ValueError, match=r"mask: expected shape \(1, 1, 4, 5\) .* got \(1, 4, 5\)"):
        compute_non_diffeomorphic_volume(ddf, torch.zeros(1, 4, 5))
    with pytest.raises(TypeError, match="mask: expected a torch.Tensor or None, got ndarray"):
        compute_non_diffeomorphic_volume(ddf, np.zeros((1, 1, 4, 5)))  # type: ignore[arg-type]


def test_ndv_metric_averages_over_items() -> None:
    ddf = torch.randn(3, 3, 4, 5, 3, generator=torch.Generator().manual_seed(6))
    metric = NonDiffeomorphicVolumeMetric()
    metric(y_pred=ddf[:1])
    metric(y_pred=list(ddf[1:]), y=[torch.ones(1, 4, 5, 3)] * 2)
    torch.testing.assert_close(metric.aggregate(), compute_non_diffeomorphic_volume(ddf).mean(dim=0))
