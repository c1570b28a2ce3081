# SPDX-License-Identifier: Apache-2.0
"""ElastixRegistration: the field, its axes and sign, against elastix's own image and known displacements."""

from __future__ import annotations

import copy
import json
import pickle
import sys
import types
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from scans import bent, blobs, grid, write
from scipy import ndimage

from monai_deq.apps import RegistrationSettings, register_pairs
from monai_deq.baselines import ElastixRegistration
from monai_deq.inferers import FixedPointInferer
from monai_deq.utils import json_ready

try:  # without the import, which takes ten seconds
    HAS_ELASTIX = bool(version("itk-elastix"))
except PackageNotFoundError:
    HAS_ELASTIX = False
needs_elastix = pytest.mark.skipif(not HAS_ELASTIX, reason="needs itk-elastix")

SIZES = {2: (61, 48), 3: (18, 16, 14)}
FAST = {"NumberOfSamplesForExactGradient": 500}  # for the length of the first steps


def smooth_noise(size: tuple[int, ...], sigma: float, rng: np.random.Generator) -> np.ndarray:
    noise = ndimage.gaussian_filter(rng.standard_normal(size), sigma)
    return noise / noise.std()


def make_pair(ndim: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """A blob with texture, the same under a smooth displacement, different along each axis, and the displacement."""
    rng, size = np.random.default_rng(seed), SIZES[ndim]
    grid = np.stack(np.meshgrid(*map(np.arange, size), indexing="ij")).astype(float)
    centre = np.reshape([(n - 1) / 2 for n in size], (-1, *[1] * ndim))
    radius = np.sqrt((((grid - centre) / (0.45 * np.max(centre))) ** 2 / 2).sum(0))
    texture = smooth_noise(size, 2.0, rng)
    moving = (1 / (1 + np.exp(6 * (radius - 1)))) * (0.6 + 0.12 * texture)
    ddf = np.stack([(1.6 - 0.5 * i) * smooth_noise(size, 8.0, rng) for i in range(ndim)])
    fixed = ndimage.map_coordinates(moving, grid + ddf, order=3, mode="nearest")
    return as_image(moving), as_image(fixed), ddf


def as_image(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array.astype(np.float32))[None, None]


def make_network(ndim: int, **kwargs: Any) -> ElastixRegistration:
    return ElastixRegistration(ndim, **{"iterations": 40, "samples": 500, "threads": 1, **kwargs}).eval()


@pytest.fixture
def itk() -> Iterator[Any]:
    """Put back what holds for all of ITK in this process: elastix's own ``number_of_threads`` leaves it changed."""
    import itk

    threader = itk.MultiThreaderBase
    highest, default = threader.GetGlobalMaximumNumberOfThreads(), threader.GetGlobalDefaultNumberOfThreads()
    yield itk
    threader.SetGlobalMaximumNumberOfThreads(highest)
    threader.SetGlobalDefaultNumberOfThreads(default)


@needs_elastix
def test_pickles() -> None:
    moving, fixed, _ = make_pair(2)
    network = ElastixRegistration(2, levels=1, iterations=2, parameters=FAST, threads=1)
    expected = network.solve(moving, fixed)[0]  # before: what a call keeps must not be in the way
    for again in (pickle.loads(pickle.dumps(network)), copy.deepcopy(network)):
        assert again.parameter_map == network.parameter_map
        assert torch.equal(again.solve(moving, fixed)[0], expected) and bool(expected.any())


@needs_elastix
@pytest.mark.parametrize(
    "ndim, settings",
    [
        (2, {}),
        (2, {"metric": "AdvancedNormalizedCorrelation", "bending_weight": 0.1}),
        (3, {"metric": "AdvancedNormalizedCorrelation", "bending_weight": 0.1}),
    ],
)
def test_recovers_a_known_displacement(ndim: int, settings: dict[str, Any]) -> None:
    moving, fixed, truth = make_pair(ndim)
    network = make_network(ndim, iterations=80 if ndim == 2 else 30, parameters=FAST, **settings)
    out = FixedPointInferer(max_steps=3, tolerance=0.1)(moving, network, fixed)
    assert out["ddf"].shape == (1, ndim, *SIZES[ndim]) and out["ddf"].dtype == torch.float32
    before, after = ((image - fixed).square().mean() for image in (moving, out["warped"]))
    assert after < 0.05 * before
    inside = fixed[0, 0].numpy() > 0.3
    for i in range(ndim):  # each axis of its own: no two are swapped
        error = out["ddf"][0, i].numpy() - truth[i]
        assert np.sqrt((error[inside] ** 2).mean()) < 0.4 * np.sqrt((truth[i][inside] ** 2).mean()), i
    assert out["steps"].tolist() == [0] and out["reason"] == ["elastix"] and out["residual"].isnan().all()


@needs_elastix
@pytest.mark.parametrize("ndim", [2, 3])
def test_agrees_with_the_image_that_elastix_resamples(ndim: int, itk: Any) -> None:
    moving, fixed, _ = make_pair(ndim)
    network = make_network(ndim, iterations=20 if ndim == 2 else 5, parameters=FAST)
    warped, ddf = network(moving, fixed)
    parameters = itk.ParameterObject.New()
    resampling = {"WriteResultImage": ["true"], "FinalBSplineInterpolationOrder": ["1"]}
    parameters.AddParameterMap({**network.parameter_map, **resampling})
    images = [itk.image_from_array(x[0, 0].numpy()) for x in (fixed, moving)]
    result, _ = itk.elastix_registration_method(*images, parameter_object=parameters, number_of_threads=1)
    expected = itk.array_from_image(result)
    grid = np.stack(np.meshgrid(*map(np.arange, SIZES[ndim]), indexing="ij"))
    limit = np.reshape(SIZES[ndim], (-1, *[1] * ndim)) - 1
    at = grid + ddf[0].numpy()
    inside = ((at >= 0) & (at <= limit)).all(0)  # elsewhere elastix fills with zero
    assert inside.mean() > 0.7
    np.testing.assert_allclose(warped[0, 0].numpy()[inside], expected[inside], atol=1e-5)
    assert np.abs(moving[0, 0].numpy() - expected)[inside].max() > 0.1


@needs_elastix
@pytest.mark.parametrize("ndim", [2, 3])
def test_translation_has_the_right_sign_and_axes(ndim: int) -> None:
    moving, _, _ = make_pair(ndim)
    shift = (2.0, -1.0, 0.5)[:ndim]
    # fixed(x) = moving(x + shift)
    fixed = as_image(ndimage.shift(moving[0, 0].double().numpy(), [-s for s in shift], order=3, mode="nearest"))
    network = make_network(ndim, bending_weight=0, iterations=100, parameters={"Transform": "TranslationTransform"})
    _, ddf = network(moving, fixed)
    expected = torch.tensor(shift).view(1, ndim, *[1] * ndim).expand_as(ddf)
    torch.testing.assert_close(ddf, expected, atol=0.1, rtol=0)


@needs_elastix
def test_batch_is_registered_item_by_item_and_again_the_same() -> None:
    pairs = [make_pair(2, seed) for seed in (1, 2)]
    moving, fixed = (torch.cat([p[i] for p in pairs]) for i in range(2))
    network = make_network(2, iterations=20, parameters=FAST)
    ddf, record = network.solve(moving, fixed)
    assert ddf[0].sub(ddf[1]).abs().max() > 1
    for i in (1, 0):
        assert torch.equal(network.solve(moving[i : i + 1], fixed[i : i + 1])[0][0], ddf[i])
    assert record.reason == ("elastix", "elastix") and record.residual.shape == (2, 1)
    item = json.loads(json.dumps(json_ready(record.item(1)), allow_nan=False))
    assert item["steps"] == 0 and item["residual"] is None and item["reason"] == "elastix"
    double, _ = network.solve(moving.double(), fixed.double())
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), ddf)
    half, _ = network.solve(moving.bfloat16(), fixed.bfloat16())
    assert half.dtype == torch.float32
    assert (half - ddf).square().mean() < 0.2 * ddf.square().mean()


@needs_elastix
def test_number_of_threads_stays_its_own_affair(itk: Any) -> None:
    moving, fixed, _ = make_pair(2)
    threader = itk.MultiThreaderBase
    threader.SetGlobalMaximumNumberOfThreads(8)
    threader.SetGlobalDefaultNumberOfThreads(5)
    one, _ = make_network(2, threads=1, iterations=5).solve(moving, fixed)
    for kwargs in ({"threads": 3}, {"threads": None}):
        many, _ = make_network(2, iterations=5, **kwargs).solve(moving, fixed)
        # rounding differs with the threads, and the optimiser carries it on
        assert many.shape == one.shape and torch.isfinite(many).all()
        assert (threader.GetGlobalMaximumNumberOfThreads(), threader.GetGlobalDefaultNumberOfThreads()) == (8, 5)
    with pytest.raises(RuntimeError):
        make_network(2, threads=2, metric="NoSuchMetric").solve(moving, fixed)
    assert (threader.GetGlobalMaximumNumberOfThreads(), threader.GetGlobalDefaultNumberOfThreads()) == (8, 5)


@needs_elastix
def test_leaves_no_file_and_says_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    moving, fixed, _ = make_pair(2)
    for name in ("TMPDIR", "TMP", "TEMP", "HOME"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    before = sorted(tmp_path.rglob("*"))
    network = make_network(2, iterations=5)
    network(moving, fixed)
    with pytest.raises(RuntimeError):
        make_network(2, metric="NoSuchMetric")(moving, fixed)
    assert sorted(tmp_path.rglob("*")) == before
    assert capfd.readouterr() == ("", "")
    network.verbose = True
    network(moving, fixed)
    assert "elastix" in capfd.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before


@needs_elastix
def test_parameters_reach_elastix() -> None:
    moving, fixed, _ = make_pair(2)
    network = make_network(2, levels=2, grid_spacing=6.0, parameters={"MaximumStepLength": [0.5, 0.25], "Flag": True})
    values = network.parameter_map
    assert values["NumberOfResolutions"] == ["2"] and values["FinalGridSpacingInVoxels"] == ["6.0", "6.0"]
    assert values["GridSpacingSchedule"] == ["2", "1"] and values["MaximumStepLength"] == ["0.5", "0.25"]
    assert values["Flag"] == ["true"] and values["MaximumNumberOfIterations"] == ["40"]

    def field(**kwargs: Any) -> torch.Tensor:
        return make_network(2, **kwargs).solve(moving, fixed)[0]

    usual = field()
    # a stiff transform bends less, and few iterations with short steps move hardly anything
    assert field(bending_weight=1e4).diff(n=2).square().mean() < 0.1 * usual.diff(n=2).square().mean()
    short = field(iterations=2, parameters={"MaximumStepLength": 0.01})
    assert short.square().mean() < 0.01 * usual.square().mean()
    assert not torch.equal(field(parameters={"RandomSeed": 7}), usual)


@needs_elastix
@pytest.mark.parametrize("size", [(16, 16), (9, 31), (16, 17, 16), (7, 9, 5)])
def test_small_images(size: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    image = as_image(0.5 + 0.1 * smooth_noise(size, 1.5, rng))
    warped, ddf = make_network(len(size), iterations=5, parameters=FAST)(image, image)
    assert ddf.shape == (1, len(size), *size)
    assert ddf.square().mean().sqrt() < 0.5  # nothing to move
    assert (warped - image).square().mean() < 0.2 * image.var()


@needs_elastix
def test_failure_names_the_item() -> None:
    moving, _, _ = make_pair(2)
    # a translation by 8 of 61 voxels takes more than 5 % of the samples out of the moving image
    far = torch.cat([moving[:, :, 8:], moving[:, :, :8]], dim=2)
    parameters = {"Transform": "TranslationTransform", "RequiredRatioOfValidSamples": 0.95}
    network = make_network(2, bending_weight=0, iterations=200, parameters=parameters)
    network.solve(moving, moving)
    with pytest.raises(RuntimeError, match=r"elastix failed on item 1 of the batch"):
        network.solve(torch.cat([moving] * 3), torch.cat([moving, far, far]))


@needs_elastix
def test_bad_input() -> None:
    moving, fixed, _ = make_pair(2)
    network = make_network(2)
    with pytest.raises(RuntimeError, match=r"ElastixRegistration has nothing to train.*eval"):
        make_network(2).train()(moving, fixed)
    with pytest.raises(ValueError, match="same shape"):
        network(moving[..., 1:], fixed)
    with pytest.raises(ValueError, match="floating point"):
        network(moving.int(), fixed)
    with pytest.raises(ValueError, match="initial_ddf must be None"):
        network(moving, fixed, torch.zeros(1, 2, *SIZES[2]))
    with pytest.raises(ValueError, match=r"2 spatial axes"):
        network(*make_pair(3)[:2])
    with pytest.raises(ValueError, match=r"at least 4 voxels, got \(1, 1, 3, 48\)"):
        network(moving[:, :, :3], fixed[:, :, :3])
    broken = torch.cat([fixed, fixed])
    broken[1, 0, 3, 4] = float("nan")
    with pytest.raises(ValueError, match=r"item 1 of fixed .*finite"):
        network(torch.cat([moving, moving]), broken)
    flat = torch.cat([moving, torch.full_like(moving, 0.5)])  # would crash the process
    with pytest.raises(ValueError, match=r"item 1 of moving .*all 0.5"):
        network(flat, torch.cat([fixed, fixed]))


@needs_elastix
@pytest.mark.parametrize(
    "argument, value",
    [
        ("spatial_dims", 4),
        ("levels", 0),
        ("grid_spacing", 0.0),
        ("grid_spacing", float("nan")),
        ("bending_weight", -1.0),
        ("iterations", 2.5),
        ("samples", 0),
        ("threads", 0),
        ("parameters", {"WriteResultImage": True}),
    ],
)
def test_bad_arguments(argument: str, value: Any) -> None:
    with pytest.raises(ValueError, match=argument):
        ElastixRegistration(**{argument: value})


@pytest.mark.parametrize("module", [None, types.ModuleType("itk")], ids=["no itk", "itk without elastix"])
def test_absent_package(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "itk", module)
    with pytest.raises(ImportError, match=r'pip install "monai_deq\[elastix\]"'):
        ElastixRegistration(2)


@needs_elastix
@pytest.mark.parametrize("ending", [".nii.gz", ".mha"])
def test_transformix_takes_the_field_that_is_written(ending: str, tmp_path: Path) -> None:
    # here, as loading ITK takes long
    import itk

    fixed, moving = str(tmp_path / "fixed.nii.gz"), str(tmp_path / "moving.nii.gz")
    write(Path(fixed), grid((20, 22, 18), (2, 1.8, 2.2), "LPS", turn=(8, -5, 10)), (20, 22, 18))
    shape = (24, 20, 26)
    write(Path(moving), grid(shape, (1.7, 2, 1.6), "RIA", turn=(0, 4, 0)), shape, lambda p: blobs(bent(p)))
    settings = RegistrationSettings(steps=(5, 5), transform_format=ending)
    (result,) = register_pairs([{"fixed": fixed, "moving": moving}], tmp_path / "out", settings)
    images = [itk.imread(file, itk.F) for file in (fixed, moving)]
    numbers = {
        "Size": itk.size(images[0]),
        "Index": [0, 0, 0],
        "Spacing": images[0].GetSpacing(),
        "Origin": images[0].GetOrigin(),
        # column by column
        "Direction": itk.array_from_matrix(images[0].GetDirection()).T.ravel(),
        "DefaultPixelValue": [itk.array_from_image(images[1]).min()],
    }
    words = {
        "Transform": "DeformationFieldTransform",
        "DeformationFieldFileName": result["files"]["transform"],
        "DeformationFieldInterpolationOrder": "1",
        "NumberOfParameters": "0",
        "InitialTransformParameterFileName": "NoInitialTransform",
        "HowToCombineTransforms": "Compose",
        "FixedImageDimension": "3",
        "MovingImageDimension": "3",
        "FixedInternalImagePixelType": "float",
        "MovingInternalImagePixelType": "float",
        "UseDirectionCosines": "true",
        "ResampleInterpolator": "FinalLinearInterpolator",
        "Resampler": "DefaultResampler",
        "ResultImagePixelType": "float",
    }
    parameters = itk.ParameterObject.New()
    written = {name: [f"{float(number):.12g}" for number in given] for name, given in numbers.items()}
    parameters.AddParameterMap({name: [word] for name, word in words.items()} | written)
    transformix = itk.TransformixFilter[type(images[1])].New()
    transformix.SetMovingImage(images[1])
    transformix.SetTransformParameterObject(parameters)
    transformix.SetLogToConsole(False)
    transformix.Update()
    theirs = itk.array_from_image(transformix.GetOutput()).transpose(2, 1, 0)
    ours = nib.load(result["files"]["warped"]).get_fdata()
    assert np.abs(theirs - ours).max() < 1e-4 * np.ptp(ours) and np.ptp(ours) > 50
