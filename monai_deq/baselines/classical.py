# SPDX-License-Identifier: Apache-2.0
"""Systems without anything to train: their base, the images as they come, and B-splines by elastix."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import isfinite
from typing import Any

import numpy as np
import torch
from monai.utils import OptionalImportError, optional_import

from monai_deq.networks.nets import RegistrationNet, check_pair
from monai_deq.networks.nets.iteration import initial_state
from monai_deq.solvers import SolverRecord

__all__ = ["ClassicalRegistration", "ElastixRegistration", "InitialAlignment"]

# elastix smooths the images of its pyramid by a recursive filter that needs this many voxels along each axis
_MIN_SIZE = 4


class ClassicalRegistration(RegistrationNet):
    """
    Base of the baselines: no parameters, and no fixed-point solver, whose settings are ignored. A subclass gives
    ``solve`` and ``reason``, the word in its records for why an item stopped.
    """

    reason: str

    def training_states(self, *args: Any, **kwargs: Any) -> list[torch.Tensor]:
        """Raises ``RuntimeError``."""
        raise RuntimeError(f"{type(self).__name__} has nothing to train: call eval() before using it.")

    def _record(self, batch_size: int) -> SolverRecord:
        """Record without a step of a fixed-point solver, and so without a residual."""
        steps, nan = torch.zeros(batch_size, dtype=torch.long), torch.full((batch_size, 1), float("nan"))
        return SolverRecord(steps, nan, nan.clone(), converged=steps.bool(), reason=(self.reason,) * batch_size)


class InitialAlignment(ClassicalRegistration):
    """
    No deformation: the images as they come, or under a given displacement; on affinely aligned data the row "Affine" of
    the paper's Table 1. The records say ``"not iterated"``.
    """

    reason = "not iterated"

    def solve(
        self, moving: torch.Tensor, fixed: torch.Tensor, initial_ddf: torch.Tensor | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, SolverRecord]:
        """See :py:meth:`monai_deq.networks.nets.RegistrationNet.solve`; ``initial_ddf`` or zero is handed back."""
        check_pair(moving, fixed)
        return initial_state(fixed, initial_ddf), self._record(fixed.shape[0])


def _load_itk() -> Any:
    """The module ``itk`` with elastix in it."""
    itk, found = optional_import("itk")
    # the package itk alone has no elastix; to ask for the attribute would load all of it, which takes ten seconds
    if not found or "ElastixRegistrationMethod" not in dir(itk):
        raise OptionalImportError(
            'ElastixRegistration needs the package itk-elastix: pip install "monai_deq[elastix]".'
        )
    return itk


def _as_elastix(value: Any) -> list[str]:
    """A value of a parameter map as elastix takes it, a list of words."""
    values = [value] if isinstance(value, str) or not isinstance(value, Sequence) else value
    return [str(v).lower() if isinstance(v, bool) else str(v) for v in values]


@contextmanager
def _threads(itk: Any, number: int | None) -> Iterator[None]:
    """Number of threads of what is made inside, where one is given; set for all of ITK and put back."""
    # elastix's own SetNumberOfThreads crashes the process with a bending energy (itk-elastix 0.25.4, its issue 160)
    before = itk.MultiThreaderBase.GetGlobalDefaultNumberOfThreads()
    if number is not None:
        itk.MultiThreaderBase.SetGlobalDefaultNumberOfThreads(number)
    try:
        yield
    finally:
        itk.MultiThreaderBase.SetGlobalDefaultNumberOfThreads(before)


class ElastixRegistration(ClassicalRegistration):
    """
    Deformable registration of each pair by elastix (Klein et al., IEEE TMI 2010): a B-spline transform, optimised from
    coarse to fine by adaptive stochastic gradient descent. Needs the package ``itk-elastix``.

    From the paper: three levels, grid spacing 4 voxels. Chosen on slices of validation subjects of neurite-OASIS:
    mutual information with 64 histogram bins, the weight of the bending energy (without it the transform folds far more
    than the paper reports), samples and iterations; for all else what elastix itself sets for a B-spline transform.

    Images are not aligned affinely before. On each level they are smoothed but keep their size; the control points lie
    4, 2 and 1 times ``grid_spacing`` apart. The samples are drawn with a fixed seed: with one thread the result is the
    same in each run. Nothing is written to disk. The records say ``"elastix"``, with 0 steps and a residual of NaN.

    Args:
        spatial_dims: 2 or 3.
        levels: number of levels.
        grid_spacing: distance of the control points on the last level, in voxels.
        metric: elastix's name of the similarity measure.
        bending_weight: weight of the bending energy (voxel units) beside the measure, on whose scale it depends, or 0.
        iterations: iterations on each level.
        samples: positions sampled in each iteration.
        parameters: further parameters of elastix, or other values of those set here, by elastix's names, such as
            ``{"MaximumStepLength": 0.5}``; none that makes it write files. elastix ignores names it does not know.
        threads: number of threads. Defaults to None: as many as ITK takes by default.
        verbose: whether elastix logs to the console.
    """

    reason = "elastix"

    def __init__(
        self,
        spatial_dims: int = 3,
        levels: int = 3,
        grid_spacing: float = 4.0,
        metric: str = "AdvancedMattesMutualInformation",
        bending_weight: float = 10.0,
        iterations: int = 256,
        samples: int = 2048,
        parameters: Mapping[str, Any] | None = None,
        threads: int | None = None,
        verbose: bool = False,
    ) -> None:
        super().__init__()
        if spatial_dims not in (2, 3):
            raise ValueError(f"spatial_dims must be 2 or 3, got {spatial_dims}.")
        counts = {"levels": levels, "iterations": iterations, "samples": samples, "threads": threads}
        for name, count in counts.items():
            if count is not None and (int(count) != count or count < 1):
                raise ValueError(f"{name} must be a whole number of at least 1, got {count}.")
        if not grid_spacing > 0:
            raise ValueError(f"grid_spacing must be above 0 voxels, got {grid_spacing}.")
        if not bending_weight >= 0:
            raise ValueError(f"bending_weight must not be negative, got {bending_weight}.")
        _load_itk()
        self.spatial_dims, self.threads, self.verbose = spatial_dims, threads, verbose
        pyramid, spacing = [2**k for k in reversed(range(levels))], [grid_spacing] * spatial_dims
        settings: dict[str, Any] = dict(NumberOfResolutions=levels, FixedImagePyramid="FixedSmoothingImagePyramid")
        settings |= dict(MovingImagePyramid="MovingSmoothingImagePyramid", Registration="MultiResolutionRegistration")
        settings |= dict(Transform="BSplineTransform", FinalGridSpacingInVoxels=spacing, GridSpacingSchedule=pyramid)
        # histogram bins are those of a mutual information; other measures ignore them
        settings |= dict(Metric=metric, NumberOfHistogramBins=64, Interpolator="LinearInterpolator")
        settings |= dict(ImageSampler="RandomCoordinate", NumberOfSpatialSamples=samples, NewSamplesEveryIteration=True)
        settings |= dict(Optimizer="AdaptiveStochasticGradientDescent", MaximumNumberOfIterations=iterations)
        settings |= dict(AutomaticParameterEstimation=True, NumberOfSamplesForExactGradient=4096, RandomSeed=121212)
        settings["WriteResultImage"] = False
        if bending_weight > 0:
            settings["Registration"] = "MultiMetricMultiResolutionRegistration"
            settings["Metric"] = [metric, "TransformBendingEnergyPenalty"]
            settings.update({"Metric0Weight": 1.0, "Metric1Weight": bending_weight})
        settings.update(parameters or {})
        self.parameter_map = {name: _as_elastix(value) for name, value in settings.items()}
        writing = [k for k, v in self.parameter_map.items() if k.startswith("Write") and v != ["false"]]
        if writing:
            raise ValueError(f"parameters must not make elastix write files, got {', '.join(writing)}.")

    def solve(
        self, moving: torch.Tensor, fixed: torch.Tensor, initial_ddf: torch.Tensor | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, SolverRecord]:
        """
        See :py:meth:`monai_deq.networks.nets.RegistrationNet.solve`. One pair after the other, on the CPU, in float32,
        without ``initial_ddf``. ``RuntimeError`` when elastix fails on an item.
        """
        check_pair(moving, fixed)
        if initial_ddf is not None:
            raise ValueError("initial_ddf must be None: elastix cannot start from a displacement field.")
        if fixed.ndim != self.spatial_dims + 2 or min(fixed.shape[2:]) < _MIN_SIZE:
            raise ValueError(
                f"moving and fixed must have {self.spatial_dims} spatial axes (spatial_dims) of at least {_MIN_SIZE} "
                f"voxels, got {tuple(fixed.shape)}."
            )
        for name, images in (("moving", moving), ("fixed", fixed)):
            for i, image in enumerate(images.detach().float()):
                low, high = (float(x) for x in image.aminmax())
                if not isfinite(high - low):  # NaN spreads
                    raise ValueError(f"item {i} of {name} must have finite intensities, got NaN or infinity.")
                if low == high:  # mutual information of a constant image crashes the process (elastix issue 1474)
                    raise ValueError(f"item {i} of {name} must have intensities that differ, they are all {low}.")
        ddf = initial_state(fixed, None)
        for i in range(len(ddf)):
            try:
                ddf[i] = self._register(moving[i, 0], fixed[i, 0]).to(ddf)
            except RuntimeError as error:
                raise RuntimeError(
                    f"elastix failed on item {i} of the batch. Often the transform has moved most samples out of the "
                    "moving image: try a higher bending_weight, more samples or a smaller MaximumStepLength; with "
                    f"verbose=True elastix logs the cause. It said: {error}"
                ) from error
        return ddf, self._record(len(ddf))

    def _register(self, moving: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
        """Displacement ``(ndim, *spatial)`` that pulls one image onto another."""
        itk = _load_itk()
        # ITK counts axes, and components of a vector, from the last axis of an array
        moving_image, fixed_image = (
            itk.image_from_array(np.ascontiguousarray(x.detach().cpu().float().numpy())) for x in (moving, fixed)
        )
        parameters = itk.ParameterObject.New()
        parameters.AddParameterMap(self.parameter_map)
        # not by transformix: it writes the field to a file in the working directory
        field_type = itk.Image[itk.Vector[itk.F, fixed.ndim], fixed.ndim]
        to_field = itk.TransformToDisplacementFieldFilter[field_type, itk.D].New()
        to_field.SetReferenceImage(fixed_image)
        to_field.UseReferenceImageOn()
        with _threads(itk, self.threads):
            method = itk.ElastixRegistrationMethod[type(fixed_image), type(moving_image)].New()
            method.SetFixedImage(fixed_image)
            method.SetMovingImage(moving_image)
            method.SetParameterObject(parameters)
            method.SetLogToConsole(self.verbose)
            method.SetLogToFile(False)
            method.Update()
            to_field.SetTransform(method.GetCombinationTransform())
            to_field.Update()
        vectors = itk.array_from_image(to_field.GetOutput())  # (*spatial, ndim)
        if not np.isfinite(vectors).all():
            raise RuntimeError("the displacement is not finite.")
        return torch.from_numpy(np.ascontiguousarray(np.moveaxis(vectors, -1, 0)[::-1]))
