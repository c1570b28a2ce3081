# SPDX-License-Identifier: Apache-2.0
"""Networks, updates and pairs for tests."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor

from monai_deq.networks.blocks import RecurrentUpdate, RegistrationUNet, UNetUpdate
from monai_deq.networks.nets import DEQRegistrationNet, GradientSettings, RestSettings
from monai_deq.solvers import SolverSettings

#: of the pairs, along the first axis
SHIFTS = (1.0, 3.0, 2.0)
IMAGE_SIZES = {2: (9, 6), 3: (9, 4, 5)}
#: arguments of ``deq_net`` that the settings call otherwise
_NAMES = {
    "solver": "name",
    "solver_options": "options",
    "gradient": "kind",
    "phantom_steps": "steps",
    "phantom_damping": "damping",
}
#: without what comes to rest, as in the paper
_PLAIN = {
    "relaxation": 1.0,
    "proximal_weight": 0.0,
    "contraction_weight": 0.0,
    "pool_renewal": 1.0,
    "random_start_share": 0.0,
}


def rest_settings(**given: Any) -> RestSettings:
    """The paper's recipe, but for what is given."""
    return RestSettings(**{**_PLAIN, **given})


def deq_net(
    update: torch.nn.Module | None = None,
    spatial_dims: int = 3,
    coarse: DEQRegistrationNet | None = None,
    **settings: Any,
) -> DEQRegistrationNet:
    """A network from the fields of its three settings; what is not named is as in the paper."""
    given: dict[type, dict[str, Any]] = {SolverSettings: {}, GradientSettings: {}, RestSettings: dict(_PLAIN)}
    for argument, value in settings.items():
        name = _NAMES.get(argument, argument)
        (owner,) = (cls for cls in given if name in {f.name for f in fields(cls)})
        given[owner][name] = value
    parts = [cls(**arguments) for cls, arguments in given.items()]
    return DEQRegistrationNet(update, spatial_dims, *parts, coarse=coarse)


class Pull(torch.nn.Module):
    """Moves the displacement a share of the way to ``fixed - moving``: the fixed point is known."""

    def __init__(self, share: float = 0.5) -> None:
        super().__init__()
        self.share = torch.nn.Parameter(torch.tensor(share))

    def forward(self, moving: torch.Tensor, fixed: torch.Tensor, ddf: torch.Tensor) -> torch.Tensor:
        return self.share * (fixed - moving - ddf)


def tiny_unet(in_channels: int, spatial_dims: int, flow_std: float = 0.05, **kwargs: Any) -> RegistrationUNet:
    """Two levels of a few channels, the same weights each time."""
    torch.manual_seed(0)
    widths = {"encoder_channels": (2, 3), "decoder_channels": (3,), "final_channels": (2,), **kwargs}
    return RegistrationUNet(spatial_dims, in_channels, flow_std=flow_std, **widths)


def tiny_update(spatial_dims: int, flow_std: float = 0.05, **kwargs: Any) -> UNetUpdate:
    return UNetUpdate(spatial_dims, tiny_unet(2 + spatial_dims, spatial_dims, flow_std, **kwargs))


def tiny_recurrent_update(
    spatial_dims: int, similarity: torch.nn.Module | None = None, autocast_dtype: str | None = None
) -> RecurrentUpdate:
    """Two hidden states of 2 channels each, a U-Net of two levels, weights that are seen."""
    torch.manual_seed(0)
    update = RecurrentUpdate(spatial_dims, similarity, 2, flow_std=0.3, autocast_dtype=autocast_dtype)
    update.unet = RegistrationUNet(spatial_dims, 2 + 2 * spatial_dims, 2, (2, 2), (2,), (), flow_std=0.2)
    return update


def pair(
    size: tuple[int, ...], batch: int = 2, dtype: torch.dtype = torch.float32, seed: int = 4
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random images, moving and fixed."""
    moving, fixed = torch.rand(2, batch, 1, *size, dtype=dtype, generator=torch.Generator().manual_seed(seed))
    return moving, fixed


def slice_affine(i: int) -> np.ndarray:
    """Of a coronal slice, another for each pair."""
    return np.array([[1.0 + i, 0, 0, 3], [0, 0, -3.0, 7], [0, 0.5, 0, i], [0, 0, 0, 1.0]])


def pair_items(ndim: int) -> list[dict[str, Any]]:
    """Tiny images with labels, whose shift is known."""
    generator = torch.Generator().manual_seed(0)
    items = []
    for i, shift in enumerate(SHIFTS):
        fixed = torch.zeros(1, *IMAGE_SIZES[ndim])
        fixed[0, 0] = shift / 10
        label = torch.zeros(1, *IMAGE_SIZES[ndim])
        label[0, 2:4] = 1
        moving_label = label.roll(int(shift), dims=1)
        meta = {"affine": slice_affine(i), "filename_or_obj": f"fixed{i}.nii.gz"}
        items.append(
            {
                "fixed": MetaTensor(fixed, meta=dict(meta), spatial_ndim=ndim),
                "moving": MetaTensor(torch.rand(1, *IMAGE_SIZES[ndim], generator=generator), affine=torch.eye(4)),
                "fixed_label": MetaTensor(label, meta=dict(meta), spatial_ndim=ndim),
                "moving_label": MetaTensor(moving_label, affine=torch.eye(4)),
                "fixed_subject": f"f{i}",
                "moving_subject": f"m{i}",
            }
        )
    return items
