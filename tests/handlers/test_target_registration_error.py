# SPDX-License-Identifier: Apache-2.0
"""TargetRegistrationError on a real Ignite engine."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Engine
from monai.data import MetaTensor, decollate_batch, list_data_collate
from monai.handlers import from_engine

from monai_deq.handlers import TargetRegistrationError

KEYS = ["ddf", "fixed_keypoints", "moving_keypoints", "fixed"]
# of a coronal slice or volume: columns of 2, 0.5 and 3 mm along x, z and y
AFFINE = np.array([[2.0, 0, 0, 3], [0, 0, -3.0, 7], [0, 0.5, 0, -4], [0, 0, 0, 1.0]])


def batches(ndim: int) -> list[dict[str, Any]]:
    """Two batches of one and two pairs: fields that miss the landmarks by 2, 3 and 1 voxels along 0, 1 and the last."""
    size = (9, 8, 10)[:ndim]
    generator = torch.Generator().manual_seed(2)
    items = []
    for miss, axis in [(2, 0), (3, 1), (1, ndim - 1)]:
        fixed = 1 + 4 * torch.rand(6, ndim, generator=generator)
        ddf = torch.zeros(ndim, *size)
        ddf[axis] = miss - 0.5
        moving = fixed.clone()
        moving[:, axis] -= 0.5
        image = MetaTensor(torch.zeros(1, *size), affine=AFFINE, spatial_ndim=ndim)
        items.append(dict(zip(KEYS, (ddf, fixed, moving, image), strict=True)))
    return [list_data_collate(items[:1]), list_data_collate(items[1:])]


def run(handler: TargetRegistrationError, outputs: list[Any]) -> tuple[float, torch.Tensor]:
    engine = Engine(lambda engine, batch: batch)
    handler.attach(engine, "tre")
    state = engine.run(outputs, max_epochs=2)  # the second epoch starts from nothing
    return state.metrics["tre"], state.metric_details["tre"]  # type: ignore[attr-defined]


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("decollated", [False, True])
def test_lengths_in_mm(ndim: int, decollated: bool) -> None:
    outputs = [decollate_batch(b) if decollated else b for b in batches(ndim)]

    def take(keys: list[str]) -> Any:
        return from_engine(keys) if decollated else lambda output: tuple(output[key] for key in keys)

    truth = [2 * 2.0, 3 * 0.5, 1 * (0.5 if ndim == 2 else 3.0)]
    value, details = run(TargetRegistrationError(output_transform=take(KEYS)), outputs)
    np.testing.assert_allclose(details, np.reshape(truth, (3, 1)), rtol=1e-5)
    assert value == pytest.approx(np.mean(truth), rel=1e-5)
    value, details = run(TargetRegistrationError(spacing=1, output_transform=take(KEYS[:3])), outputs)
    np.testing.assert_allclose(details[:, 0], [2, 3, 1], rtol=1e-5)
    value, _ = run(TargetRegistrationError(pair_percentile=70, output_transform=take(KEYS)), outputs)
    assert value == pytest.approx(np.percentile(truth, 70), rel=1e-5)


def test_arguments_are_passed_on() -> None:
    ddf = torch.zeros(1, 2, 4, 5)
    fixed = torch.tensor([[[0.0, 0.0], [1.0, 1.0], [9.0, 0.0]]])
    moving = fixed + torch.tensor([[[0.0, 1.0], [0.0, 2.0], [0.0, 4.0]]])
    engine = Engine(lambda engine, batch: batch)
    TargetRegistrationError(spacing=1, percentile=50, outside="clamp", reduction="none", save_details=False).attach(
        engine, "tre"
    )
    state = engine.run([(ddf, fixed, moving)])
    np.testing.assert_allclose(state.metrics["tre"], [2.0])
    assert not hasattr(state, "metric_details")
    # a field that the two forms interpolate differently
    ddf[:, 1, 2] = 8
    inner = torch.tensor([[[1.5, 1.0]]])
    values = [
        run(TargetRegistrationError(spacing=1, form=f), [(ddf, inner, inner)])[0] for f in ("linear", "learn2reg")
    ]
    assert values[0] == pytest.approx(4) and values[1] > 4.1
    with pytest.raises(ValueError, match="1 of 3 points lie outside"):
        run(TargetRegistrationError(spacing=1), [(ddf, fixed, moving)])


@pytest.mark.parametrize(
    "output", [torch.zeros(2, 2, 4, 4), (torch.zeros(1, 2, 4, 4), None), [torch.zeros(2, 4, 4)] * 3]
)
def test_anything_but_three_or_four_elements_is_refused(output: Any) -> None:
    with pytest.raises(ValueError, match="expected to return the tuple"):
        run(TargetRegistrationError(spacing=1), [output])
