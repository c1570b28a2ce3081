# SPDX-License-Identifier: Apache-2.0
"""Answers to harmless changes: of methods whose displacement is known in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from nets import deq_net

from monai_deq.certificates import (
    HARMLESS_CHANGES,
    OPTIONAL_RECORDS,
    Certificate,
    certified_solve,
    check_certificate,
    harmless_answers,
)
from monai_deq.networks.nets import EnergyRegistrationNet, RegistrationNet

SIZES: dict[int, tuple[int, ...]] = {2: (24, 17), 3: (18, 15, 16)}
Formula = Callable[..., torch.Tensor]


class Known(RegistrationNet):
    """Its displacement is a formula of the images, the start and the mask; it notes the settings it is given."""

    def __init__(self, formula: Formula) -> None:
        super().__init__()
        self.formula, self.noted = formula, list[dict[str, Any]]()

    def solve(  # type: ignore[override]
        self,
        moving: torch.Tensor,
        fixed: torch.Tensor,
        initial_ddf: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        **changes: Any,
    ) -> tuple[torch.Tensor, Any]:
        self.noted.append(changes)
        return self.formula(moving, fixed, initial_ddf, mask), None


def places(image: torch.Tensor) -> torch.Tensor:
    """Voxel coordinates ``(B, ndim, *spatial)``."""
    grid = np.stack(np.meshgrid(*map(np.arange, image.shape[2:]), indexing="ij"))
    return torch.from_numpy(grid).float().expand(len(image), *grid.shape)


def blobs(ndim: int, seed: int = 0) -> torch.Tensor:
    """Two images of noise in the middle, zero within an eighth and three voxels of the border."""
    size = SIZES[ndim]
    image = torch.zeros(2, 1, *size)
    inner = tuple(slice(n // 8 + 4, n - n // 8 - 4) for n in size)
    image[(..., *inner)] = torch.rand(2, 1, *[s.stop - s.start for s in inner], generator=seeded(seed))
    return image


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def centroid(image: torch.Tensor) -> torch.Tensor:
    """Of what is above the lowest intensity, ``(B, ndim, 1, ...)``."""
    dims = tuple(range(2, image.ndim))
    weight = image - image.amin(dims, keepdim=True)
    return (weight * places(image)).sum(dims, keepdim=True) / weight.sum(dims, keepdim=True)


def between_centroids(moving: torch.Tensor, fixed: torch.Tensor, *_: Any) -> torch.Tensor:
    return (centroid(moving) - centroid(fixed)).expand(-1, -1, *fixed.shape[2:])


def gradient(moving: torch.Tensor, fixed: torch.Tensor, *_: Any) -> torch.Tensor:
    """Central differences of the contrast, which differ from voxel to voxel."""
    dims = tuple(range(2, fixed.ndim))
    contrast = (fixed - fixed.amin(dims, keepdim=True)) / (fixed.amax(dims, keepdim=True) - fixed.amin(dims, True))
    return torch.cat([(contrast.roll(-1, d) - contrast.roll(1, d)) / 2 for d in dims], dim=1)


def answers_of(formula: Formula, ndim: int, **given: Any) -> dict[str, list[list[float]]]:
    moving, fixed = blobs(ndim), blobs(ndim, 1)
    ddf = formula(moving, fixed, given.get("initial_ddf"), given.get("mask"))
    answers = harmless_answers(Known(formula), moving, fixed, ddf, **given)
    return {name: [values.tolist() for values in pair] for name, pair in answers.items()}


def check(answers: dict[str, list[list[float]]], **expected: Any) -> None:
    """Largest and mean of the changes that are named, for both pairs; nothing of the others."""
    for name, values in answers.items():
        largest_mean = np.broadcast_to(np.reshape(expected.get(name, 0.0), (-1, 1)), (2, 2))
        np.testing.assert_allclose(values, largest_mean, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("ndim", [2, 3])
def test_an_equivariant_map_answers_nothing(ndim: int) -> None:
    answers = answers_of(between_centroids, ndim)
    assert tuple(answers) == HARMLESS_CHANGES
    check(answers)
    # one that differs from voxel to voxel, and does not turn with the swapped pair
    answers = answers_of(gradient, ndim)
    assert min(answers.pop("swap")[0]) > 0.1
    check(answers)


@pytest.mark.parametrize("ndim", [2, 3])
def test_a_constant_bias(ndim: int) -> None:
    bias = torch.tensor([0.5, -0.75, 0.25][:ndim])
    answers = answers_of(lambda *pair: between_centroids(*pair) + bias.view(-1, *[1] * ndim), ndim)
    # a flipped component comes back with the other sign; there and back again it counts twice
    check(answers, flip=1.5, swap=2 * float(bias.norm()))


@pytest.mark.parametrize("ndim", [2, 3])
def test_a_bias_by_intensity(ndim: int) -> None:
    def formula(moving: torch.Tensor, fixed: torch.Tensor, *_: Any) -> torch.Tensor:
        level = fixed.amax(tuple(range(1, ndim + 2)), keepdim=True)
        return torch.cat([torch.full_like(fixed, 0), level.expand_as(fixed), torch.zeros_like(fixed)], dim=1)[:, :ndim]

    answers = answers_of(formula, ndim)
    level = blobs(ndim, 1).flatten(1).amax(1).numpy()
    np.testing.assert_allclose(answers["offset"], np.full((2, 2), 0.1), atol=1e-5)
    np.testing.assert_allclose(answers["scale"], np.tile(0.1 * level, (2, 1)), atol=1e-5)
    assert level[0] != level[1]


@pytest.mark.parametrize("ndim", [2, 3])
def test_a_bias_by_place_is_measured_away_from_the_border(ndim: int) -> None:
    n = SIZES[ndim][0]

    def formula(moving: torch.Tensor, fixed: torch.Tensor, *_: Any) -> torch.Tensor:
        x = places(fixed)
        return torch.cat([0.01 * x[:, :1] ** 2, torch.zeros_like(x[:, 1:])], dim=1)

    answers = answers_of(formula, ndim)
    x = np.arange(n // 8 + 3, n - n // 8)
    lengths = 0.01 * (x**2 - (x - 3) ** 2)
    check({"shift": answers["shift"]}, shift=[lengths.max(), lengths.mean()])
    # u(x) + u(x + u(x)), interpolated, where that lies in the image
    x = np.arange(n)
    u = 0.01 * x**2
    inside = x + u <= n - 0.5
    lengths = (u + np.interp(x + u, x, u))[inside]
    assert not inside.all()
    check({"swap": answers["swap"]}, swap=[lengths.max(), lengths.mean()])
    # x and its mirror image have both signs
    lengths = 0.01 * (x**2 + (n - 1 - x) ** 2)
    check({"flip": answers["flip"]}, flip=[lengths.max(), lengths.mean()])
    check({name: answers[name] for name in ("offset", "scale")})


@pytest.mark.parametrize("ndim", [2, 3])
def test_mask_and_start_are_changed_along(ndim: int) -> None:
    mask = torch.zeros(2, 1, *SIZES[ndim])
    mask[0, :, 4:12, 3:13], mask[1, :, 9:14, 6:12] = 1.0, 1.0
    start = torch.randn(2, ndim, *SIZES[ndim], generator=seeded(2))

    def outside(moving: torch.Tensor, fixed: torch.Tensor, _: Any, inside: torch.Tensor) -> torch.Tensor:
        return 5 * (1 - inside).expand(-1, ndim, *fixed.shape[2:])

    def kept(moving: torch.Tensor, fixed: torch.Tensor, initial: torch.Tensor | None, _: Any) -> torch.Tensor:
        return torch.zeros_like(start) if initial is None else initial

    answers = answers_of(outside, ndim, mask=mask)
    assert tuple(answers) == HARMLESS_CHANGES[:-1]
    check(answers)
    answers = answers_of(kept, ndim, initial_ddf=start)
    lengths = np.linalg.norm(start.numpy(), axis=1)
    assert answers.pop("swap")[0] == pytest.approx(lengths.reshape(2, -1).max(1), abs=1.5)
    check(answers)
    # no voxel to compare
    assert np.isnan(answers_of(outside, ndim, mask=torch.zeros_like(mask))["flip"]).all()


def test_the_solves_have_the_settings_that_are_given() -> None:
    network, image = Known(between_centroids), blobs(2)
    harmless_answers(network, image, image, torch.zeros(2, 2, *SIZES[2]), max_steps=7)
    assert network.noted == [{"max_steps": 7}] * 6


class Toward(torch.nn.Module):
    def __init__(self, formula: Formula) -> None:
        super().__init__()
        self.formula = formula

    def forward(self, moving: torch.Tensor, fixed: torch.Tensor, ddf: torch.Tensor) -> torch.Tensor:
        return 0.5 * (self.formula(moving, fixed) - ddf)


@pytest.mark.parametrize("proximal_weight", [0.0, 0.5])
def test_answers_on_the_certificate(proximal_weight: float) -> None:
    moving, fixed = blobs(2), blobs(2, 1)
    update = Toward(lambda *pair: between_centroids(*pair) + torch.tensor([0.25, 3.0]).view(2, 1, 1))
    rest: dict[str, Any] = dict(num_states=0, max_steps=60, tolerance=1e-6)
    coarse = deq_net(update, spatial_dims=2, **rest) if proximal_weight else None
    network = deq_net(update, 2, coarse, proximal_weight=proximal_weight, **rest).eval()
    ddf, _, certificates = certified_solve(network, moving, fixed, certificate={"answers": True})
    torch.testing.assert_close(ddf, certified_solve(network, moving, fixed)[0])
    assert certificates is not None
    for c in certificates:
        assert c.verdict == "converged" and c.sensitive_to == ["flip", "swap"] and c.answers is not None
        if not proximal_weight:
            assert c.answers["flip"] == pytest.approx((6.0, 6.0), abs=1e-4)
            assert c.answers["shift"] == pytest.approx((0.0, 0.0), abs=1e-4)
        words = c.as_dict()
        assert words["sensitive_to"] == "flip, swap" and "answers" not in words
        assert (words["answer_flip_max"], words["answer_flip_mean"]) == c.answers["flip"]
        assert {name for name in words if name.startswith("answer")} < set(OPTIONAL_RECORDS)
    plain = certified_solve(network, moving, fixed, certificate={})[2]
    assert plain is not None and plain[0].answers is None and not plain[0].sensitive_to


@pytest.mark.parametrize("ndim", [2, 3])
def test_the_energy_answers_within_a_mask(ndim: int) -> None:
    moving, fixed = blobs(ndim), blobs(ndim, 1)
    network = EnergyRegistrationNet(spatial_dims=ndim, steps=(3,)).eval()
    mask = (fixed > 0).float()
    certificates = certified_solve(network, moving, fixed, certificate={"answers": True}, mask=mask)[2]
    assert certificates is not None and len(certificates) == 2
    for c in certificates:
        # three steps amplify no rounding, and go as far as that for themselves
        assert c.answers is not None and list(c.answers) == ["offset", "scale", "flip", "shift"]
        assert c.answers["flip"][0] < 1e-3 and c.answers["shift"][1] < 0.1 and not c.sensitive_to


def test_what_is_sensitive() -> None:
    answers = {"offset": (9.0, 1.0), "scale": (1.5, 1.1), "flip": (math.nan, math.nan), "swap": (0.0, 0.0)}
    c = Certificate("converged", 0.0, 0.0, 3, answers=answers)
    # one voxel out of many says little; what is no number is no answer
    assert c.sensitive_to == ["scale", "flip"] and c.as_dict()["sensitive_to"] == "scale, flip"
    assert Certificate("converged", 0.0, 0.0, 3, answers={"swap": (0.0, 0.0)}).as_dict()["sensitive_to"] == "nothing"
    assert check_certificate({"answers": True}) == {"answers": True}
    with pytest.raises(ValueError, match="certificate: answers: expected True or False, got 'flip'"):
        check_certificate({"answers": "flip"})
