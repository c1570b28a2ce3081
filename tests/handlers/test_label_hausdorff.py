# SPDX-License-Identifier: Apache-2.0
"""LabelHausdorff on a real Ignite engine: boxes whose distance is known in mm."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Engine
from monai.data import MetaTensor, decollate_batch, list_data_collate
from monai.handlers import from_engine

from monai_deq.handlers import LabelHausdorff

KEYS = ["warped_label", "fixed_label"]
# of a coronal slice or volume: columns of 2, 0.5 and 3 mm along x, z and y
AFFINE = np.array([[2.0, 0, 0, 3], [0, 0, -3.0, 7], [0, 0.5, 0, -4], [0, 0, 0, 1.0]])


def box(size: tuple[int, ...], start: int, axis: int, label: int = 4) -> torch.Tensor:
    """A cube of 3 voxels that begins at ``start`` along an axis and at 1 along the others."""
    image = torch.zeros(1, *size)
    image[(0, *(slice(s, s + 3) for s in (start if a == axis else 1 for a in range(len(size)))))] = label
    return image


def batches(ndim: int) -> list[dict[str, Any]]:
    """Two batches of one and two pairs: shifts of 2, 3 and 1 voxels along the axes 0, 1 and the last."""
    size = (9, 8, 10)[:ndim]
    shifts = [(2, 0), (3, 1), (1, ndim - 1)]
    items = [
        {
            "warped_label": box(size, 1 + shift, axis),
            "fixed_label": MetaTensor(box(size, 1, axis), affine=AFFINE, spatial_ndim=ndim),
        }
        for shift, axis in shifts
    ]
    return [list_data_collate(items[:1]), list_data_collate(items[1:])]


def run(handler: LabelHausdorff, outputs: list[Any]) -> tuple[float, torch.Tensor]:
    engine = Engine(lambda engine, batch: batch)
    handler.attach(engine, "hd")
    state = engine.run(outputs, max_epochs=2)  # the second epoch starts from nothing
    return state.metrics["hd"], state.metric_details["hd"]  # type: ignore[attr-defined]


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("decollated", [False, True])
def test_shift_of_a_box_is_its_length(ndim: int, decollated: bool) -> None:
    outputs = [decollate_batch(b) if decollated else b for b in batches(ndim)]

    def tensors(output: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(output[key] for key in KEYS)

    take = from_engine(KEYS) if decollated else tensors
    truth = [2 * 2.0, 3 * 0.5, 1 * (0.5 if ndim == 2 else 3.0)]
    value, details = run(LabelHausdorff([4, 5], output_transform=take), outputs)
    np.testing.assert_allclose(details[:, 0], truth, rtol=1e-6)
    assert details.shape == (3, 2) and torch.isnan(details[:, 1]).all()
    assert value == pytest.approx(np.mean(truth))
    value, details = run(LabelHausdorff([4], spacing=1, output_transform=take), outputs)
    np.testing.assert_allclose(details[:, 0], [2, 3, 1], rtol=1e-6)


def test_percentile() -> None:
    """A single voxel 6 away from a square of 3 x 3 is more than 5 % of its surface."""
    warped, fixed = box((12, 12), 1, 0), box((12, 12), 1, 0)
    warped[0, 9, 2] = 4
    outputs = [{"warped_label": warped[None], "fixed_label": fixed[None]}]

    def take(output: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        return output["warped_label"], output["fixed_label"]

    assert run(LabelHausdorff([4], output_transform=take), outputs)[0] == pytest.approx(6)
    # 8 surface voxels at distance 0 and one at 6
    expected = np.percentile([0] * 8 + [6], 95)
    assert run(LabelHausdorff([4], percentile=95, output_transform=take), outputs)[0] == pytest.approx(expected)
    assert run(LabelHausdorff([4], percentile=50, output_transform=take), outputs)[0] == 0


@pytest.mark.parametrize("output", [torch.zeros(2, 1, 4, 4), (torch.zeros(1, 1, 4, 4),), [torch.zeros(1, 4, 4)] * 2])
def test_anything_but_a_pair_is_refused(output: Any) -> None:
    with pytest.raises(ValueError, match="expected to return the tuple"):
        run(LabelHausdorff([1]), [output])
