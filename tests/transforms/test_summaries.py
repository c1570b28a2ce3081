# SPDX-License-Identifier: Apache-2.0
"""What a registration did in numbers, against SimpleITK, NumPy and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from monai.data import MetaTensor
from scans import bent, blobs, grid, parts, world

from monai_deq.networks.blocks import LocalCorrelationLoss
from monai_deq.transforms import SummarizeRegistrationd, pull_image, summaries, summary_lines
from monai_deq.transforms.summaries import in_voxels_of

SHAPE = (14, 12, 10)
AFFINE = grid(SHAPE, (1.5, 1.7, 2.0), "LPS", (8, -12, 15))


def placed(array: np.ndarray, affine: np.ndarray = AFFINE) -> MetaTensor:
    return MetaTensor(torch.from_numpy(array), affine=torch.from_numpy(affine), spatial_ndim=array.ndim - 1)


def image(of=blobs, shape=SHAPE, affine=AFFINE, dtype=np.float32) -> MetaTensor:
    return placed(of(world(affine, shape)).astype(dtype)[None], affine)


def field(size: float, shape: tuple[int, ...] = SHAPE, affine: np.ndarray = AFFINE) -> MetaTensor:
    places = world(affine, shape)
    voxels = (bent(places, size) - places) @ np.linalg.inv(affine)[:3, :3].T
    return placed(np.moveaxis(voxels, -1, 0)[: len(shape)].astype(np.float32).copy(), affine)


def item(size: float = 1.0, shape: tuple[int, ...] = SHAPE) -> dict:
    fixed, moving = image(shape=shape), image(lambda p: blobs(bent(p)), shape)
    scans = {"fixed_scan": fixed, "moving_scan": moving, "fixed": fixed / 150, "moving": moving / 150}
    ddf = field(size, shape)
    return {**scans, "ddf": ddf, "warped": pull_image(moving, fixed, [ddf]) / 150}


@pytest.mark.parametrize("at_once", [1, 400, 2**22])
@pytest.mark.parametrize("size", [1.0, 15.0])
def test_folds_as_itk_counts_them(size, at_once, monkeypatch):
    monkeypatch.setattr(summaries, "_AT_ONCE", at_once)
    given = item(size)
    summary = SummarizeRegistrationd()(given)["summary"]
    # in voxels, as the determinant is the same in any coordinates
    vectors = sitk.GetImageFromArray(given["ddf"].numpy().transpose(3, 2, 1, 0).astype(np.float64), isVector=True)
    found = sitk.GetArrayFromImage(sitk.DisplacementFieldJacobianDeterminant(vectors)).T
    inner = (slice(1, -1),) * 3  # at the border ITK takes no one-sided differences
    ours = torch.cat([*summaries._determinants(given["ddf"].as_tensor()[None])], dim=2)[0, 0].numpy()
    np.testing.assert_allclose(ours[inner], found[inner], atol=1e-4)
    assert ours.shape == SHAPE
    assert summary["folded_percent"] == pytest.approx(100 * (ours <= 0).mean())
    assert summary["std_log_jacobian"] == pytest.approx(np.log(ours.clip(1e-9, 1e9)).std(ddof=1), rel=1e-4)
    assert (summary["folded_percent"] > 1) is (size > 5)


def test_determinant_of_a_linear_field_is_its_own_everywhere(monkeypatch):
    matrix = np.array([[0.1, 0.05, 0.0], [-0.02, -0.1, 0.03], [0.0, 0.04, 0.2]])
    voxels = world(np.eye(4), SHAPE) @ matrix.T
    given = {**item(), "ddf": placed(np.moveaxis(voxels, -1, 0).astype(np.float32).copy())}
    for at_once in (1, 250, 10**6):
        monkeypatch.setattr(summaries, "_AT_ONCE", at_once)
        found = torch.cat([*summaries._determinants(given["ddf"].as_tensor()[None])], dim=2)
        np.testing.assert_allclose(found, np.linalg.det(np.eye(3) + matrix), rtol=1e-3)


def test_similarity_before_and_after():
    given = item()
    summary = SummarizeRegistrationd()(given)["summary"]
    loss = LocalCorrelationLoss()
    plain = {k: given[k].as_tensor()[None] for k in ("fixed", "moving", "warped")}
    assert summary["similarity_before"] == pytest.approx(-float(loss(plain["moving"], plain["fixed"])))
    assert summary["similarity_after"] == pytest.approx(-float(loss(plain["warped"], plain["fixed"])))
    assert "dice_after" not in summary and "tre_after" not in summary and "overlap" not in summary
    before = SummarizeRegistrationd()({**given, "moving_before": given["warped"], "overlap": 0.9})["summary"]
    assert before["similarity_before"] == pytest.approx(summary["similarity_after"]) and before["overlap"] == 0.9


def test_overlap_of_labels():
    fixed, moving = image(parts, dtype=np.int32), image(lambda p: parts(bent(p)), dtype=np.int32)
    moving = placed(np.where(moving.numpy() == 3, 77, moving.numpy()).astype(np.int32))  # one that the other has not
    warped = placed(np.where(fixed.numpy() == 2, 0, fixed.numpy()).astype(np.int32))  # and one that vanished
    warped = placed(np.where(warped.numpy() == 3, 77, warped.numpy()).astype(np.int32))
    given = {**item(), "fixed_label": fixed, "moving_label": moving, "warped_label": warped}
    summary = SummarizeRegistrationd()(given)["summary"]
    common = sorted(({*np.unique(fixed)} & {*np.unique(moving)}) - {0})
    assert 3 not in common and 2 in common
    for label in common:
        a, b, c = (x.numpy() == label for x in (fixed, moving, warped))
        before, after = 2 * (a & b).sum() / (a.sum() + b.sum()), 2 * (a & c).sum() / (a.sum() + c.sum())
        assert summary["dice_labels"][str(label)] == pytest.approx([before, after], abs=1e-5)
    assert summary["dice_labels"]["2"][1] == 0
    assert summary["dice_after"] == pytest.approx((len(common) - 1) / len(common), abs=1e-6)
    none = {**given, "moving_label": placed(np.zeros_like(moving.numpy()))}
    assert "dice_after" not in SummarizeRegistrationd()(none)["summary"]


@pytest.mark.parametrize("shape", [SHAPE, SHAPE[:2]])
def test_landmarks_in_mm(shape):
    """A field that is constant: distances in closed form, the moving scan on another grid."""
    ndim, shift = len(shape), np.array([1.0, -2.0, 0.5])[: len(shape)]
    ddf = placed(np.ones((ndim, *shape), np.float32) * shift.reshape(-1, *[1] * ndim).astype(np.float32))
    other = AFFINE @ np.array([[0.5, 0, 0, 3], [0, -1, 0, 8], [0, 0, 2, 0], [0, 0, 0, 1]])
    points = np.random.default_rng(0).uniform(2, 8, (7, ndim))
    moved = points + shift + 1.0  # in voxels of the fixed scan: one voxel along each axis is left
    in_other = (np.linalg.inv(other)[:ndim, :ndim] @ AFFINE[:ndim, :ndim] @ moved.T).T
    in_other += (np.linalg.inv(other) @ AFFINE)[:ndim, 3]
    if ndim == 3:
        in_other = ((np.linalg.inv(other) @ AFFINE)[:3, :3] @ moved.T).T + (np.linalg.inv(other) @ AFFINE)[:3, 3]
    else:
        in_other = ((np.linalg.inv(other) @ AFFINE)[:2, :2] @ moved.T).T + (np.linalg.inv(other) @ AFFINE)[:2, 3]
    given = {**item(shape=shape), "ddf": ddf, "moving_scan": image(shape=shape, affine=other)}
    given |= {
        "fixed_keypoints": torch.from_numpy(points).float(),
        "moving_keypoints": torch.from_numpy(in_other).float(),
    }
    summary = SummarizeRegistrationd()(given)["summary"]
    spacing = np.array([1.5, 1.7, 2.0])[:ndim]
    assert summary["tre_after"] == pytest.approx(np.linalg.norm(spacing), rel=1e-4)
    assert summary["tre_before"] == pytest.approx(np.linalg.norm(spacing * (shift + 1)), rel=1e-4)
    back = in_voxels_of(given["moving_keypoints"], given["moving_scan"], given["fixed_scan"])
    np.testing.assert_allclose(back, moved, atol=1e-4)


def test_lines_of_one_pair_and_of_several():
    summary = {
        "similarity_before": 0.81234,
        "similarity_after": 0.9,
        "folded_percent": 0.0012,
        "std_log_jacobian": 0.25,
    }
    one = {"moving_subject": "a", "fixed_subject": "b", "verdict": "at rest", "seconds": 3.4, "summary": summary}
    files = {"warped": "out/a_to_b_warped.nii.gz", "record": "out/a_to_b_record.json"}
    lines = summary_lines([{**one, "files": files}])
    text = "\n".join(lines)
    assert "a_to_b" in lines[0] and "at rest" in lines[1] and lines[-2:] == [f"wrote {f}" for f in files.values()]
    assert "81.23 -> 90.00" in text and "0.0012" in text and "0.250" in text and "Dice" not in text
    two = {**one, "name": "other", "summary": {**summary, "dice_before": 0.5, "dice_after": 0.75}, "files": files}
    lines = summary_lines([one, two])
    assert lines[-1] == "wrote the files of 2 pairs to out"
    assert "Dice" in lines[0] and "a_to_b" in lines[1] and "50.00 -> 75.00" in lines[2] and "nan" not in "".join(lines)
