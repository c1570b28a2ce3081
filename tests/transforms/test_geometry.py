# SPDX-License-Identifier: Apache-2.0
"""Points and images taken through chains of matrices and fields, against SimpleITK and SciPy."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from monai.data import MetaTensor
from scans import bent, blobs, grid, parts, world
from scipy.ndimage import gaussian_filter1d, map_coordinates

from monai_deq.data import affine_of, grid_distance, same_grid
from monai_deq.networks.blocks import sample_at
from monai_deq.transforms import (
    ComposeDDFd,
    ResampleByDDFd,
    compose_ddf,
    geometry,
    map_points,
    pull_image,
)
from monai_deq.transforms.geometry import chain_matrix, is_matrix, smooth_for
from monai_deq.transforms.loading import ResizeLabeld
from monai_deq.transforms.transform_files import to_sitk

FIXED = ((14, 12, 10), grid((14, 12, 10), (1.5, 1.7, 2.0), "LPS", (8, -12, 15)))
MOVING = ((12, 16, 13), grid((12, 16, 13), (1.6, 1.2, 1.9), "SAR", (-5, 9, 4), (1, 0.5, -1)))
MIDDLE = ((10, 11, 9), grid((10, 11, 9), (3, 3, 3.5), "RIA", (3, 3, 3)))
FLIP = np.array([-1.0, -1.0, 1.0])


def image(of, shape, affine, dtype=np.float32) -> MetaTensor:
    values = of(world(affine, shape)).astype(dtype)[None]
    return MetaTensor(torch.from_numpy(values), affine=torch.from_numpy(affine), spatial_ndim=len(shape))


def field(shape=MIDDLE[0], affine=MIDDLE[1]) -> MetaTensor:
    places = world(affine, shape)
    voxels = (bent(places, 2.0) - places) @ np.linalg.inv(affine)[:3, :3].T
    tensor = torch.from_numpy(np.moveaxis(voxels, -1, 0)[: len(shape)].astype(np.float32).copy())
    return MetaTensor(tensor, affine=torch.from_numpy(affine), spatial_ndim=len(shape))


def matrix() -> np.ndarray:
    found = grid((1, 1, 1), (1.05, 0.95, 1.0), "RAS", (4, -6, 9), (1.0, -0.7, 0.4))
    found[1, 0] += 0.08
    return found


CHAINS = {
    "none": [],
    "matrix": [matrix()],
    "field": [field()],
    "field, matrix": [field(), matrix()],
    "matrix, field": [matrix(), field()],
    "tensor, field, field": [torch.from_numpy(matrix()), field(), field()],
}


def composite(chain) -> sitk.Transform:
    found = sitk.CompositeTransform(3)
    for part in reversed(chain):  # the one that was added last takes a point first
        found.AddTransform(to_sitk(part))
    return found


def in_itk(tensor: MetaTensor, channel: int = 0) -> sitk.Image:
    result = sitk.GetImageFromArray(np.ascontiguousarray(tensor[channel].numpy().T))
    affine = affine_of(tensor)
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    result.SetSpacing(spacing.tolist())
    result.SetDirection((FLIP[:, None] * affine[:3, :3] / spacing).ravel().tolist())
    result.SetOrigin((FLIP * affine[:3, 3]).tolist())
    return result


@pytest.mark.parametrize("name", CHAINS)
def test_pull_image_as_simpleitk_resamples(name):
    moving, fixed = image(blobs, *MOVING), image(blobs, *FIXED)
    found = pull_image(moving, fixed, CHAINS[name])
    assert found.dtype == torch.float32 and np.allclose(affine_of(found), FIXED[1])
    how = (composite(CHAINS[name]), sitk.sitkLinear, float(moving.min()))
    expected = sitk.GetArrayFromImage(sitk.Resample(in_itk(moving), in_itk(fixed), *how)).T
    np.testing.assert_allclose(found[0], expected, atol=1e-4 * np.ptp(expected))
    assert (expected == float(moving.min())).any() and np.ptp(expected) > 50  # a part lies outside
    labels = image(parts, *MOVING, dtype=np.int64)
    nearest = pull_image(labels, fixed, CHAINS[name], "nearest")
    expected = sitk.Resample(in_itk(labels), in_itk(fixed), composite(CHAINS[name]), sitk.sitkNearestNeighbor, 0.0)
    assert nearest.dtype == torch.int64
    assert (nearest[0].numpy() != sitk.GetArrayFromImage(expected).T).mean() < 2e-3  # ties


@pytest.mark.parametrize("name", CHAINS)
def test_map_points_as_simpleitk_does(name):
    points = np.random.default_rng(0).uniform(-30, 30, (200, 3))  # some outside of the field's grid
    expected = np.array([composite(CHAINS[name]).TransformPoint((p * FLIP).tolist()) for p in points]) * FLIP
    found = map_points(torch.from_numpy(points.T.copy()), CHAINS[name]).T
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("name", CHAINS)
def test_compose_ddf_says_where_the_points_of_a_grid_go(name):
    reference = image(blobs, *FIXED)
    found = compose_ddf(CHAINS[name], reference)
    onto = in_itk(reference)
    moved = sitk.TransformToDisplacementField(
        composite(CHAINS[name]),
        sitk.sitkVectorFloat64,
        onto.GetSize(),
        onto.GetOrigin(),
        onto.GetSpacing(),
        onto.GetDirection(),
    )
    moved = sitk.GetArrayFromImage(moved).transpose(2, 1, 0, 3) * FLIP
    expected = moved @ np.linalg.inv(FIXED[1])[:3, :3].T
    np.testing.assert_allclose(np.moveaxis(found.numpy(), 0, -1), expected, atol=2e-5)
    assert found.dtype == torch.float32 and same_grid(found, reference)


@pytest.mark.parametrize("shape", [FIXED[0], FIXED[0][:2]])
def test_in_parts_it_is_the_same(shape, monkeypatch):
    affine = FIXED[1]
    reference = image(blobs, shape, affine)
    moving = image(lambda p: blobs(bent(p)), (15, 13, 11)[: len(shape)], affine)
    whole = MetaTensor(torch.cat([moving, 2 * moving]), meta=dict(moving.meta), spatial_ndim=len(shape))
    chain = [field(shape, affine), matrix() if len(shape) == 3 else np.eye(4)]
    expected = pull_image(whole, reference, chain), compose_ddf(chain, reference)
    for voxels in (1, 130, 500):
        monkeypatch.setattr(geometry, "_AT_ONCE", voxels)
        assert torch.equal(pull_image(whole, reference, chain), expected[0])
        assert torch.equal(compose_ddf(chain, reference), expected[1])
    assert expected[0].shape == (2, *shape)
    inside = expected[0][1:] > float(whole.min())  # outside it is the least value of all
    assert inside.float().mean() > 0.5
    torch.testing.assert_close(expected[0][1:][inside], 2 * expected[0][:1][inside])


@pytest.mark.parametrize("axes", ["LP", "LI", "PS"])
def test_slices_in_their_plane(axes):
    """Against SciPy, in the coordinates of the plane."""
    affine = grid((20, 18), (1.2, 1.5, 1), axes, (5, 10, 15))
    affine[:3, 2] = np.cross(affine[:3, 0], affine[:3, 1]) / np.linalg.norm(np.cross(affine[:3, 0], affine[:3, 1]))
    other = affine @ np.array([[0.9, 0.1, 0, 1.3], [-0.1, 0.9, 0, 2.1], [0, 0, 1, 0], [0, 0, 0, 1]])
    moving, fixed, ddf = image(blobs, (21, 17), other), image(blobs, (20, 18), affine), field((20, 18), affine)
    voxels = np.stack(np.meshgrid(np.arange(20), np.arange(18), indexing="ij"), axis=-1)
    moved = voxels + np.moveaxis(ddf.numpy(), 0, -1)
    back = np.linalg.inv(other) @ affine
    at = np.moveaxis(moved @ back[:2, :2].T + back[:2, 3], -1, 0)
    values = map_coordinates(moving[0].numpy(), at, order=1, mode="nearest")
    size = np.array([21, 17])[:, None, None]
    values[((at < -0.5) | (at > size - 0.5)).any(axis=0)] = float(moving.min())
    np.testing.assert_allclose(pull_image(moving, fixed, [ddf])[0], values, atol=1e-3)
    np.testing.assert_allclose(compose_ddf([ddf], fixed), ddf, atol=1e-5)
    # a third column that is not given is at right angles to the plane
    flat = affine.copy()
    flat[:3, 2] = 0
    bare = MetaTensor(fixed.as_tensor(), affine=torch.from_numpy(flat), spatial_ndim=2)
    full = affine_of(bare)
    np.testing.assert_allclose(full[:3, 2] @ full[:3, :2], 0, atol=1e-9)
    np.testing.assert_allclose(np.linalg.norm(full[:3, 2]), 1)
    np.testing.assert_allclose(pull_image(moving, bare, [ddf])[0], values, atol=1e-3)


def test_value_outside():
    moving, fixed = image(blobs, *MOVING), image(lambda p: blobs(p), FIXED[0], FIXED[1] @ np.diag([3, 3, 3, 1.0]))
    assert float(pull_image(moving, fixed).min()) == float(moving.min())
    assert float(pull_image(moving, fixed, outside=-7.0).min()) == -7.0
    below = MetaTensor(moving.as_tensor() - 1000, meta=dict(moving.meta))
    assert float(pull_image(below, fixed).min()) == float(below.min())
    assert int(pull_image(image(parts, *MOVING, dtype=np.int32) + 5, fixed, mode="nearest").min()) == 0
    whole = image(lambda p: blobs(p), *MOVING, dtype=np.int16)
    assert pull_image(whole, fixed).is_floating_point()


def test_plain_tensors_lie_at_their_voxels():
    x = torch.rand(2, 5, 6, 7)
    found = pull_image(x, torch.zeros(1, 5, 6, 7))
    assert torch.allclose(found.as_tensor(), x, atol=1e-6) and np.array_equal(affine_of(found), np.eye(4))
    assert torch.equal(
        pull_image(x, torch.zeros(1, 7, 6, 5)).as_tensor()[:, :5, :, :5], found[:, :5, :, :5].as_tensor()
    )


def test_matrices_of_a_chain():
    a, b = matrix(), grid((1, 1, 1), (1, 1.3, 1), "RAS", (30, 0, 5), (4, 5, 6))
    np.testing.assert_allclose(chain_matrix([a, field(), torch.from_numpy(b)]), b @ a)
    assert is_matrix(a) and is_matrix(torch.from_numpy(a)) and not is_matrix(field()) and not is_matrix(field((4, 4)))
    np.testing.assert_array_equal(chain_matrix([]), np.eye(4))


def test_smooth_for_larger_voxels():
    """Standard deviations (ratio - 1) / 2 along the image's own axes, as MONAI's ``Resize`` has them."""
    fine = ((30, 28, 26), grid((30, 28, 26), (1, 1, 1), "LPS"))
    x = image(lambda p: np.random.default_rng(0).normal(size=p.shape[:-1]), *fine)
    coarse = image(blobs, (26, 14, 10), grid((26, 14, 10), (1, 2, 3), "SAR"))  # along z, y and x
    expected = x[0].numpy().astype(float)
    for axis, sigma in ((0, 1.0), (1, 0.5)):
        expected = gaussian_filter1d(expected, sigma, axis=axis, mode="constant", truncate=6)
    found = smooth_for(x, coarse)[0].numpy()
    inner = (slice(6, -6),) * 3
    np.testing.assert_allclose(found[inner], expected[inner], atol=5e-3)
    assert smooth_for(x, x) is x and smooth_for(x, image(blobs, *fine), [grid((1, 1, 1), (0.5, 0.5, 0.5))]) is x
    assert smooth_for(x, x, [np.diag([3.0, 1, 1, 1])]) is not x
    constant = MetaTensor(torch.full((1, *fine[0]), 7.0), meta=dict(x.meta))
    np.testing.assert_allclose(smooth_for(constant, coarse), 7.0, rtol=1e-5)  # to the border


def test_grid_distance():
    a = image(blobs, *FIXED)
    assert grid_distance(a, a) == 0 and same_grid(a, a)
    assert grid_distance(a, image(blobs, (14, 12, 11), FIXED[1])) == float("inf")
    moved = FIXED[1].copy()
    moved[:3, 3] += [0.3, 0.4, 0]
    assert grid_distance(a, image(blobs, FIXED[0], moved)) == pytest.approx(0.5 / 1.5)
    larger = FIXED[1] @ np.diag([1.01, 1, 1, 1])  # a hundredth of a voxel more at each of 13
    assert grid_distance(a, image(blobs, FIXED[0], larger)) == pytest.approx(0.13)
    assert not same_grid(a, image(blobs, FIXED[0], larger))
    assert same_grid(a, image(blobs, FIXED[0], FIXED[1].astype(np.float32).astype(float)))
    flipped = FIXED[1].copy()
    flipped[:3, 0] *= -1
    assert grid_distance(a, image(blobs, FIXED[0], flipped)) > 10
    b = image(blobs, (9, 8), FIXED[1])
    off_plane = FIXED[1].copy()
    off_plane[:3, 3] += 3 * FIXED[1][:3, 2]
    assert grid_distance(b, image(blobs, (9, 8), off_plane)) == pytest.approx(6 / 1.5)


@pytest.mark.parametrize("shape", [(5, 6), (5, 6, 4)])
@pytest.mark.parametrize("numbers", [[0, 7, 2**24 + 1], [-(2**40), 3, 2**40 + 1], [2**62 - 1, 2**62, 2**62 + 1], [-5]])
def test_label_numbers_are_exact(shape, numbers):
    rng = np.random.default_rng(0)
    labels = rng.choice(np.array(numbers, dtype=np.int64), (2, 1, *shape))
    ndim = len(shape)
    places = rng.uniform(-1, 6, (2, ndim, *(7, 3, 2)[:ndim]))
    found = sample_at(torch.from_numpy(labels), torch.from_numpy(places), "nearest")
    index = np.clip(np.round(places), 0, np.array(shape).reshape(-1, *[1] * ndim) - 1).astype(int)
    expected = np.stack([labels[b, 0][tuple(index[b])] for b in range(2)])[:, None]
    assert found.dtype == torch.int64 and np.array_equal(found, expected)
    assert set(np.unique(expected)) == set(numbers)


@pytest.mark.parametrize("old, new", [((7, 9), (4, 12)), ((7, 9, 6), (14, 3, 6)), ((8, 8, 8), (3, 5, 17))])
def test_resized_labels_are_nearest_exact(old, new):
    labels = torch.from_numpy(np.random.default_rng(0).integers(0, 2**20, (1, *old)))
    affine = torch.from_numpy(grid(old, (1, 2, 3), "LPS", (5, 6, 7)))
    given = MetaTensor(labels, affine=affine, spatial_ndim=len(old))
    found = ResizeLabeld("label", new)({"label": given})["label"]
    expected = torch.nn.functional.interpolate(labels[None].double(), new, mode="nearest-exact")[0].long()
    assert torch.equal(found.as_tensor(), expected)
    assert torch.equal(ResizeLabeld("label", new)({"label": labels})["label"], expected)
    huge = ResizeLabeld("label", new)({"label": labels + 2**61})["label"]
    assert torch.equal(huge, expected + 2**61)
    # the corners of the field of view stay where they are
    for corner in (np.zeros(len(old)), np.ones(len(old))):
        places = [
            affine_of(x)[:3, : len(old)] @ (corner * x.shape[1:] - 0.5) + affine_of(x)[:3, 3] for x in (found, given)
        ]
        np.testing.assert_allclose(*places, atol=1e-5)


def test_resample_by_ddf_and_compose_as_transforms():
    fixed, moving = image(blobs, *FIXED), image(blobs, *MOVING)
    small = ((7, 6, 5), FIXED[1] @ np.diag([2.0, 2, 2, 1]))
    small[1][:3, 3] = (FIXED[1] @ [0.5, 0.5, 0.5, 1])[:3]
    found = field(*small)
    item = {"ddf": found.as_tensor(), "fixed": image(blobs, *small), "fixed_scan": fixed, "moving_scan": moving}
    done = ComposeDDFd()({**item, "initial_transform": [matrix()]})
    expected = compose_ddf([found, matrix()], fixed)
    assert torch.equal(done["ddf"].as_tensor(), expected.as_tensor()) and "transform" not in done
    warped = ResampleByDDFd("moving_scan", output_keys="warped")(done)["warped"]
    np.testing.assert_allclose(warped, pull_image(moving, fixed, [found, matrix()]), atol=1e-2)
    # a field that has the grid of the scan stays bit by bit
    same = {**item, "fixed": fixed, "ddf": field(*FIXED).as_tensor()}
    assert torch.equal(ComposeDDFd()(same)["ddf"].as_tensor(), same["ddf"])
    with pytest.raises(KeyError, match="fixed_scan"):
        ComposeDDFd()({"ddf": found, "fixed": fixed})
