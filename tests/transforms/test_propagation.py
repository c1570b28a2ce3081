# SPDX-License-Identifier: Apache-2.0
"""Parcels of images whose parts are known, and label maps carried by shifts that are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from nets import deq_net
from scipy.ndimage import distance_transform_edt

import monai_deq.transforms as transforms
from monai_deq.transforms import Parcelsd, PropagateLabeld

SIZES = [(40, 33), (22, 20, 24)]


def blobs(size: tuple[int, ...], shift: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Two squares or cubes apart along the first axis, bright and half bright, and which voxel is of which."""
    label = torch.zeros(1, *size)
    inside = (slice(5, -5),) * (len(size) - 1)
    middle = size[0] // 2
    label[(0, slice(3 + shift, middle - 3 + shift), *inside)] = 1
    label[(0, slice(middle + 1 + shift, size[0] - 5 + shift), *inside)] = 2
    return torch.tensor([0.0, 0.9, 0.5])[label.long()], label


class ShiftBy(torch.nn.Module):
    """``f = ddf* - ddf`` of a shift along the first axis, in voxels."""

    def __init__(self, voxels: float) -> None:
        super().__init__()
        self.register_buffer("voxels", torch.tensor(voxels))

    def forward(self, moving: torch.Tensor, fixed: torch.Tensor, ddf: torch.Tensor) -> torch.Tensor:
        target = torch.zeros_like(ddf)
        target[:, 0] = self.voxels
        return target - ddf


@pytest.mark.parametrize("size", SIZES)
def test_parcels_of_two_blobs_are_the_blobs(size: tuple[int, ...]) -> None:
    image, label = blobs(size)
    hollow, middle = image.clone(), tuple(n // 2 for n in size[1:])
    hollow[(0, 7, *middle)] = 0.0  # black within is not outside
    affine = torch.diag(torch.tensor([2.0, 3.0, 4.0, 1.0]))
    given = {"image": MetaTensor(hollow, affine=affine, spatial_ndim=len(size))}
    parcels = Parcelsd("image", number=2)(given)["label"]
    one, two = (int(parcels[(0, k, *middle)]) for k in (8, size[0] - 8))
    assert {one, two} == {1, 2} and parcels.dtype == torch.float32
    expected = torch.tensor([0.0, float(one), float(two)])[label.long()]
    assert float((parcels == expected)[label > 0].float().mean()) > 0.99
    far = torch.from_numpy(distance_transform_edt(label[0] == 0) > 2)[None]
    assert not parcels[far].any()
    np.testing.assert_array_equal(parcels.affine, affine)
    assert "label" not in given


@pytest.mark.parametrize("size", SIZES)
def test_parcels_are_compact_alike_and_the_same_again(size: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    image = 0.3 + 0.5 * torch.rand((1, *size), generator=generator)
    given = {"image": image, "other": image.flip(1)}
    np.random.seed(5)
    state = np.random.get_state()[1].copy()
    transform = Parcelsd(("image", "other"), ("label", "more"), number=8)
    first, second = transform(given), transform(given)
    assert (np.random.get_state()[1] == state).all()
    assert torch.equal(first["label"], second["label"]) and not torch.equal(first["label"], first["more"])
    parcels = first["label"][0]
    assert set(parcels.unique().tolist()) == set(range(1, 9))
    place = torch.stack(torch.meshgrid(*(torch.arange(n).float() for n in size), indexing="ij"), -1)
    spread = [float((place[parcels == k] - place[parcels == k].mean(0)).square().sum(-1).mean()) for k in range(1, 9)]
    whole = float((place - place.flatten(0, -2).mean(0)).square().sum(-1).mean())
    assert max(spread) < 0.6 * whole


def test_parcels_refuse_what_they_cannot_divide() -> None:
    with pytest.raises(ValueError, match="number must be at least 1, got 0"):
        Parcelsd("image", number=0)
    with pytest.raises(ValueError, match="'image': 9 parcels need as many voxels of foreground, got 0"):
        Parcelsd("image", number=9)({"image": torch.zeros(1, 12, 12)})
    with pytest.raises(KeyError):
        Parcelsd("image")({"label": torch.zeros(1, 12, 12)})


@pytest.mark.parametrize("size", SIZES)
def test_labels_follow_the_given_network(size: tuple[int, ...]) -> None:
    image, label = blobs(size)
    atlas = {"image": image, "label": 1000.0 * label}
    affine = torch.diag(torch.tensor([2.0, 3.0, 4.0, 1.0]))
    given = {"image": MetaTensor(torch.rand(1, *size), affine=affine, spatial_ndim=len(size))}
    carry = PropagateLabeld(("image",), atlas, deq_net(ShiftBy(-2.0), num_states=0))
    carried = carry(given)["label"]
    # the field points into the atlas: two voxels back is two voxels on here
    assert torch.equal(carried[:, 2:].as_subclass(torch.Tensor), 1000.0 * label[:, :-2]) and "label" not in given
    np.testing.assert_array_equal(carried.affine, affine)


@pytest.mark.parametrize("size", SIZES)
def test_the_energy_carries_by_default(size: tuple[int, ...]) -> None:
    image, label = blobs(size)
    moved, expected = blobs(size, shift=2)
    atlas = {"image": image, "label": label}
    carried = PropagateLabeld("image", atlas)({"image": moved})["label"]
    wrong, before = (float((x != expected).float().mean()) for x in (carried, label))
    assert wrong < 0.25 * before


def test_what_an_atlas_needs() -> None:
    image, label = blobs(SIZES[0])
    with pytest.raises(KeyError, match="label"):
        PropagateLabeld("image", {"image": image})
    with pytest.raises(ValueError, match="shape"):
        PropagateLabeld("image", {"image": image, "label": label})({"image": torch.rand(1, 30, 30)})
    assert transforms.ParcelsD is transforms.ParcelsDict is Parcelsd
    assert transforms.PropagateLabelD is transforms.PropagateLabelDict is PropagateLabeld
