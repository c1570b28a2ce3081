# SPDX-License-Identifier: Apache-2.0
"""Register one pair by solving a network's map to equilibrium."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from monai.config import NdarrayOrTensor
from monai.transforms import Transform
from monai.transforms.transform import MapTransform
from monai.utils import TransformBackends, convert_to_tensor

from monai_deq.certificates import certified_solve, check_certificate
from monai_deq.networks.blocks import warp_by_ddf
from monai_deq.networks.nets import RegistrationNet
from monai_deq.transforms.items import on_grid_of, require_keys

__all__ = ["FixedPointSolver", "FixedPointSolverD", "FixedPointSolverDict", "FixedPointSolverd"]


def _plain(data: NdarrayOrTensor, name: str, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """A channel-first image of any kind as a batch of one plain tensor."""
    tensor = convert_to_tensor(data, track_meta=False)
    if not isinstance(tensor, torch.Tensor) or tensor.ndim not in (3, 4):
        came = f"shape {tuple(tensor.shape)}" if isinstance(tensor, torch.Tensor) else type(data).__name__
        raise ValueError(f"{name} must be a channel-first 2-D or 3-D image, got {came}.")
    return tensor[None].to(device=device, dtype=dtype)


class FixedPointSolver(Transform):
    """
    Solve for the displacement that a registration network's map leaves unchanged, any number of steps beyond what
    the network was trained with (paper, Eq. 5). Results lie on the grid and the device of the fixed image, with its
    affine and meta data if it is a MetaTensor. Images of any number type are converted to that of the parameters.

    Args:
        network: a :py:class:`monai_deq.networks.nets.RegistrationNet`, else ``TypeError``. It is used in eval mode, and
            each of its modules is left in the mode it was in.
        solver: ``"plain"`` or ``"anderson"``. Defaults, as the next four, to the network's own.
        max_steps: step limit.
        tolerance: RMS residual in voxels at which to stop.
        relative_tolerance: relative residual at which to stop.
        solver_options: further options of the solver.
        certificate: examine the solution, see :py:func:`monai_deq.certificates.check_certificate`; an empty dictionary
            for what costs one step. Defaults to None: not examined.
        finish: method that goes on from the network's solution, as
            :py:func:`monai_deq.networks.nets.energy_finish`. Defaults to None: none.
        device: where to solve. Defaults to the device of the network's parameters.
    """

    backend = [TransformBackends.TORCH]

    def __init__(
        self,
        network: RegistrationNet,
        solver: str | None = None,
        max_steps: int | None = None,
        tolerance: float | None = None,
        relative_tolerance: float | None = None,
        solver_options: dict[str, Any] | None = None,
        certificate: Mapping[str, Any] | None = None,
        finish: RegistrationNet | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if not isinstance(network, RegistrationNet):
            raise TypeError(f"network must be a RegistrationNet, which can be solved, got {type(network).__name__}.")
        self.network = network
        self.changes: dict[str, Any] = dict(
            name=solver, max_steps=max_steps, tolerance=tolerance, options=solver_options
        )
        self.changes["relative_tolerance"] = relative_tolerance
        self.certificate, self.finish = check_certificate(certificate), finish
        self.device = None if device is None else torch.device(device)

    def __call__(  # type: ignore[override]
        self,
        moving: NdarrayOrTensor,
        fixed: NdarrayOrTensor,
        initial_ddf: NdarrayOrTensor | None = None,
        mask: NdarrayOrTensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        """
        Args:
            moving, fixed: ``(1, *spatial)``, intensities in [0, 1].
            initial_ddf: displacement to start from, ``(ndim, *spatial)`` in voxels. Defaults to zero.
            mask: where the energy compares the fixed image, ``(1, *spatial)``. Defaults to everywhere.

        Returns:
            The warped image ``(1, *spatial)``, the displacement ``(ndim, *spatial)`` in voxels, and the record:
            ``steps``, ``coarse_steps``, ``evaluations`` (those at smaller sizes by their share of the voxels),
            ``residual``, ``relative_residual``, ``converged``, ``reason`` and the two traces; with a certificate the
            fields of :py:class:`monai_deq.certificates.Certificate` too, with the residuals at the solution itself;
            with a ``finish`` its record as ``finish``, all else being of the network's solution. A data loader puts
            the records of several pairs together: what there is no number of is NaN, and the traces are tensors
            padded with NaN to the step limit, so that ``trace[:steps]`` are the steps taken.
        """
        # NumPy's default is float64, which the weights of a float32 network would refuse
        parameter = next((p for p in self.network.parameters() if p.is_floating_point()), torch.zeros(()))
        device, dtype = self.device or parameter.device, parameter.dtype
        moving_batch, fixed_batch = _plain(moving, "moving", device, dtype), _plain(fixed, "fixed", device, dtype)
        exact = torch.promote_types(dtype, torch.float32)
        start = None if initial_ddf is None else _plain(initial_ddf, "initial_ddf", device, exact)
        inside = None if mask is None else _plain(mask, "mask", device, dtype)
        modes = [(module, module.training) for module in self.network.modules()]
        self.network.eval()
        try:
            given = (start, self.certificate, self.finish, inside)
            ddf, record, certificates = certified_solve(self.network, moving_batch, fixed_batch, *given, **self.changes)
            with torch.no_grad():
                warped = warp_by_ddf(moving_batch, ddf)
        finally:
            # module by module: some may be frozen in eval mode while the others train
            for module, training in modes:
                module.training = training
        out_device = fixed.device if isinstance(fixed, torch.Tensor) else torch.device("cpu")
        # named after the moving image, as of many to one fixed image the results would share its name
        warped, ddf = (on_grid_of(result[0].to(out_device), fixed, moving) for result in (warped, ddf))
        limit = self.network.solver.changed(**self.changes).max_steps
        if self.finish is not None:
            limit = max(limit, self.finish.solver.max_steps)
        words = {**record.item(0, limit), "evaluations": float(record.evaluations(ddf.ndim - 1)[0])}
        if certificates is not None:
            words.update(certificates[0].as_dict())
        elif self.certificate is not None:
            words["verdict"] = words["reason"]  # a classical method has no map to examine
        return warped, ddf, words


class FixedPointSolverd(MapTransform):
    """
    Dictionary-based wrapper of :py:class:`FixedPointSolver`.

    Args:
        network, kwargs: see :py:class:`FixedPointSolver`.
        moving_key, fixed_key: the images.
        initial_ddf_key: a displacement to start from, if any; an item without it starts from zero.
        mask_key: where the energy compares the fixed image, if anywhere in the item.
        ddf_key, warped_key, record_key: where displacement, warped image and record are put.
    """

    backend = FixedPointSolver.backend

    def __init__(
        self,
        network: RegistrationNet,
        moving_key: str = "moving",
        fixed_key: str = "fixed",
        initial_ddf_key: str | None = None,
        mask_key: str | None = None,
        ddf_key: str = "ddf",
        warped_key: str = "warped",
        record_key: str = "record",
        **kwargs: Any,
    ) -> None:
        super().__init__((moving_key, fixed_key))
        self.moving_key, self.fixed_key = moving_key, fixed_key
        self.initial_ddf_key, self.mask_key = initial_ddf_key, mask_key
        self.ddf_key, self.warped_key, self.record_key = ddf_key, warped_key, record_key
        self.solve = FixedPointSolver(network, **kwargs)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        require_keys(d, (self.moving_key, self.fixed_key), "FixedPointSolverd")
        others = [None if key is None else d.get(key) for key in (self.initial_ddf_key, self.mask_key)]
        results = self.solve(d[self.moving_key], d[self.fixed_key], *others)
        d[self.warped_key], d[self.ddf_key], d[self.record_key] = results
        return d


FixedPointSolverD = FixedPointSolverDict = FixedPointSolverd
