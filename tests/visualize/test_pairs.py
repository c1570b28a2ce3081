# SPDX-License-Identifier: Apache-2.0
"""How a pair is turned: against nibabel's own axis codes, and landmarks at known places in the patient."""

from __future__ import annotations

from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from monai_deq.visualize import RegisteredPair
from monai_deq.visualize.pairs import PLANES, oriented

SIZE = (7, 9, 11)


def affine_of(codes: str, spacing: tuple[float, ...] = (1.0, 1.0, 1.0), angle: float = 0.0) -> np.ndarray:
    """An affine whose axes go where the letters say, turned by an angle about two axes."""
    inverse = nib.orientations.inv_ornt_aff(nib.orientations.axcodes2ornt(codes), SIZE)
    about_x = np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
    about_z = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = about_x @ about_z @ np.linalg.inv(inverse)[:3, :3] @ np.diag(spacing)
    affine[:3, 3] = (5, -3, 8)
    assert "".join(nib.aff2axcodes(affine)) == codes
    return affine


def make_pair(affine: np.ndarray, size: tuple[int, ...] = SIZE, **kwargs: Any) -> RegisteredPair:
    rng = np.random.default_rng(0)
    images = {name: rng.random(size, dtype=np.float32) for name in ("fixed", "moving", "warped")}
    ddf = np.zeros((len(size), *size), dtype=np.float32)
    return RegisteredPair(**{**images, "ddf": ddf, "affine": affine, **kwargs})


@pytest.mark.parametrize("angle", [0.0, 0.3])
@pytest.mark.parametrize("codes", ["RAS", "LIA", "LPS", "ASL", "PIR"])
def test_each_side_is_where_its_letter_is(codes: str, angle: float) -> None:
    affine = affine_of(codes, (0.5, 2.0, 3.0), angle)
    world = nib.affines.apply_affine(affine, np.stack(np.meshgrid(*map(np.arange, SIZE), indexing="ij"), axis=-1))
    directions = {"R": (0, 1), "L": (0, -1), "A": (1, 1), "P": (1, -1), "S": (2, 1), "I": (2, -1)}
    for axis in range(3):
        # an image that is the place itself
        shown = oriented(make_pair(affine, fixed=world[..., axis].astype(np.float32)))
        for plane, (_, letters) in PLANES.items():
            image = shown.cut("fixed", plane)
            ends = (image[:, 0].mean(), image[:, -1].mean()), (image[0].mean(), image[-1].mean())
            for (start, end), (first, last) in zip(ends, (letters[:2], letters[2:]), strict=True):
                of_world, sign = directions[first]
                assert directions[last] == (of_world, -sign)
                if of_world == axis:
                    assert sign * (start - end) > 0, (plane, first)


@pytest.mark.parametrize("codes", ["RAS", "LIA", "SLP"])
def test_the_displacement_turns_with_the_image(codes: str) -> None:
    rng = np.random.default_rng(1)
    ddf = rng.normal(size=(3, *SIZE)).astype(np.float32)
    affine = affine_of(codes, (1.0, 2.0, 3.0))
    shown = oriented(make_pair(affine, ddf=ddf), position=(2, 3, 4))
    assert shown.voxel == (2, 3, 4)
    at = shown.position
    # in mm of the world both are the same vector; the turned axes go to left, back and feet
    in_world = affine[:3, :3] @ ddf[:, 2, 3, 4]
    np.testing.assert_allclose(-shown.arrays["ddf"][:, at[0], at[1], at[2]] * shown.spacing, in_world, rtol=1e-5)
    assert shown.arrays["fixed"][at] == oriented(make_pair(affine)).arrays["fixed"][at]


def test_a_slice_is_of_one_plane() -> None:
    # as the coronal slices of neurite-OASIS: across to the left, down to the feet
    affine = np.array([[-1.0, 0, 0, 80], [0, 0, 1, -0.5], [0, -2, 0, 96], [0, 0, 0, 1]])
    image = np.arange(40, dtype=np.float32).reshape(5, 8)
    shown = oriented(make_pair(affine, size=(5, 8), fixed=image, moving=image))
    assert shown.planes == ("coronal",)
    np.testing.assert_array_equal(shown.cut("fixed", "coronal"), image.T)
    assert shown.extent("coronal") == (5, 16)


def test_planes_go_through_what_there_is_to_see() -> None:
    mask = np.zeros((30, 32, 34), dtype=np.uint8)
    mask[20:27, 4:9, 10:30] = 1
    mask[3, 3, 3] = 1  # hardly anything
    pair = make_pair(affine_of("RAS"), size=mask.shape, mask=mask)
    x, y, z = oriented(pair).voxel
    assert 20 <= x < 27 and 4 <= y < 9 and 10 <= z < 30
    # without a mask the foreground: not the border, though every plane has as much of it
    assert oriented(make_pair(affine_of("RAS"), size=(30, 32, 34))).voxel == pytest.approx((14.5, 15.5, 16.5), abs=3)
    empty = np.zeros((6, 7, 8), dtype=np.float32)
    assert oriented(make_pair(np.eye(4), size=empty.shape, fixed=empty, moving=empty)).voxel is not None


def test_one_window_for_one_unit_alone() -> None:
    ramp = np.linspace(0, 1, int(np.prod(SIZE)), dtype=np.float32).reshape(SIZE)
    same = oriented(make_pair(np.eye(4), fixed=ramp, moving=1.2 * ramp, warped=ramp))
    assert not same.own_windows and same.window == pytest.approx((0.0, 1.2), abs=0.02)
    other = oriented(make_pair(np.eye(4), fixed=ramp, moving=3000 * ramp - 1000, warped=3000 * ramp - 1000))
    assert other.own_windows and other.window == (0, 1)
    np.testing.assert_allclose(other.arrays["warped"], other.arrays["fixed"], atol=1e-5)


def test_an_item_of_an_engine() -> None:
    affine = affine_of("LIA", (1.0, 2.0, 3.0))
    image = MetaTensor(torch.rand(1, *SIZE), affine=torch.from_numpy(affine))
    labels = torch.full((1, *SIZE), 2**40, dtype=torch.int64)
    item = {
        "fixed": image,
        "moving": image,
        "warped": image.half(),
        "ddf": torch.zeros(3, *SIZE),
        "fixed_label": labels,
    }
    item |= {"moving_label": torch.zeros(1, 2, 3, 4), "fixed_subject": "a", "moving_subject": "b"}
    pair = RegisteredPair.from_item(item)
    assert pair.names == ("b", "a") and pair.moving_label is None  # on another grid
    assert pair.fixed_label is not None and pair.fixed_label.max() == 2**40
    np.testing.assert_array_equal(pair.affine, affine)
    assert pair.spacing == pytest.approx((1, 2, 3))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"fixed": np.zeros((3, 4, 5, 6))}, "fixed: expected 2 or 3 axes"),
        ({"warped": np.zeros((3, 4, 5))}, r"warped: expected shape \(7, 9, 11\)"),
        ({"ddf": np.zeros((2, *SIZE))}, r"ddf: expected shape \(3, 7, 9, 11\)"),
        ({"moving": np.full(SIZE, np.nan)}, "moving: expected finite"),
        ({"affine": np.zeros((4, 4))}, "affine: expected"),
        ({"mask": np.zeros((1, *SIZE))}, "mask: expected shape"),
    ],
)
def test_wrong_arrays(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_pair(**{"affine": np.eye(4), **wrong})


def test_a_position_outside() -> None:
    with pytest.raises(ValueError, match=r"position: expected a voxel inside \(7, 9, 11\)"):
        oriented(make_pair(np.eye(4)), position=(7, 0, 0))
