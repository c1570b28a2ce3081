# SPDX-License-Identifier: Apache-2.0
"""Random contrasts: each of its ways found again in what it makes, by the same draws again, in 2-D and 3-D."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose

import monai_deq.transforms as transforms
from monai_deq.transforms import RandContrastd

SIZES = [(24, 31), (12, 13, 11)]


def item(size: tuple[int, ...], seed: int = 0) -> dict[str, torch.Tensor]:
    """Two images of five intensities, and their label maps, which are ignorant of one of them."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(0, 4, (1, *size), generator=generator)
    image = torch.tensor([0.0, 0.3, 0.55, 0.9])[label]
    dark = torch.rand((1, *size), generator=generator) < 0.1
    return {"a": torch.where(dark, 0.2, image), "a_label": torch.where(dark, 0, label).float(), "b": image.clone()}


def draws(kind: float, size: tuple[int, ...]) -> Iterator[tuple[dict[str, torch.Tensor], RandContrastd]]:
    """An item, and the transform at where the first number drawn says which kind it is."""
    transform = RandContrastd(("a",), ("a_label",))
    transform.bias.prob = transform.noise.prob = 0.0
    for seed in range(400):
        if kind <= np.random.RandomState(seed).rand() < kind + 0.1:
            yield item(size), transform.set_random_state(seed)


@pytest.mark.parametrize("size", SIZES)
def test_an_intensity_for_each_label(size: tuple[int, ...]) -> None:
    means, deviations, dark = [], [], 0
    label = torch.arange(size[0]).div(4, rounding_mode="floor").view(1, -1, *[1] * (len(size) - 1)).expand(1, *size) % 3
    image = torch.where(label > 0, 0.4, 0.01)  # what the labels say is not in the image
    inside = torch.arange(size[0]) % 4 % 3 > 0  # no neighbour has another label
    for _, transform in draws(0.05, size):
        after = transform({"a": image, "a_label": label.float()})["a"]
        assert after.shape == image.shape and torch.isfinite(after).all()
        parts = [after[:, inside][label[:, inside] == k] for k in range(3)]
        dark += not parts[0].any()
        means += [float(part.mean()) for part in parts[1:]]
        deviations += [float(part.std()) for part in parts[1:]]
    # intensities uniform in [0, 1], with noise of up to 0.08; the background is black in seven of ten
    assert len(means) > 30 and 0.2 < np.std(means) < 0.4 and 0.35 < np.mean(means) < 0.65
    assert 0.005 < np.mean(deviations) < 0.05 and max(deviations) < 0.1
    assert 0.4 < dark / (len(means) / 2) < 0.95


@pytest.mark.parametrize("size", SIZES)
def test_a_curve_takes_equal_to_equal(size: tuple[int, ...]) -> None:
    falling = 0
    for before, transform in draws(0.4, size):
        after = transform(before)
        levels = torch.tensor([0.0, 0.2, 0.3, 0.55, 0.9])
        values = [after["a"][before["a"] == level].unique() for level in levels]
        assert all(len(v) == 1 for v in values)
        assert min(map(float, values)) >= 0 and max(map(float, values)) <= 1
        falling += bool((torch.cat(values[1:]).diff() < 0).any())
    assert falling > 10


def test_a_gamma_keeps_the_order() -> None:
    exponents = []
    for before, transform in draws(0.7, SIZES[0]):
        after = transform(before)
        some = (before["a"] > 0) & (before["a"] < 1)
        ratio = after["a"][some].log() / before["a"][some].log()
        assert float(ratio.max() - ratio.min()) < 1e-4
        exponents.append(float(ratio.mean().log()))
    assert len(exponents) > 20 and abs(np.mean(exponents)) < 0.2 and 0.25 < np.std(exponents) < 0.55


def test_the_rest_keep_their_contrast() -> None:
    same = [torch.equal(before["a"], transform(before)["a"]) for before, transform in draws(0.87, SIZES[1])]
    assert len(same) > 20 and all(same)


def test_field_and_noise_of_each_image_alone() -> None:
    transform = RandContrastd(("a", "b"))
    same, changed = item(SIZES[0]), 0
    same["a"] = same["b"].clone()
    for seed in range(30):
        out = transform.set_random_state(seed)(same)
        changed += not torch.equal(out["a"], out["b"])
        again = transform.set_random_state(seed)(same)
        assert torch.equal(out["a"], again["a"]) and torch.equal(out["b"], again["b"])
    assert changed == 30
    assert torch.equal(same["a"], item(SIZES[0])["b"])  # what came in is as it was


def test_seeds_reach_it_through_compose_and_labels_may_be_absent() -> None:
    transform = Compose([RandContrastd(("a", "b"), ("a_label", "b_label"))])
    given = {k: MetaTensor(v) for k, v in item(SIZES[1]).items()}
    one, two, three = (transform.set_random_state(seed)(given)["a"] for seed in (3, 3, 4))
    assert torch.equal(one, two) and not torch.equal(one, three)
    with pytest.raises(KeyError, match="c"):
        RandContrastd(("c",))(given)
    assert transforms.RandContrastD is transforms.RandContrastDict is RandContrastd
