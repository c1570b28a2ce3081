# SPDX-License-Identifier: Apache-2.0
"""Inverses of fields against closed forms and SciPy's root finder, and what is said where there is none."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import DataLoader, Dataset, MetaTensor, decollate_batch
from monai.transforms import Compose
from scipy import ndimage, optimize

import monai_deq.transforms as transforms
from monai_deq.solvers import SolverSettings
from monai_deq.transforms import InvertDDF, InvertDDFd, inversion_failures, invert_ddf
from monai_deq.utils import json_ready

SIZES = [(21, 16), (11, 14, 9)]
MATRICES = {
    "strong": np.array([[1.0, 1.6], [-1.2, 0.7]]),  # a shear and turn whose displacement grows by more than one a voxel
    "shrinking": np.diag([0.1, 2.5]),
    "3-D": np.array([[1.2, 0.7, -0.3], [-0.6, 0.8, 0.4], [0.3, -1.1, 1.5]]),
}


def grid(size: tuple[int, ...]) -> np.ndarray:
    return np.stack(np.meshgrid(*map(np.arange, size), indexing="ij")).astype(float)


def smooth_ddf(size: tuple[int, ...], height: float, seed: int = 0) -> torch.Tensor:
    """Bumps of ``height`` voxels that fall to zero at the border, ``(1, ndim, *spatial)``."""
    noise = np.random.default_rng(seed).normal(size=(len(size), *size))
    window = np.prod([np.sin(np.pi * x / (n - 1)) for x, n in zip(grid(size), size, strict=True)], axis=0)
    field = np.stack([ndimage.gaussian_filter(c, 2.0) for c in noise]) * window
    return torch.from_numpy(height * field / abs(field).max())[None]


def round_trip(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """How far from home ``x`` is after ``first`` and ``second`` ``(ndim, *spatial)``, by SciPy's interpolation."""
    ends = grid(first.shape[1:]) + first
    back = np.stack([ndimage.map_coordinates(c, ends, order=1, mode="nearest") for c in second])
    return np.linalg.norm(first + back, axis=0)


# --- closed forms -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_zero_stays_zero(size: tuple[int, ...]) -> None:
    inverse, record = invert_ddf(torch.zeros(2, len(size), *size))
    assert torch.count_nonzero(inverse) == 0
    assert record.converged.all() and record.steps.tolist() == [1, 1]


@pytest.mark.parametrize("size", SIZES)
def test_a_shift_goes_back(size: tuple[int, ...]) -> None:
    shift = torch.tensor([2.25, -3.5, 1.125][: len(size)]).view(1, -1, *[1] * len(size))
    ddf = shift.expand(1, -1, *size)
    inverse, _ = invert_ddf(ddf)
    torch.testing.assert_close(inverse, -ddf)
    failed, outside = inversion_failures(ddf, inverse)
    left = np.zeros(size, bool)
    for x, s, n in zip(grid(size), shift.flatten().tolist(), size, strict=True):
        left |= (x - s < -0.5) | (x - s > n - 0.5)
    assert not failed.any()
    np.testing.assert_array_equal(outside[0], left)


@pytest.mark.parametrize("name", MATRICES)
def test_linear_maps(name: str) -> None:
    matrix = MATRICES[name]
    size = (25, 31) if len(matrix) == 2 else (13, 16, 11)
    centre = (np.array(size) - 1).reshape(-1, *[1] * len(size)) / 2
    x = grid(size) - centre
    ddf = np.tensordot(matrix - np.eye(len(size)), x, 1)
    expected = np.tensordot(np.linalg.inv(matrix) - np.eye(len(size)), x, 1)
    inverse, _ = invert_ddf(torch.from_numpy(ddf)[None])
    inside = (abs(x + expected) <= centre).all(axis=0)
    assert 0.02 < inside.mean() < 1
    np.testing.assert_allclose(inverse[0].numpy()[:, inside], expected[:, inside], atol=1e-9)
    failed, outside = inversion_failures(torch.from_numpy(ddf)[None], inverse)
    assert not (failed | outside)[0].numpy()[inside].any()


@pytest.mark.parametrize("size", [(60, 47), (25, 22, 27)])
def test_axes_stretched_each_for_itself(size: tuple[int, ...]) -> None:
    # slopes from 0.05 to 3, changing from voxel to voxel; the inverse of such a line is known to np.interp
    rng = np.random.default_rng(3)
    ddf, expected = np.zeros((2, 1, len(size), *size))
    for axis, n in enumerate(size):
        ends = np.cumsum(rng.permutation(np.geomspace(0.05, 3.0, n)))
        ends += (n - 1) / 2 - ends.mean()
        shape = [-1 if i == axis else 1 for i in range(len(size))]
        voxels = np.arange(n)
        # beyond the border all goes on as far
        far = np.concatenate([[ends[0] - n], ends, [ends[-1] + n]])
        ddf[0, axis] = (ends - voxels).reshape(shape)
        expected[0, axis] = (np.interp(voxels, far, [-n, *voxels, 2 * n - 1]) - voxels).reshape(shape)
    inverse, record = invert_ddf(torch.from_numpy(ddf))
    assert record.converged.all() and record.steps[0] <= 16
    np.testing.assert_allclose(inverse, expected, atol=1e-9)
    failed, outside = inversion_failures(torch.from_numpy(ddf), inverse)
    assert not failed.any() and outside.any()


# --- other programs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(15, 12), (9, 7, 8)])
def test_agrees_with_a_root_finder(size: tuple[int, ...]) -> None:
    ddf = smooth_ddf(size, 1.5 if len(size) == 2 else 1.0)
    u = ddf[0].numpy()

    def displaced(point: np.ndarray) -> np.ndarray:
        return point + np.array([ndimage.map_coordinates(c, point[:, None], order=1, mode="nearest")[0] for c in u])

    inverse, record = invert_ddf(ddf)
    assert inverse.dtype == torch.float64 and record.converged.all()
    voxels = grid(size).reshape(len(size), -1).T
    for voxel in voxels[:: 1 if len(size) == 2 else 5]:
        solution = optimize.least_squares(
            lambda p, x=voxel: displaced(p) - x, voxel, xtol=1e-14, ftol=1e-14, gtol=1e-14
        )
        assert solution.cost < 1e-16
        np.testing.assert_allclose(inverse[0].numpy()[(slice(None), *voxel.astype(int))], solution.x - voxel, atol=1e-6)


@pytest.mark.parametrize(("size", "height"), [((40, 33), 2.5), ((19, 22, 17), 2.3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_round_trips_where_the_plain_map_does_not_contract(size: tuple, height: float, dtype: torch.dtype) -> None:
    ddf = smooth_ddf(size, height).to(dtype)
    steepest = max(np.abs(np.diff(ddf[0].numpy(), axis=axis + 1)).max() for axis in range(len(size)))
    inverse, record = invert_ddf(ddf)
    assert steepest > 1 and record.converged.all() and record.steps.max() < 16
    assert round_trip(inverse[0].double().numpy(), ddf[0].double().numpy()).max() < 1e-3
    # the other way round the inverse, which bends more, is interpolated linearly
    assert np.sqrt((round_trip(ddf[0].double().numpy(), inverse[0].double().numpy()) ** 2).mean()) < 0.12
    assert not any(mask.any() for mask in inversion_failures(ddf, inverse))


# --- batches, starts, layouts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_an_item_is_what_it_is_alone(size: tuple[int, ...]) -> None:
    ddf = torch.cat([smooth_ddf(size, 1.5, seed=1), smooth_ddf(size, 0.5, seed=2)]).float()
    inverse, record = invert_ddf(ddf)
    for i in range(2):
        alone, its_record = invert_ddf(ddf[i : i + 1])
        torch.testing.assert_close(inverse[i : i + 1], alone, rtol=0, atol=0)
        assert record.steps[i] == its_record.steps[0]
    # channels last in memory
    moved = ddf.movedim(1, -1).contiguous().movedim(-1, 1)
    torch.testing.assert_close(invert_ddf(moved)[0], inverse)
    torch.testing.assert_close(inversion_failures(moved, -inverse)[0], inversion_failures(ddf, -inverse)[0])


def test_settings_and_start() -> None:
    ddf = smooth_ddf((21, 16), 1.5)
    inverse, record = invert_ddf(ddf)
    assert not invert_ddf(ddf, SolverSettings(max_steps=1))[1].converged.any()
    again, its_record = invert_ddf(ddf, initial=inverse)
    assert its_record.steps < record.steps
    torch.testing.assert_close(again, inverse, rtol=0, atol=1e-6)
    last = torch.ones_like(ddf).movedim(1, -1).contiguous().movedim(-1, 1)
    torch.testing.assert_close(invert_ddf(ddf, initial=last)[0], inverse, rtol=0, atol=1e-6)
    assert not invert_ddf(ddf.requires_grad_())[0].requires_grad
    assert invert_ddf(ddf.half())[0].dtype == torch.float32


# --- no inverse -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("height", [1.0, 5.0])
def test_folds_are_failures(size: tuple[int, ...], height: float) -> None:
    noise = height * torch.randn(1, len(size), *size, generator=torch.Generator().manual_seed(0))
    inverse, _ = invert_ddf(noise)
    failed, _ = inversion_failures(noise, inverse)
    assert torch.isfinite(inverse).all() and failed.double().mean() > 0.05
    long = round_trip(inverse[0].double().numpy(), noise[0].double().numpy()) > 0.05
    assert failed[0].numpy()[long].all()


def test_a_mirror_has_round_trips_and_folds() -> None:
    ddf = torch.zeros(1, 2, 20, 5)
    ddf[0, 0] = (19 - 2 * torch.arange(20.0))[:, None]
    inverse, _ = invert_ddf(ddf)
    torch.testing.assert_close(inverse[:, :, 1:-1], ddf[:, :, 1:-1])
    failed, outside = inversion_failures(ddf, inverse)
    # rows 0 and 19 come from the border, where the field ends and others lead there too
    assert failed[0, 1:-1].all() and not outside[0, 1:-1].any()


def test_failures_by_hand() -> None:
    ddf, inverse = torch.zeros(1, 2, 4, 5), torch.zeros(1, 2, 4, 5)
    inverse[0, :, 1, 1] = torch.tensor([0.03, 0.03])
    inverse[0, 1, 2, 2] = 0.06
    inverse[0, 0, 3, 3], inverse[0, 1, 0, 0] = 0.4, -0.6
    failed, outside = inversion_failures(ddf, inverse)
    assert torch.nonzero(failed[0]).tolist() == [[0, 0], [2, 2], [3, 3]]
    assert torch.nonzero(outside[0]).tolist() == [[0, 0]]
    assert torch.nonzero(inversion_failures(ddf, inverse, tolerance=0.04)[0][0]).tolist()[1] == [1, 1]


# --- transforms -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [torch.as_tensor, np.asarray, MetaTensor])
@pytest.mark.parametrize("size", SIZES)
def test_transform(size: tuple[int, ...], kind: Any) -> None:
    ddf = smooth_ddf(size, 1.5)
    inverse, record = InvertDDF()(kind(ddf[0]))
    torch.testing.assert_close(torch.as_tensor(inverse), invert_ddf(ddf)[0][0], check_dtype=False)
    assert isinstance(inverse, MetaTensor) == (kind is MetaTensor)
    assert record["converged"] and 1 < record["steps"] < 16 and record["residual"] < 1e-5
    assert record["failed"] == record["failed_percent"] == record["outside_percent"] == 0
    json.dumps(json_ready(record), allow_nan=False)


@pytest.mark.parametrize("settings", [None, SolverSettings(max_steps=3, tolerance=0.0)])
def test_records_collate(settings: SolverSettings | None) -> None:
    # nothing to invert, and a field that takes several steps
    items = [{"ddf": torch.zeros(2, 9, 8)}, {"ddf": smooth_ddf((9, 8), 1.5)[0]}]
    data = Dataset(items, InvertDDFd("ddf", settings=settings))
    steps = [item["inverse_ddf_record"]["steps"] for item in data]
    assert steps[0] < steps[1]
    (batch,) = DataLoader(data, batch_size=2)
    assert batch["inverse_ddf_record"]["steps"].tolist() == steps
    for record, item in zip(decollate_batch(batch["inverse_ddf_record"]), data, strict=True):
        known = item["inverse_ddf_record"]
        assert json_ready(record) == json_ready(known) and [*map(type, record.values())] == [*map(type, known.values())]


def test_record_counts() -> None:
    ddf = torch.zeros(2, 10, 8)
    ddf[0] = 3.0
    assert InvertDDF()(ddf)[1]["outside_percent"] == pytest.approx(30)
    ddf[0, ::2] = -3.0
    record = InvertDDF()(ddf)[1]
    assert record["failed"] == round(record["failed_percent"] * 0.8) > 0


def test_in_a_chain_with_meta_data() -> None:
    affine = torch.tensor([[0, 0, 2, 5], [1.5, 0, 0, -3], [0, -0.7, 0, 8], [0, 0, 0, 1]], dtype=torch.float64)
    size = (11, 14, 9)
    ddf = MetaTensor(smooth_ddf(size, 1.5)[0].float(), affine=affine, meta={"filename_or_obj": "fixed.nii.gz"})
    item = {"ddf": ddf, "other": np.zeros((2, 5, 6), np.float32), "name": "x"}
    out = Compose([InvertDDFd(("ddf", "other"))])(item)
    assert set(out) == {*item, "inverse_ddf", "inverse_ddf_record", "inverse_other", "inverse_other_record"}
    assert out["ddf"] is ddf and out["inverse_other_record"]["steps"] == 1
    inverse = out["inverse_ddf"]
    torch.testing.assert_close(inverse.affine, affine)
    assert inverse.meta["filename_or_obj"] == "fixed.nii.gz" and inverse.spatial_ndim == 3
    torch.testing.assert_close(inverse.as_tensor(), invert_ddf(ddf.as_tensor()[None])[0][0])
    named = InvertDDFd("ddf", output_keys="back", record_keys="how", settings=SolverSettings(max_steps=1))(item)
    assert set(named) == {*item, "back", "how"} and named["how"]["steps"] == 1
    assert transforms.InvertDDFD is transforms.InvertDDFd is transforms.InvertDDFDict


# --- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 3, 6, 5), (1, 2, 6, 5, 4), (2, 6, 5), (1, 1, 6)])
def test_refuses_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"^ddf must be floats \(B, 2, H, W\) .*, got \(.*convert\.$"):
        invert_ddf(torch.zeros(shape))


def test_refuses() -> None:
    ddf = torch.zeros(1, 2, 6, 5)
    with pytest.raises(ValueError, match="ddf must be floats .* of torch.int64"):
        invert_ddf(ddf.long())
    for value in ("nan", "inf"):
        bad = ddf.clone()
        bad[0, 1, 2, 3] = float(value)
        with pytest.raises(ValueError, match="^ddf must be finite, got NaN or infinity"):
            InvertDDF()(bad[0])
        with pytest.raises(ValueError, match="^initial must be finite"):
            invert_ddf(ddf, initial=bad)
        with pytest.raises(ValueError, match="^inverse must be finite"):
            inversion_failures(ddf, bad)
    with pytest.raises(ValueError, match=r"ddf and initial must have one shape, got \(1, 2, 6, 5\) and \(1, 2, 6, 6\)"):
        invert_ddf(ddf, initial=torch.zeros(1, 2, 6, 6))
    for tolerance in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="tolerance must not be negative"):
            InvertDDFd("ddf", tolerance=tolerance)
        with pytest.raises(ValueError, match="tolerance must not be negative"):
            inversion_failures(ddf, ddf, tolerance)
    with pytest.raises(KeyError, match="ddf"):
        InvertDDFd("ddf")({"image": ddf})
    assert set(InvertDDFd("ddf", allow_missing_keys=True)({"image": ddf})) == {"image"}
