# SPDX-License-Identifier: Apache-2.0
"""Determinants of the simplices of each voxel by NumPy, and fields that have no folds any more."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from scipy import ndimage

from monai_deq.metrics import compute_folded_voxels, compute_non_diffeomorphic_volume
from monai_deq.networks.blocks import DiffusionFoldLoss, determinant, remove_folds, simplex_determinants
from monai_deq.solvers import random_smooth_ddf

SIZES = [(14, 11), (7, 8, 6), (5, 9), (2, 3, 2), (1, 6), (4, 1, 5)]


def noise(size: tuple[int, ...], std: float, batch: int = 2, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return std * torch.randn(batch, len(size), *size, generator=generator, dtype=torch.float64)


def vertices_of_a_voxel(ndim: int) -> list[list[tuple[int, ...]]]:
    """Per simplex the steps to its vertices, with the volume at rest positive."""
    simplices = []
    for signs in product((1, -1), repeat=ndim):
        steps = [tuple(s if a == axis else 0 for a in range(ndim)) for axis, s in enumerate(signs)]
        simplices.append(steps if np.prod(signs) > 0 else [steps[1], steps[0], *steps[2:]])
    if ndim == 3:
        simplices.append([(-1, -1, 0), (-1, 0, -1), (0, -1, -1)])
        simplices.append([(1, 1, 0), (0, 1, 1), (1, 0, 1)])
    return simplices


def determinants_by_hand(ddf: np.ndarray) -> np.ndarray:
    """``(simplices, B, *spatial)``, each over its value at rest, of the positions that the vertices come to."""
    ndim = ddf.shape[1]
    around = [(0, 0), (0, 0), *[(1, 1)] * ndim]
    moved = np.pad(ddf, around, mode="edge")
    moved += np.indices(moved.shape[2:])
    middle = moved[(..., *[slice(1, -1)] * ndim)]
    out = []
    for steps in vertices_of_a_voxel(ndim):
        edges = []
        for step in steps:
            window = tuple(slice(1 + s, 1 + s + n) for s, n in zip(step, ddf.shape[2:], strict=True))
            edges.append(moved[(..., *window)] - middle)
        matrices = np.moveaxis(np.stack(edges, axis=-1), 1, -2)
        rest = np.linalg.det(np.array(steps, dtype=float))
        assert rest > 0
        out.append(np.linalg.det(matrices) / rest)
    return np.stack(out)


@pytest.mark.parametrize("size", SIZES)
def test_diffusion_and_folds(size: tuple[int, ...]) -> None:
    ddf = noise(size, 0.4).requires_grad_()
    plain = ddf.detach().numpy()
    differences = sum((np.diff(plain, axis=axis) ** 2).sum() for axis in range(2, plain.ndim)) / len(size)
    lacks = np.maximum(0.3 - determinants_by_hand(plain), 0)
    expected = differences / (2 * np.prod(size)) + 7.0 * (lacks**2).mean()
    loss = DiffusionFoldLoss(7.0, least=0.3)
    assert lacks.any() or min(size) < 4
    assert loss(ddf).item() == pytest.approx(expected, rel=1e-12)
    assert torch.autograd.gradcheck(loss, ddf)
    assert loss(torch.zeros_like(ddf)) == 0


@pytest.mark.parametrize("arguments, name", [({"weight": -1.0}, "weight"), ({"least": 0.0}, "least")])
def test_bad_settings_of_the_loss(arguments: dict[str, float], name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must"):
        DiffusionFoldLoss(**arguments)


@pytest.mark.parametrize("n", [2, 3])
def test_determinant(n: int) -> None:
    matrices = np.random.default_rng(0).normal(size=(5, 7, n, n))
    entries = [[torch.from_numpy(matrices[..., i, j]) for j in range(n)] for i in range(n)]
    np.testing.assert_allclose(determinant(entries), np.linalg.det(matrices), rtol=1e-10)


@pytest.mark.parametrize("size", SIZES)
def test_determinants_of_the_simplices(size: tuple[int, ...]) -> None:
    ddf = noise(size, 1.5)
    values = list(simplex_determinants(ddf))
    expected = determinants_by_hand(ddf.numpy())
    assert len(values) == len(expected) == (4 if len(size) == 2 else 10)
    found = []
    for value in values:
        assert value.shape == (2, *size)
        at_rest = 2.0 if len(size) == 3 and len(found) >= 8 else 1.0
        found.append(value.numpy() / at_rest)
    # whatever their order
    np.testing.assert_allclose(np.sort(found, axis=0), np.sort(expected, axis=0), rtol=1e-9, atol=1e-9)
    for value in simplex_determinants(torch.zeros_like(ddf)):
        assert bool((value == value.flatten()[0]).all()) and float(value.flatten()[0]) in (1.0, 2.0)


@pytest.mark.parametrize("size", [(9, 8), (5, 6, 4)])
def test_determinants_of_an_affine_map(size: tuple[int, ...]) -> None:
    ndim = len(size)
    matrix = np.eye(ndim) + 0.3 * np.random.default_rng(1).normal(size=(ndim, ndim))
    ddf = torch.from_numpy(np.tensordot(matrix - np.eye(ndim), np.indices(size), 1))[None]
    inner = (0, *[slice(1, -1)] * ndim)
    for k, value in enumerate(simplex_determinants(ddf)):
        rest = 2 if k >= 8 else 1
        np.testing.assert_allclose(value[inner], rest * np.linalg.det(matrix), rtol=1e-9)


def border_fold(size: tuple[int, ...]) -> torch.Tensor:
    """Folded along one face alone: the outermost layer goes past the one inside it."""
    ddf = torch.zeros(1, len(size), *size, dtype=torch.float64)
    ddf[:, 0, 0] = 1.5
    return ddf


def spike(size: tuple[int, ...]) -> torch.Tensor:
    """One voxel far away."""
    ddf = torch.zeros(1, len(size), *size, dtype=torch.float64)
    ddf[(0, slice(None), *(n // 2 for n in size))] = 3.0
    return ddf


def steep(size: tuple[int, ...]) -> torch.Tensor:
    """Smooth, folded in places."""
    return random_smooth_ddf((1, len(size), *size), 2.5, 1.5, seed=2, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("least", [0.0, 0.05, 0.3])
@pytest.mark.parametrize("kind", ["wild", "border", "spike", "steep"])
@pytest.mark.parametrize("size", SIZES)
def test_no_folds_are_left(size: tuple[int, ...], kind: str, least: float, dtype: torch.dtype) -> None:
    ddf = {"wild": noise(size, 3.0), "border": border_fold(size), "spike": spike(size), "steep": steep(size)}[kind]
    ddf = ddf.to(dtype)
    before = ddf.clone()
    lowest = determinants_by_hand(ddf.double().numpy()).min(axis=0).reshape(len(ddf), -1).min(axis=1)
    out, counts = remove_folds(ddf, least)
    assert torch.equal(ddf, before) and out.dtype == dtype and counts.shape == (len(ddf),)
    assert bool(out.isfinite().all())
    rounding = 1e-5 if dtype == torch.float32 else 1e-12
    assert determinants_by_hand(out.double().numpy()).min() >= least - rounding
    assert np.array_equal(counts.numpy() > 0, lowest < least)
    changed = (out != ddf).any(dim=1).flatten(1).sum(1)
    # a mean may be what was there before
    assert bool((changed <= counts).all()) and np.array_equal(changed.numpy() > 0, lowest < least)
    if least and min(size) > 1:
        assert not compute_folded_voxels(out).any() and not compute_non_diffeomorphic_volume(out).any()
    again, counts = remove_folds(out, least)
    assert again is out and not counts.any()


def test_what_has_no_folds_is_left_as_it_is() -> None:
    for size in SIZES:
        ddf = 5 + noise(size, 0.02)
        assert determinants_by_hand(ddf.numpy()).min() > 0.5
        out, counts = remove_folds(ddf, 0.05)
        assert out is ddf and counts.tolist() == [0, 0]
        # but not at a higher threshold
        out, counts = remove_folds(ddf, 0.99)
        assert counts.sum() > 0 and determinants_by_hand(out.numpy()).min() >= 0.99 - 1e-12


@pytest.mark.parametrize("size", [(30, 26), (18, 17, 16)])
def test_only_the_folds_are_changed(size: tuple[int, ...]) -> None:
    ndim = len(size)
    smooth = random_smooth_ddf((1, ndim, *size), 0.5, 4.0, dtype=torch.float64)
    assert determinants_by_hand(smooth.numpy()).min() > 0.3
    ddf = smooth + spike(size) / 2
    out, counts = remove_folds(ddf)
    folded = (determinants_by_hand(ddf.numpy()) < 0.05).any(axis=0)[0]
    near = ndimage.binary_dilation(folded, np.ones([3] * ndim), iterations=3)
    changed = (out != ddf).any(dim=1)[0].numpy()
    assert folded.any() and changed.any() and not (changed & ~near).any() and near.mean() < 0.15
    assert int(counts) == changed.sum()
    # what is put in the place of the spike is what is around it
    assert float((out - smooth).abs().max()) < 0.5 < float((ddf - smooth).abs().max())


@pytest.mark.parametrize("place", [(4, 4), (0, 3), (5, 7), (0, 0), (8, 0)])
def test_rounds_by_hand(place: tuple[int, int]) -> None:
    # one voxel that goes too far along both axes: it and its neighbours go a quarter of the way to means of nine
    ddf = torch.zeros(1, 2, 9, 8, dtype=torch.float64)
    ddf[(0, slice(None), *place)] = torch.tensor([-1.2 if i == n else 1.2 for i, n in zip(place, (8, 7), strict=True)])
    expected = ddf.numpy().copy()
    for _ in range(8):
        low = (determinants_by_hand(expected) < 0.01).any(axis=0)[0]
        if not low.any():
            break
        nodes = ndimage.binary_dilation(low, np.ones((3, 3)))
        means = ndimage.uniform_filter(expected[0], (1, 3, 3), mode="nearest")
        expected[0] = np.where(nodes, 0.75 * expected[0] + 0.25 * means, expected[0])
    out, counts = remove_folds(ddf)
    assert not low.any() and not np.array_equal(expected, ddf.numpy())
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-12)
    assert int(counts) == (expected != ddf.numpy()).any(axis=1).sum()


@pytest.mark.parametrize("size", [(14, 11), (7, 8, 6)])
def test_items_do_not_see_each_other(size: tuple[int, ...]) -> None:
    ddf = torch.cat([spike(size), noise(size, 0.01, 1), noise(size, 3.0, 1, seed=3), steep(size)])
    ddf[1] += 2
    out, counts = remove_folds(ddf)
    for i in range(4):
        alone, count = remove_folds(ddf[i : i + 1])
        assert torch.equal(alone[0], out[i]) and int(count) == int(counts[i])
    assert counts[1] == 0 and torch.equal(out[1], ddf[1]) and bool((counts[[0, 2, 3]] > 0).all())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_field_that_is_not_finite_is_left_alone(value: float) -> None:
    ddf = torch.cat([spike((9, 8)), spike((9, 8))])
    ddf[0, 1, 2, 3] = value
    out, counts = remove_folds(ddf)
    assert torch.equal(out[0].nan_to_num(7.0), ddf[0].nan_to_num(7.0)) and counts[0] == 0 < counts[1]
    assert torch.equal(out[1:], remove_folds(ddf[1:])[0])


def test_no_gradient_and_inference_mode() -> None:
    out, _ = remove_folds(spike((9, 8)).requires_grad_())
    assert not out.requires_grad
    with torch.inference_mode():
        torch.testing.assert_close(remove_folds(spike((9, 8)))[0], out, rtol=0, atol=0)


def test_a_field_that_folds_everywhere_ends() -> None:
    # reversed along an axis, by so much that smoothing alone is no help
    ddf = torch.zeros(1, 2, 40, 6, dtype=torch.float64)
    ddf[:, 0] = -3.0 * torch.arange(40.0).view(-1, 1)
    out, counts = remove_folds(ddf)
    assert determinants_by_hand(out.numpy()).min() >= 0.05 - 1e-12 and int(counts) == 240
