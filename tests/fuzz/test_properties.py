# SPDX-License-Identifier: Apache-2.0
"""
What holds of networks, transforms, metrics and solvers whatever the size, spacing, orientation, type and batch.

The cases are the same each time; ``pytest tests/fuzz/test_properties.py --hypothesis-profile search`` draws others, and
many more.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import nibabel as nib
import numpy as np
import SimpleITK as sitk
import torch
from hypothesis import given
from hypothesis import strategies as st
from monai.data import MetaTensor
from scans import grid, world

from monai_deq.apps import apply_transforms
from monai_deq.data import affine_of, read_image, save_nifti
from monai_deq.metrics import (
    compute_folded_voxels,
    compute_label_dice,
    compute_landmark_errors,
    compute_std_log_jacobian,
    jacobian_determinant,
)
from monai_deq.networks.blocks import EnergyUpdate, GradientUpdate, RecurrentUpdate, RegistrationUNet, UNetUpdate
from monai_deq.networks.nets import (
    DEQRegistrationNet,
    EnergyRegistrationNet,
    RegistrationNet,
    RestSettings,
    UnrolledRegistrationNet,
)
from monai_deq.solvers import SolverSettings, solve_fixed_point
from monai_deq.transforms import (
    FixedPointSolver,
    compose_ddf,
    inversion_failures,
    invert_ddf,
    load_transform,
    map_points,
    pull_image,
    save_transform,
)

SEEDS = st.integers(0, 2**31 - 1)
SPACINGS = st.floats(0.3, 6.0)
TURNS = st.floats(-40.0, 40.0)
AXES = st.sampled_from(("RAS", "LPS", "LIA", "PIR", "SAL", "ALS"))


def sizes(least: int, most: int, dims: tuple[int, ...] = (2, 3)) -> st.SearchStrategy[tuple[int, ...]]:
    """Of slices or volumes, that differ along the axes, odd and even."""
    return st.sampled_from(dims).flatmap(lambda n: st.tuples(*[st.integers(least, most)] * n))


@st.composite
def grids(draw: st.DrawFn, least: int = 2, most: int = 9, dims: tuple[int, ...] = (2, 3)) -> Any:
    """Size and affine."""
    size = draw(sizes(least, most, dims))
    spacing, turn = (draw(st.tuples(*[of] * 3)) for of in (SPACINGS, TURNS))
    return size, grid(size, spacing, draw(AXES), turn, draw(st.tuples(*[st.floats(-30.0, 30.0)] * 3)))


def smooth_field(size: tuple[int, ...], seed: int, most: float, batch: int = 1) -> torch.Tensor:
    """A few cosines, whose gradient is below ``most`` along each axis: ``(B, ndim, *size)``, float64."""
    rng = np.random.default_rng(seed)
    places = np.stack(np.meshgrid(*[np.arange(n) for n in size], indexing="ij"))
    waves = rng.uniform(-0.6, 0.6, (batch, len(size), len(size)))
    phases = rng.uniform(0, 6, (batch, len(size)))
    angles = np.tensordot(waves, places, axes=1) + phases[(..., *[None] * len(size))]
    return torch.from_numpy(most / 0.6 * np.cos(angles))


def noise(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


# -- networks


@cache
def network(name: str, dims: int) -> RegistrationNet:
    """Small ones of each kind; eval mode."""
    torch.manual_seed(dims)
    tiny: dict[str, Any] = {"encoder_channels": (2, 3), "decoder_channels": (3,), "final_channels": (2,)}
    unet = UNetUpdate(dims, RegistrationUNet(dims, 2 + dims, flow_std=0.05, **tiny))
    rest = RestSettings(enabled=False)
    net: RegistrationNet
    if name.startswith("deq"):
        net = DEQRegistrationNet(unet, dims, SolverSettings(name=name[4:], max_steps=5), rest=rest)
    elif name == "energy":
        net = EnergyRegistrationNet(EnergyUpdate(dims), steps=(4, 3))
    elif name == "gradient":
        net = UnrolledRegistrationNet([GradientUpdate(dims) for _ in range(2)], steps=[2, 2])
    elif name == "recurrent":
        update = RecurrentUpdate(dims, hidden_size=2)
        update.unet = RegistrationUNet(dims, 2 + 2 * dims, 2, (2, 2), (2,), (), flow_std=0.2)
        net = UnrolledRegistrationNet(update, steps=2)
    else:
        net = UnrolledRegistrationNet(unet, steps=3)
    return net.eval()


NETWORKS = st.sampled_from(("deq_plain", "deq_anderson", "unrolled", "gradient", "recurrent", "energy"))


@given(NETWORKS, sizes(4, 12), st.integers(1, 3), SEEDS, st.sampled_from((0.0, 1.0, 1e-6)))
def test_networks_give_finite_fields_of_each_item(
    name: str, size: tuple[int, ...], batch: int, seed: int, contrast: float
) -> None:
    net = network(name, len(size))
    moving, fixed = contrast * noise((2, batch, 1, *size), seed) + 0.3 * (1 - contrast)
    with torch.no_grad():
        warped, ddf = net(moving, fixed)
        assert warped.shape == moving.shape and ddf.shape == (batch, len(size), *size)
        assert warped.dtype == ddf.dtype == torch.float32
        assert torch.isfinite(ddf).all() and torch.isfinite(warped).all()
        assert float(warped.max()) <= float(moving.max()) + 1e-5 and float(warped.min()) >= float(moving.min()) - 1e-5
        item = seed % batch  # alone it is what it is in company
        _, alone = net(moving[item : item + 1], fixed[item : item + 1])
    torch.testing.assert_close(alone[0], ddf[item], rtol=1e-3, atol=2e-3)


@given(st.sampled_from(("energy", "gradient")), sizes(8, 13), SEEDS)
def test_the_energy_leaves_equal_images_alone(name: str, size: tuple[int, ...], seed: int) -> None:
    image = noise((1, 1, *size), seed)
    if name == "energy":
        with torch.no_grad():
            assert float(network(name, len(size))(image, image)[1].abs().max()) == 0
    else:  # the gradient of the similarity, without the network beside it
        update = GradientUpdate(len(size), backbone=_Nothing(len(size)))
        with torch.no_grad():
            assert float(update(image, image, torch.zeros(1, len(size), *size)).abs().max()) < 1e-4  # rounding


class _Nothing(torch.nn.Module):
    def __init__(self, dims: int) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x[:, : self.dims])


@given(
    sizes(4, 9),
    SEEDS,
    st.sampled_from((torch.uint8, torch.int16, torch.float16, torch.float64, torch.bool)),
    st.sampled_from(("plain", "anderson")),
)
def test_the_solver_takes_images_of_any_type(size: tuple[int, ...], seed: int, dtype: torch.dtype, solver: str) -> None:
    moving, fixed = (noise((2, 1, *size), seed) > 0.5).to(dtype)
    solve = FixedPointSolver(network("deq_plain", len(size)), solver=solver, max_steps=4)
    warped, ddf, record = solve(fixed, moving)
    _, plain, _ = solve(fixed.float(), moving.float())
    torch.testing.assert_close(ddf, plain)
    assert ddf.dtype == torch.float32 and warped.shape == fixed.shape and 1 <= record["steps"] <= 4


# -- solvers


@given(
    st.integers(1, 4),
    st.integers(1, 3),
    st.floats(-0.8, 0.8),
    SEEDS,
    st.sampled_from(("plain", "anderson")),
)
def test_solvers_find_the_fixed_point_of_a_linear_contraction(
    batch: int, channels: int, largest: float, seed: int, name: str
) -> None:
    rng = np.random.default_rng(seed)
    turn, _ = np.linalg.qr(rng.normal(size=(channels, channels)))
    matrix = turn @ np.diag(largest * rng.uniform(0.2, 1.0, channels)) @ turn.T
    offset = torch.from_numpy(rng.normal(size=(batch, channels, 3, 4)))

    def g(x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("ij,bjhw->bihw", torch.from_numpy(matrix), x) + offset

    found, record = solve_fixed_point(
        g, torch.zeros_like(offset), SolverSettings(name=name, max_steps=200, tolerance=1e-9)
    )
    exact = np.einsum("ij,bjhw->bihw", np.linalg.inv(np.eye(channels) - matrix), offset.numpy())
    np.testing.assert_allclose(found.numpy(), exact, atol=1e-7)
    assert record.converged.all() and found.dtype == torch.float64
    if name == "plain":  # it gets closer by the largest eigenvalue each step
        assert (
            float(record.residual[0, 2] if record.residual.shape[1] > 2 else 0) <= float(record.residual[0, 0]) + 1e-12
        )


# -- metrics, against float64 brute force


def brute_determinants(field: np.ndarray) -> np.ndarray:
    """Of ``(ndim, *size)``, voxel by voxel, central differences and one-sided ones at the border."""
    size = field.shape[1:]
    out = np.empty(size)
    for place in np.ndindex(size):
        jacobian = np.eye(len(size))
        for axis, n in enumerate(size):
            low, high = list(place), list(place)
            low[axis], high[axis] = max(place[axis] - 1, 0), min(place[axis] + 1, n - 1)
            difference = field[(slice(None), *high)] - field[(slice(None), *low)]
            jacobian[:, axis] += difference / (high[axis] - low[axis])
        out[place] = np.linalg.det(jacobian)
    return out


@given(sizes(2, 6), SEEDS, st.integers(1, 2), st.sampled_from((torch.float32, torch.float64)), st.floats(0.01, 3.0))
def test_jacobian_metrics(size: tuple[int, ...], seed: int, batch: int, dtype: torch.dtype, scale: float) -> None:
    rng = np.random.default_rng(seed)
    ddf = torch.from_numpy(scale * rng.normal(size=(batch, len(size), *size))).to(dtype)
    mask = torch.from_numpy(rng.random((batch, 1, *size)) < 0.6)
    exact = np.stack([brute_determinants(item.double().numpy()) for item in ddf])[:, None]
    found = jacobian_determinant(ddf)
    assert found.dtype == dtype
    close = {"rtol": 1e-4, "atol": 1e-4 * max(scale, 1) ** len(size)} if dtype == torch.float32 else {"rtol": 1e-9}
    np.testing.assert_allclose(found.numpy(), exact, **close)
    if np.abs(exact).min() > close.get("atol", 1e-12):  # none at the border between folded and not
        for inside in (None, mask):
            chosen = [e[m.numpy()] if inside is not None else e.ravel() for e, m in zip(exact, mask, strict=True)]
            folded = [100 * (c <= 0).mean() if c.size else np.nan for c in chosen]
            np.testing.assert_allclose(compute_folded_voxels(ddf, inside)[:, 0], folded, rtol=1e-5)
            if dtype == torch.float64:
                logs = [np.log(np.clip(c, 1e-9, 1e9)).std() if c.size else np.nan for c in chosen]
                np.testing.assert_allclose(compute_std_log_jacobian(ddf, inside)[:, 0], logs, rtol=1e-6, atol=1e-8)


@given(
    sizes(1, 6),
    SEEDS,
    st.integers(1, 3),
    st.sampled_from((torch.uint8, torch.int16, torch.int64, torch.float32)),
    st.lists(st.integers(1, 9), min_size=1, max_size=5, unique=True),
)
def test_dice(size: tuple[int, ...], seed: int, batch: int, dtype: torch.dtype, labels: list[int]) -> None:
    maps = np.random.default_rng(seed).integers(0, 7, (2, batch, 1, *size))
    warped, fixed = torch.from_numpy(maps).to(dtype)
    expected = np.full((batch, len(labels)), np.nan)
    for i, j in np.ndindex(expected.shape):
        a, b = (maps[k, i] == labels[j] for k in (0, 1))
        if a.any() and b.any():
            expected[i, j] = 2 * (a & b).sum() / (a.sum() + b.sum())
    np.testing.assert_allclose(compute_label_dice(warped, fixed, labels), expected, rtol=1e-6)


@given(sizes(2, 6), SEEDS, st.integers(1, 3), st.integers(1, 4), st.booleans())
def test_landmark_errors(size: tuple[int, ...], seed: int, batch: int, count: int, at_voxels: bool) -> None:
    rng = np.random.default_rng(seed)
    ddf = rng.normal(size=(batch, len(size), *size))
    spacing = rng.uniform(0.5, 3, len(size))
    points = rng.uniform(0, 1, (batch, count, len(size))) * (np.array(size) - 1)
    points = points.round() if at_voxels else points
    other = rng.normal(size=points.shape)
    expected = np.empty((batch, count))
    for i, j in np.ndindex(expected.shape):
        low = np.minimum(np.floor(points[i, j]).astype(int), np.array(size) - 2)
        moved = np.zeros(len(size))
        for corner in np.ndindex(*[2] * len(size)):
            weight = np.prod(np.where(np.array(corner) == 1, points[i, j] - low, 1 - points[i, j] + low))
            moved += weight * ddf[(i, slice(None), *(low + corner))]
        expected[i, j] = np.linalg.norm((points[i, j] + moved - other[i, j]) * spacing)
    tensors = (torch.from_numpy(a) for a in (ddf, points, other))
    np.testing.assert_allclose(compute_landmark_errors(*tensors, spacing.tolist()), expected, rtol=1e-6, atol=1e-6)


# -- transforms, with ITK's answer


@given(
    grids(),
    SEEDS,
    st.sampled_from((torch.uint8, torch.int16, torch.int32, torch.int64, torch.float32, torch.float64, torch.bool)),
    st.sampled_from((".nii", ".nii.gz")),
    st.integers(1, 2),
)
def test_scans_there_and_back(of: Any, seed: int, dtype: torch.dtype, ending: str, channels: int) -> None:
    size, affine = of
    image = (200 * noise((channels, *size), seed)).to(dtype)
    label = not dtype.is_floating_point
    with TemporaryDirectory() as folder:
        file = Path(folder) / f"a{ending}"
        save_nifti(file, image, affine, len(size))
        again = read_image(file, "scan", label=label)
        plain = np.asarray(nib.load(file).dataobj)  # type: ignore[attr-defined]
    values = again.as_tensor().reshape(image.shape)
    assert torch.equal(values, image.to(torch.float32) if not label else image.to(values.dtype))
    expected = image.numpy() if channels == 1 else np.moveaxis(image.numpy(), 0, -1)
    np.testing.assert_array_equal(plain.ravel(), expected.ravel())
    np.testing.assert_allclose(affine_of(again), affine, atol=1e-4)


def itk_points(transform: sitk.Transform, points: np.ndarray) -> np.ndarray:
    """World points ``(..., 3)``, RAS mm, through a transform of ITK."""
    lps = points.reshape(-1, 3) * [-1, -1, 1]
    moved = [transform.TransformPoint(point.tolist()) for point in lps]
    return (np.array(moved) * [-1, -1, 1]).reshape(points.shape)


def read_by_itk(path: Path) -> sitk.Transform:
    if path.name.endswith((".nii.gz", ".mha", ".nrrd")):
        return sitk.DisplacementFieldTransform(sitk.ReadImage(str(path), sitk.sitkVectorFloat64))
    return sitk.ReadTransform(str(path))


def our_points(chain: Any, points: np.ndarray) -> np.ndarray:
    return map_points(torch.from_numpy(points.reshape(-1, 3).T.copy()), chain).T.numpy().reshape(points.shape)


@given(
    grids(least=3, dims=(3,)),
    SEEDS,
    st.sampled_from((".nii.gz", ".mha", ".nrrd", ".h5")),
    st.booleans(),
)
def test_fields_there_and_back_and_by_itk(of: Any, seed: int, ending: str, with_matrix: bool) -> None:
    size, affine = of
    field = smooth_field(size, seed, 0.5)[0].float()
    ddf = MetaTensor(field, affine=torch.from_numpy(affine))
    rng = np.random.default_rng(seed)
    matrix = np.eye(4)
    matrix[:3] += rng.normal(scale=0.1, size=(3, 4))
    chain = [matrix, ddf] if with_matrix and ending == ".h5" else [ddf]
    inner = (np.array(size) - 1) * rng.uniform(0.1, 0.9, (20, 3))
    points = inner @ affine[:3, :3].T + affine[:3, 3]
    if len(chain) == 2:  # they are to lie on the grid behind the matrix
        points = (points - matrix[:3, 3]) @ np.linalg.inv(matrix[:3, :3]).T
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"t{ending}"
        save_transform(path, chain if len(chain) == 2 else ddf)
        again, by_itk = load_transform(path), itk_points(read_by_itk(path), points)
    np.testing.assert_allclose(again[-1], field, atol=1e-4)
    np.testing.assert_allclose(our_points(again, points), our_points(chain, points), atol=1e-3)
    np.testing.assert_allclose(our_points(chain, points), by_itk, atol=2e-3)


@given(SEEDS, st.sampled_from((".tfm", ".txt", ".mat", ".h5")), st.floats(1e-3, 50.0))
def test_matrices_there_and_back_and_by_itk(seed: int, ending: str, scale: float) -> None:
    rng = np.random.default_rng(seed)
    matrix = np.eye(4)
    matrix[:3, :3] += rng.normal(scale=0.3, size=(3, 3))
    matrix[:3, 3] = rng.normal(scale=scale, size=3)
    points = rng.normal(scale=scale, size=(5, 3))
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"t{ending}"
        save_transform(path, matrix)
        [again] = load_transform(path)
        by_itk = itk_points(sitk.ReadTransform(str(path)), points)
    np.testing.assert_allclose(again, matrix, rtol=1e-12, atol=1e-12 * scale)
    np.testing.assert_allclose(our_points([matrix], points), by_itk, rtol=1e-9, atol=1e-9 * max(scale, 1))


@given(grids(least=4, most=8, dims=(3,)), grids(least=2, most=7, dims=(3,)), SEEDS, st.booleans())
def test_resampling_is_that_of_itk(of: Any, onto: Any, seed: int, label: bool) -> None:
    (size, affine), (target, target_affine) = of, onto
    array = np.random.default_rng(seed).integers(1, 9, size).astype(np.float32)
    image = MetaTensor(torch.from_numpy(array)[None], affine=torch.from_numpy(affine))
    reference = MetaTensor(torch.zeros(1, *target), affine=torch.from_numpy(target_affine))
    mode = "nearest" if label else "bilinear"
    ours = pull_image(image, reference, mode=mode, outside=0.0)[0].numpy()
    with TemporaryDirectory() as folder:
        for name, values, of_affine in (("a", array, affine), ("b", np.zeros(target, np.float32), target_affine)):
            nib.save(nib.Nifti1Image(values, of_affine), Path(folder) / f"{name}.nii")
        moving, fixed = (sitk.ReadImage(str(Path(folder) / f"{name}.nii")) for name in ("a", "b"))
    way = sitk.sitkNearestNeighbor if label else sitk.sitkLinear
    by_itk = sitk.GetArrayFromImage(sitk.Resample(moving, fixed, sitk.Transform(), way, 0.0)).transpose(2, 1, 0)
    # in voxels of the image: what lies between two of them, or on its rim, may go either way by rounding
    at = (world(target_affine, target) - affine[:3, 3]) @ np.linalg.inv(affine[:3, :3]).T
    doubtful = (np.abs(at % 1 - 0.5) < 1e-3).any(-1)
    np.testing.assert_allclose(ours[~doubtful], by_itk[~doubtful], atol=5e-3)


@given(grids(least=5, most=9), SEEDS, st.integers(1, 2))
def test_inverse_of_a_smooth_field(of: Any, seed: int, batch: int) -> None:
    size, _ = of
    ddf = smooth_field(size, seed, 0.25, batch).float()
    inverse, record = invert_ddf(ddf)
    failed, _ = inversion_failures(ddf, inverse)
    assert not failed.any() and record.converged.all()
    again, _ = invert_ddf(ddf[-1:])  # each item for itself
    torch.testing.assert_close(again[0], inverse[-1], atol=1e-4, rtol=0)


@given(grids(least=3, dims=(2, 3)), SEEDS)
def test_a_chain_is_its_composition(of: Any, seed: int) -> None:
    size, affine = of
    rng = np.random.default_rng(seed)
    dims = len(size)
    field = MetaTensor(smooth_field(size, seed, 0.3)[0].float(), affine=torch.from_numpy(affine), spatial_ndim=dims)
    matrix = np.eye(4)
    if dims == 3:
        matrix[:3] += rng.normal(scale=0.05, size=(3, 4))
    composed = compose_ddf([field, matrix], MetaTensor(torch.zeros(1, *size), affine=torch.from_numpy(affine)))
    points = world(affine, size)
    expected = our_points([field, matrix], points) - points
    voxels = np.moveaxis(expected @ np.linalg.inv(affine)[:dims, :3].T, -1, 0)
    np.testing.assert_allclose(composed, voxels, atol=1e-3)
    # none at all is no displacement
    nothing = compose_ddf([], MetaTensor(torch.zeros(1, *size), affine=torch.from_numpy(affine)))
    assert nothing.shape == (dims, *size) and float(nothing.abs().max()) == 0


@given(grids(least=3, most=7, dims=(3,)), SEEDS)
def test_apply_of_a_translation(of: Any, seed: int) -> None:
    """A shift by whole voxels, of files: what comes out is the array shifted."""
    size, affine = of
    rng = np.random.default_rng(seed)
    array = rng.integers(1, 99, size).astype(np.int16)
    shift = rng.integers(-1, 2, 3)
    matrix = np.eye(4)
    matrix[:3, 3] = affine[:3, :3] @ shift
    with TemporaryDirectory() as folder:
        path = Path(folder)
        image = nib.Nifti1Image(array, affine)
        image.set_sform(affine, code=1)
        nib.save(image, path / "a.nii.gz")
        save_transform(path / "t.tfm", matrix)
        apply_transforms(path / "a.nii.gz", [path / "t.tfm"], path / "b.nii.gz", path / "a.nii.gz", label=True)
        found = np.asarray(nib.load(path / "b.nii.gz").dataobj)  # type: ignore[attr-defined]
    expected = np.zeros_like(array)
    for place in np.ndindex(size):
        source = np.array(place) + shift
        if ((source >= 0) & (source < size)).all():
            expected[place] = array[tuple(source)]
    np.testing.assert_array_equal(found, expected)
