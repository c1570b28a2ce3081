# SPDX-License-Identifier: Apache-2.0
"""Alignments of synthetic scans by known motions, planes of slices, and grids turned as nibabel turns them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from itertools import permutations, product

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from scans import bent, blobs, grid, world
from scipy.spatial.transform import Rotation

from monai_deq.data import affine_of, grid_of
from monai_deq.transforms import AlignAffined, InitialTransformd, align_affine, foreground_overlap, save_transform
from monai_deq.transforms.loading import MatchGridd, ResizeFixedd

SHAPE = (40, 38, 36)
FIXED = grid(SHAPE, axes="LPS", turn=(5, -4, 10))


def scan(affine: np.ndarray, shape: tuple[int, ...], of: Callable[[np.ndarray], np.ndarray] = blobs) -> MetaTensor:
    values = (of(world(affine, shape)) - 20.0)[None].astype(np.float32) / 150
    meta = {"spatial_shape": [*shape, 1][:3]}
    return MetaTensor(torch.from_numpy(values), affine=torch.from_numpy(affine), meta=meta, spatial_ndim=len(shape))


def motion(turn: tuple[float, ...], shift: tuple[float, ...], scale: tuple[float, ...] = (1, 1, 1)) -> np.ndarray:
    """RAS: a point of the fixed scan to that of the moving one."""
    found = np.eye(4)
    found[:3, :3] = Rotation.from_euler("xyz", turn, degrees=True).as_matrix() * np.asarray(scale, dtype=float)
    found[:3, 3] = shift
    return found


def moved(by: np.ndarray, affine: np.ndarray, shape: tuple[int, ...]) -> MetaTensor:
    """The blobs where the motion leads them: moving(motion(x)) = fixed(x)."""
    back = np.linalg.inv(by)
    return scan(affine, shape, lambda p: blobs(p @ back[:3, :3].T + back[:3, 3]))


def apart(found: np.ndarray, known: np.ndarray) -> tuple[float, float]:
    """Degrees between two motions' rotations, and mm between where they take the middle."""
    u, _, v = np.linalg.svd(found[:3, :3] @ np.linalg.inv(known[:3, :3]))
    angle = np.degrees(np.arccos(np.clip((np.trace(u @ v) - 1) / 2, -1, 1)))
    return float(angle), float(np.linalg.norm((found - known)[:3, 3]))


MOVING = grid((44, 40, 46), axes="SAR", turn=(-3, 6, 0), centre=(7, -6, 4))


@pytest.mark.parametrize("kind", ["rigid", "affine"])
def test_rigid_motion_is_recovered(kind):
    known = motion((0, 0, 15), (7, -6, 4))  # ten voxels
    found = align_affine(scan(FIXED, SHAPE), moved(known, MOVING, (44, 40, 46)), kind)
    angle, shift = apart(found, known)
    assert angle < 1 and shift < 0.5
    if kind == "rigid":
        np.testing.assert_allclose(found[:3, :3] @ found[:3, :3].T, np.eye(3), atol=1e-9)


def test_affine_motion_is_recovered():
    known = motion((8, -5, 10), (4, -3, 2), (1.1, 0.92, 1.05))
    found = align_affine(scan(FIXED, SHAPE), moved(known, MOVING, (44, 40, 46)), "affine")
    corners = np.array([*product((-10.0, 10.0), repeat=3)])
    off = corners @ (found - known)[:3, :3].T + (found - known)[:3, 3]
    assert np.linalg.norm(off, axis=1).mean() < 1.0
    np.testing.assert_allclose(found[:3, :3], known[:3, :3], atol=0.04)


def test_behind_a_matrix_that_is_known():
    known, first = motion((0, 0, 12), (5, -4, 3)), motion((90, 0, 0), (40, 60, -20))
    far = first @ MOVING
    moving = moved(first @ known, far, (44, 40, 46))
    item = {"fixed": scan(FIXED, SHAPE), "moving": moving, "initial_transform": [first]}
    chain = AlignAffined()(item)["initial_transform"]
    assert len(chain) == 2 and chain[1] is first and len(item["initial_transform"]) == 1
    angle, shift = apart(chain[0], known)
    assert angle < 1 and shift < 0.5


@pytest.mark.parametrize("axes", ["LP", "LI", "PS"])
def test_slices_in_their_plane(axes):
    """The motion found leaves the plane where it is."""

    def plane(shape: tuple[int, int]) -> np.ndarray:
        affine = grid(shape, (1, 1, 1), axes, (3, -5, 4))
        affine[:3, 2] = np.cross(affine[:3, 0], affine[:3, 1])
        return affine

    fixed = plane((48, 46))
    normal = fixed[:3, 2]
    known = np.eye(4)
    known[:3, :3] = Rotation.from_rotvec(normal * np.radians(15)).as_matrix()
    known[:3, 3] = fixed[:3, 0] * 6 - fixed[:3, 1] * 8
    found = align_affine(scan(fixed, (48, 46)), moved(known, known @ plane((50, 48)), (50, 48)), "rigid")
    angle, shift = apart(found, known)
    assert angle < 1.5 and shift < 0.5  # of a slice there is little to see
    np.testing.assert_allclose(found[:3, :3] @ normal, normal, atol=1e-6)
    assert abs(normal @ found[:3, 3]) < 1e-6


def test_alignment_that_cannot_be():
    fixed = scan(FIXED, SHAPE)
    with pytest.raises(ValueError, match="affine: expected 'rigid' or 'affine', got 'similarity'"):
        align_affine(fixed, fixed, "similarity")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="got 'translation'"):
        AlignAffined("translation")  # type: ignore[arg-type]
    constant = MetaTensor(torch.zeros_like(fixed.as_tensor()), affine=fixed.affine)
    with pytest.raises(RuntimeError, match="the rigid alignment failed: .*initial transform") as error:
        align_affine(fixed, constant)
    assert len(str(error.value).splitlines()) == 1
    field = MetaTensor(torch.zeros(3, *SHAPE), affine=fixed.affine)
    with pytest.raises(ValueError, match="displacement field; leave one of the two out"):
        AlignAffined()({"fixed": fixed, "moving": fixed, "initial_transform": [field]})
    with pytest.raises(KeyError, match="moving"):
        AlignAffined()({"fixed": fixed})


def test_scans_far_apart_are_overlaid_by_their_centres():
    """No voxel of one lies in the other by their headers: the centres of mass overlay them."""
    known = motion((0, 0, 5), (300, -200, 150))
    centre = grid((44, 40, 46), centre=(300, -200, 150))
    found = align_affine(scan(FIXED, SHAPE), moved(known, centre, (44, 40, 46)))
    angle, shift = apart(found, known)
    assert angle < 1 and shift < 0.5


def test_chain_to_begin_with(tmp_path):
    save_transform(tmp_path / "a.tfm", motion((0, 0, 5), (1, 2, 3)))
    fixed = scan(FIXED, SHAPE)
    base = {"fixed": fixed, "moving": fixed}
    assert "initial_transform" not in InitialTransformd()(base)
    assert "initial_transform" not in InitialTransformd()({**base, "initial_transform": None})
    one = InitialTransformd()({**base, "initial_transform": str(tmp_path / "a.tfm")})["initial_transform"]
    two = InitialTransformd()({**base, "initial_transform": [tmp_path / "a.tfm", np.eye(4)]})["initial_transform"]
    np.testing.assert_allclose(one[0], motion((0, 0, 5), (1, 2, 3)), atol=1e-6)
    assert len(one) == 1 and len(two) == 2 and np.array_equal(two[1], np.eye(4))


def test_shift_between_the_planes_of_slices():
    affine = grid((20, 18), (1, 1, 1), "LI", (10, 5, 0))
    affine[:3, 2] = np.cross(affine[:3, 0], affine[:3, 1])
    away = affine.copy()
    away[:3, 3] += 6.5 * affine[:3, 2] + 3 * affine[:3, 0]
    fixed, moving = scan(affine, (20, 18)), scan(away, (20, 18))
    [shift] = InitialTransformd()({"fixed": fixed, "moving": moving})["initial_transform"]
    expected = np.eye(4)
    expected[:3, 3] = 6.5 * affine[:3, 2]  # along the normal alone
    np.testing.assert_allclose(shift, expected, atol=1e-6)
    turned = scan(affine @ grid((1, 1, 1), turn=(4, 0, 0)), (20, 18))
    with pytest.raises(ValueError, match="not parallel"):
        InitialTransformd()({"fixed": fixed, "moving": turned})


@pytest.mark.parametrize("shift, said", [(0.0, False), (25.0, True)])
def test_warning_of_scans_that_are_not_aligned(shift, said, caplog):
    fixed = scan(FIXED, SHAPE)
    moving = scan(FIXED, SHAPE, lambda p: blobs(bent(p) - [shift, 0, 0]))
    item = {"fixed": fixed, "moving": moving, "fixed_scan": fixed, "moving_scan": moving}
    with caplog.at_level(logging.WARNING, logger="monai_deq"):
        done = MatchGridd()(item)
    assert ("not to be aligned" in caplog.text) is said
    a, b = (image.numpy() > image.numpy().mean() for image in (fixed, moving))
    assert done["overlap"] == pytest.approx(2 * (a & b).sum() / (a.sum() + b.sum()))
    assert foreground_overlap(fixed * 1e-3, moving * 1e-3) == pytest.approx(done["overlap"])  # dark ones too
    assert foreground_overlap(fixed, fixed) == 1 and foreground_overlap(fixed * 0, fixed * 0) == 0


CODES = ["".join(o) for p in permutations(("LR", "PA", "IS")) for o in product(*p)]


@pytest.mark.parametrize("own", ["RAS", "PIR"])
def test_every_orientation_as_nibabel_has_it(own):
    shape = (5, 6, 7)
    affine = grid(shape, (1, 2, 3), own, (4, -5, 6), (3, 2, 1))
    values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    image = MetaTensor(torch.from_numpy(values[None]), affine=torch.from_numpy(affine), spatial_ndim=3)
    given = nib.Nifti1Image(values, affine)
    assert len(set(CODES)) == 48
    for code in CODES:
        change = nib.orientations.ornt_transform(nib.io_orientation(affine), nib.orientations.axcodes2ornt(code))
        expected = given.as_reoriented(change)
        found = ResizeFixedd("fixed", None, code)({"fixed": image})["fixed"]
        assert nib.aff2axcodes(expected.affine) == tuple(code) and grid_of(found).orientation == code
        np.testing.assert_array_equal(found[0], np.asarray(expected.dataobj), err_msg=code)
        np.testing.assert_allclose(affine_of(found), expected.affine, atol=1e-6, err_msg=code)


@pytest.mark.parametrize("axes, wanted", [("LP", "AR"), ("LI", "SL"), ("PS", "IA")])
def test_orientation_of_slices(axes, wanted):
    affine = grid((5, 7), (1, 2, 1), axes, (3, -2, 4))
    affine[:3, 2] = np.cross(affine[:3, 0], affine[:3, 1]) / 2
    image = scan(affine, (5, 7))
    found = ResizeFixedd("fixed", None, wanted)({"fixed": image})["fixed"]
    assert grid_of(found).orientation == wanted
    # each voxel has kept its place
    np.testing.assert_allclose(found[0], scan(affine_of(found), tuple(found.shape[1:]))[0], atol=1e-5)
    assert found.shape == (1, 7, 5)


def test_orientation_of_another_plane_stays(caplog):
    affine = grid((5, 7), (1, 2, 1), "LP")
    affine[2, 2] = 1
    image = scan(affine, (5, 7))
    found = ResizeFixedd("fixed", None, "LI")({"fixed": image})["fixed"]
    assert found is image and "registered as it is" in caplog.text


@pytest.mark.parametrize(
    "shape, spacing, expected",
    [
        ((30, 28, 26), (1, 1, 1), (30, 28, 26)),
        ((30, 28, 26), (1, 1.4, 1.2), (30, 28, 26)),
        ((32, 32, 8), (1, 1, 4), (20, 20, 20)),
        ((24, 12), (1, 4), (12, 24)),
    ],
)
def test_isotropic_grid_over_the_same_field_of_view(shape, spacing, expected):
    affine = grid(shape, (*spacing, 1)[:3], "LPS"[: len(shape)], (5, 0, 0))
    if len(shape) == 2:
        affine[:3, 2] = np.cross(affine[:3, 0], affine[:3, 1]) / np.prod(spacing)
    image = scan(affine, shape)
    found = ResizeFixedd("fixed", "isotropic")({"fixed": image})["fixed"]
    assert tuple(found.shape[1:]) == expected
    n = len(shape)
    for corner in (np.zeros(n), np.ones(n)):
        ends = [affine_of(x)[:3, :n] @ (corner * x.shape[1:] - 0.5) + affine_of(x)[:3, 3] for x in (image, found)]
        np.testing.assert_allclose(*ends, atol=1e-5)
    if found is not image:
        edges = np.linalg.norm(affine_of(found)[:3, :n], axis=0)
        assert edges.max() < 1.05 * edges.min()
