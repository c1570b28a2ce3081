# SPDX-License-Identifier: Apache-2.0
"""Handlers of the field metrics and of label Dice on a real Ignite engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ignite.engine import Engine
from monai.data import decollate_batch
from monai.handlers import from_engine

from monai_deq.handlers.folded_voxels import FoldedVoxels
from monai_deq.handlers.label_dice import LabelDice
from monai_deq.handlers.non_diffeomorphic_volume import NonDiffeomorphicVolume
from monai_deq.handlers.std_log_jacobian import StdLogJacobian
from monai_deq.metrics import (
    compute_folded_voxels,
    compute_label_dice,
    compute_non_diffeomorphic_volume,
    compute_std_log_jacobian,
)


def learn2reg(ddf: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    return compute_std_log_jacobian(ddf, mask, form="learn2reg")


CASES = [
    (FoldedVoxels, {}, compute_folded_voxels),
    (StdLogJacobian, {}, compute_std_log_jacobian),
    (StdLogJacobian, {"form": "learn2reg"}, learn2reg),
    (NonDiffeomorphicVolume, {}, compute_non_diffeomorphic_volume),
]


def run(handler: Any, outputs: list[Any]) -> tuple[float, torch.Tensor]:
    """Attach the handler to an engine that puts out the given outputs one after the other."""
    engine = Engine(lambda engine, batch: batch)
    handler.attach(engine, name="score")
    state = engine.run(outputs, max_epochs=2)  # the second epoch starts from nothing
    return state.metrics["score"], state.metric_details["score"]  # type: ignore[attr-defined]


def as_tensor(batch: dict[str, torch.Tensor], *keys: str) -> Any:
    return batch[keys[0]] if len(keys) == 1 else tuple(batch[key] for key in keys)


def as_list(batch: dict[str, torch.Tensor], *keys: str) -> Any:
    return list(batch[keys[0]]) if len(keys) == 1 else tuple(list(batch[key]) for key in keys)


def decollated(batch: dict[str, torch.Tensor], *keys: str) -> Any:
    return from_engine(keys)(decollate_batch(batch))


FORMS = [as_tensor, as_list, decollated]


@pytest.fixture(params=[(7, 9), (6, 5, 7)], ids=["2-D", "3-D"])
def batches(request: pytest.FixtureRequest) -> list[dict[str, torch.Tensor]]:
    """Two batches of size 2: the size at which MONAI's handler takes a field for a pair."""
    generator = torch.Generator().manual_seed(8)
    shape = request.param
    return [
        {
            "ddf": torch.randn(2, len(shape), *shape, generator=generator),
            "mask": (torch.rand(2, 1, *shape, generator=generator) > 0.3).float(),
        }
        for _ in range(2)
    ]


@pytest.mark.parametrize(("handler", "kwargs", "compute"), CASES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("masked", [False, True])
def test_value_is_that_of_the_pure_function(handler, kwargs, compute, form: Callable, masked: bool, batches) -> None:
    keys = ("ddf", "mask") if masked else ("ddf",)
    score, details = run(handler(output_transform=lambda out: form(out, *keys), **kwargs), batches)
    expected = torch.cat([compute(*(batch[key] for key in keys)) for batch in batches])
    assert len(expected.unique()) > 2
    torch.testing.assert_close(details, expected)
    assert score == pytest.approx(expected.mean().item(), rel=1e-5)


@pytest.mark.parametrize(("handler", "kwargs", "compute"), CASES)
def test_no_mask_may_be_said_in_the_pair(handler, kwargs, compute, batches) -> None:
    score, _ = run(handler(output_transform=lambda out: (list(out["ddf"]), None), **kwargs), batches)
    assert score == pytest.approx(torch.cat([compute(b["ddf"]) for b in batches]).mean().item(), rel=1e-5)


@pytest.mark.parametrize("handler", [FoldedVoxels, StdLogJacobian, NonDiffeomorphicVolume])
def test_what_is_not_a_field_is_refused(handler, batches) -> None:
    ddf, mask = batches[0]["ddf"], batches[0]["mask"]
    for output, error, message in [
        ((ddf[0], ddf[1]), ValueError, "ddf: expected shape|mask: expected shape"),  # two items put as a pair
        ((ddf, ddf), ValueError, "mask: expected shape"),
        ((ddf, mask, mask), ValueError, r"expected a tuple \(ddf, mask\), got a tuple of 3"),
        ({"y_pred": ddf, "y": mask}, TypeError, "got dict. .*from_engine"),
        ([{"ddf": ddf[0]}], TypeError, "y_pred: .* got dict"),
        (None, TypeError, "got NoneType"),
    ]:
        with pytest.raises(error, match=message):
            run(handler(), [output])


@pytest.mark.parametrize("handler", [FoldedVoxels, StdLogJacobian, NonDiffeomorphicVolume])
def test_reduction_and_details_are_passed_on(handler, batches) -> None:
    engine = Engine(lambda engine, batch: batch["ddf"])
    handler(reduction="none", save_details=False).attach(engine, "score")
    state = engine.run(batches)
    assert state.metrics["score"].shape == (4,)
    assert not hasattr(state, "metric_details")


@pytest.mark.parametrize("form", FORMS)
def test_label_dice(form: Callable) -> None:
    generator = torch.Generator().manual_seed(9)
    batches = [
        {key: torch.randint(0, 4, (2, 1, 6, 7), generator=generator) for key in ("warped", "fixed", "moving")}
        for _ in range(2)
    ]
    batches[0]["warped"][0] = batches[0]["warped"][0].clamp(max=2)  # the warp lost label 3
    for keys in (("warped", "fixed"), ("warped", "fixed", "moving")):
        score, details = run(LabelDice([1, 3], output_transform=lambda out, keys=keys: form(out, *keys)), batches)
        expected = torch.cat(
            [compute_label_dice(b["warped"], b["fixed"], [1, 3], *(b[k] for k in keys[2:])) for b in batches]
        )
        torch.testing.assert_close(details, expected, equal_nan=True)
        assert score == pytest.approx(expected.nanmean(dim=1).mean().item(), rel=1e-5)
        assert expected.isnan().any() == (len(keys) == 2)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (torch.ones(2, 1, 4, 4), "expected to return the tuple .* got Tensor"),
        ([torch.ones(1, 4, 4)] * 2, "expected to return the tuple .* got list"),
        ((torch.ones(2, 1, 4, 4),), "got a tuple of 1"),
        ((torch.ones(2, 1, 4, 4), None), "y: expected the fixed labels"),
    ],
)
def test_label_dice_refuses_what_is_not_a_pair(output, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(LabelDice([1]), [output])
