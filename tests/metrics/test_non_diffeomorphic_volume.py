# SPDX-License-Identifier: Apache-2.0
"""Non-diffeomorphic volume against a published value, triangulated grids and the ten determinants by NumPy."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch

from monai_deq.metrics import NonDiffeomorphicVolumeMetric, compute_folded_voxels, compute_non_diffeomorphic_volume


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
def test_is_the_negative_volume_of_the_triangulated_grid(shape: tuple[int, ...]) -> None:
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
def test_agrees_with_the_determinants_of_the_paper(shape: tuple[int, ...], masked: bool) -> None:
    generator = torch.Generator().manual_seed(5)
    ddf = 1.5 * torch.randn(2, len(shape), *shape, generator=generator, dtype=torch.float64)
    mask = torch.rand(2, 1, *shape, generator=generator) > (0.5 if masked else -1)
    expected = [100 * ten_determinants(d)[m].mean() for d, m in zip(ddf.numpy(), mask[:, 0].numpy(), strict=True)]
    result = compute_non_diffeomorphic_volume(ddf, mask if masked else None)
    np.testing.assert_allclose(result[:, 0].numpy(), expected, rtol=1e-10)


def test_value_of_the_authors_example() -> None:
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
def test_sees_the_fold_that_central_differences_step_over(n: int) -> None:
    ddf = torch.zeros(2, n, *[5] * n)
    ddf[(0, 0, *[2] * n)] = 3.0
    centre = torch.zeros(2, 1, *[5] * n)
    centre[(slice(None), 0, *[2] * n)] = 1
    assert compute_folded_voxels(ddf, centre).tolist() == [[0.0], [0.0]]
    assert compute_non_diffeomorphic_volume(ddf, centre)[0] > 0
    assert compute_non_diffeomorphic_volume(ddf, centre)[1] == 0


def test_empty_mask_gives_nan_and_other_masks_are_refused() -> None:
    ddf = torch.zeros(1, 2, 4, 5)
    assert compute_non_diffeomorphic_volume(ddf, torch.zeros(1, 1, 4, 5)).isnan().all()
    with pytest.raises(ValueError, match=r"mask: expected shape \(1, 1, 4, 5\) .* got \(1, 4, 5\)"):
        compute_non_diffeomorphic_volume(ddf, torch.zeros(1, 4, 5))
    with pytest.raises(TypeError, match="mask: expected a torch.Tensor or None, got ndarray"):
        compute_non_diffeomorphic_volume(ddf, np.zeros((1, 1, 4, 5)))  # type: ignore[arg-type]


def test_metric_averages_over_items() -> None:
    ddf = torch.randn(3, 3, 4, 5, 3, generator=torch.Generator().manual_seed(6))
    metric = NonDiffeomorphicVolumeMetric()
    metric(y_pred=ddf[:1])
    metric(y_pred=list(ddf[1:]), y=[torch.ones(1, 4, 5, 3)] * 2)
    torch.testing.assert_close(metric.aggregate(), compute_non_diffeomorphic_volume(ddf).mean(dim=0))
