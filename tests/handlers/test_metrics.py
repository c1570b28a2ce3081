# SPDX-License-Identifier: Apache-2.0
"""MetricHandler on a real Ignite engine, with every metric of the package."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from monai.data import MetaTensor, decollate_batch, list_data_collate
from monai.metrics import MSEMetric

from monai_deq.handlers import MetricHandler
from monai_deq.handlers.metrics import pair_means
from monai_deq.metrics import (
    FoldedVoxelsMetric,
    LabelDiceMetric,
    LabelHausdorffMetric,
    NonDiffeomorphicVolumeMetric,
    StdLogJacobianMetric,
    TargetRegistrationErrorMetric,
    compute_folded_voxels,
    compute_label_dice,
    compute_non_diffeomorphic_volume,
    compute_std_log_jacobian,
)

# of a coronal slice or volume: columns of 2, 0.5 and 3 mm along x, z and y
AFFINE = np.array([[2.0, 0, 0, 3], [0, 0, -3.0, 7], [0, 0.5, 0, -4], [0, 0, 0, 1.0]])
NAN = float("nan")
TRE_KEYS = ["ddf", "fixed_keypoints", "moving_keypoints", "fixed"]


def learn2reg(ddf: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    return compute_std_log_jacobian(ddf, mask, form="learn2reg")


REGULARITY = [
    (FoldedVoxelsMetric, {}, compute_folded_voxels),
    (StdLogJacobianMetric, {}, compute_std_log_jacobian),
    (StdLogJacobianMetric, {"form": "learn2reg"}, learn2reg),
    (NonDiffeomorphicVolumeMetric, {}, compute_non_diffeomorphic_volume),
]


def run(handler: MetricHandler, outputs: list[Any]) -> tuple[float, torch.Tensor]:
    """Attach the handler to an engine that puts out the given outputs one after the other."""
    engine = Engine(lambda engine, batch: batch)
    handler.attach(engine, "score")
    state = engine.run(outputs, max_epochs=2)  # the second epoch starts from nothing
    return state.metrics["score"], state.metric_details["score"]  # type: ignore[attr-defined]


def test_scores_of_the_iteration() -> None:
    engine, seen = Engine(lambda engine, batch: batch), []
    MetricHandler(FoldedVoxelsMetric()).attach(engine, "folds")
    MetricHandler(FoldedVoxelsMetric(), "other").attach(engine, "others")
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda: seen.append(dict(engine.state.batch_scores)))
    flat, folded = torch.zeros(1, 2, 4, 6), torch.zeros(1, 2, 4, 6)
    folded[:, 1] = -2.0 * torch.arange(6)
    engine.run([{"ddf": torch.cat([flat, folded]), "other": folded}, {"ddf": folded, "other": flat}])
    assert [{name: s.tolist() for name, s in scores.items()} for scores in seen] == [
        {"folds": [[0.0], [100.0]], "others": [[100.0]]},
        {"folds": [[100.0]], "others": [[0.0]]},
    ]


def test_means_of_pairs() -> None:
    means = pair_means(torch.tensor([[0.5, NAN], [0.25, 0.75], [NAN, NAN]]))
    assert means == pytest.approx([0.5, 0.5, NAN], nan_ok=True) and means.dtype == float


def batch_of(batch: dict[str, Any]) -> Any:
    return batch


def batch_of_lists(batch: dict[str, Any]) -> Any:
    return {key: list(value) for key, value in batch.items()}


FORMS = [batch_of, batch_of_lists, decollate_batch]


@pytest.fixture(params=[(7, 9), (6, 5, 7)], ids=["2-D", "3-D"])
def fields(request: pytest.FixtureRequest) -> list[dict[str, torch.Tensor]]:
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


@pytest.mark.parametrize(
    ("metric", "kwargs", "compute", "form", "keys"),
    [
        *((*REGULARITY[0], form, keys) for form in FORMS for keys in ("ddf", ["ddf", None], ["ddf", "mask"])),
        *((*case, decollate_batch, ["ddf", "mask"]) for case in REGULARITY[1:]),
    ],
)
def test_value_is_that_of_the_pure_function(metric, kwargs, compute, form, keys, fields) -> None:
    score, details = run(MetricHandler(metric(**kwargs), keys), [form(batch) for batch in fields])
    expected = torch.cat([compute(batch["ddf"], *([batch["mask"]] if "mask" in keys else [])) for batch in fields])
    assert len(expected.unique()) > 2
    torch.testing.assert_close(details, expected)
    assert score == pytest.approx(expected.mean().item(), rel=1e-5)


def test_two_items_are_never_a_pair(fields) -> None:
    ddf, mask = fields[0]["ddf"], fields[0]["mask"]
    for output, keys, error, message in [
        ((ddf, mask), "ddf", TypeError, "expected a dictionary or a list of them, got .*tuple"),
        ([ddf[0], ddf[1]], "ddf", TypeError, "expected a dictionary or a list of them, got a list of Tensor"),
        (ddf, "ddf", TypeError, "expected a dictionary or a list of them, got .*Tensor"),
        ([], "ddf", TypeError, "expected a dictionary or a list of them"),
        (None, "ddf", TypeError, "got .*NoneType"),
        ({"ddf": ddf, "mask": ddf}, ["ddf", "mask"], ValueError, "mask: expected shape"),
        ({"ddf": ddf}, ["ddf", "mask"], KeyError, r"no 'mask', it has \['ddf'\]"),
        ([{"ddf": ddf[0], "mask": mask[0]}, {"ddf": ddf[1]}], ["ddf", "mask"], KeyError, "no 'mask'"),
        ({"ddf": {"y_pred": ddf}}, "ddf", TypeError, "y_pred: .* got dict"),
        ([{"ddf": ddf[0], "mask": None}], ["ddf", "mask"], TypeError, "y: .* got NoneType"),
    ]:
        with pytest.raises(error, match=message):
            run(MetricHandler(FoldedVoxelsMetric(), keys), [output])


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match="metric: expected a CumulativeIterationMetric of MONAI, got function"):
        MetricHandler(compute_folded_voxels, "ddf")  # type: ignore[arg-type]
    for keys in ([], [None], ["ddf", 1]):
        with pytest.raises(TypeError, match="keys: expected one key or more"):
            MetricHandler(FoldedVoxelsMetric(), keys)  # type: ignore[arg-type]


def test_no_details_and_a_reduction_to_each_item(fields) -> None:
    engine = Engine(lambda engine, batch: batch)
    MetricHandler(FoldedVoxelsMetric("none"), "ddf", save_details=False).attach(engine, "score")
    state = engine.run(fields)
    assert state.metrics["score"].shape == (4,)
    assert not hasattr(state, "metric_details")


def test_metric_of_monai() -> None:
    batches = [{"pred": torch.full((2, 1, 3), 2.0), "label": torch.zeros(2, 1, 3)}]
    assert run(MetricHandler(MSEMetric(), ["pred", "label"]), batches)[0] == 4


@pytest.mark.parametrize("form", FORMS)
def test_label_dice(form) -> None:
    generator = torch.Generator().manual_seed(9)
    batches = [
        {key: torch.randint(0, 4, (2, 1, 6, 7), generator=generator) for key in ("warped", "fixed", "moving")}
        for _ in range(2)
    ]
    batches[0]["warped"][0] = batches[0]["warped"][0].clamp(max=2)  # the warp lost label 3
    for keys in (("warped", "fixed"), ("warped", "fixed", "moving")):
        score, details = run(MetricHandler(LabelDiceMetric([1, 3]), keys), [form(batch) for batch in batches])
        expected = torch.cat(
            [compute_label_dice(b["warped"], b["fixed"], [1, 3], *(b[k] for k in keys[2:])) for b in batches]
        )
        torch.testing.assert_close(details, expected, equal_nan=True)
        assert score == pytest.approx(expected.nanmean(dim=1).mean().item(), rel=1e-5)
        assert expected.isnan().any() == (len(keys) == 2)
    with pytest.raises(ValueError, match="y: expected the fixed labels"):
        run(MetricHandler(LabelDiceMetric([1]), "warped"), [form(batch) for batch in batches])


def box(size: tuple[int, ...], start: int, axis: int) -> torch.Tensor:
    """A cube of 3 voxels that begins at ``start`` along an axis and at 1 along the others."""
    image = torch.zeros(1, *size)
    image[(0, *(slice(s, s + 3) for s in (start if a == axis else 1 for a in range(len(size)))))] = 4
    return image


def shifted_pairs(ndim: int) -> list[dict[str, Any]]:
    """
    Two batches of one and two pairs, apart by 2, 3 and 1 voxels along the axes 0, 1 and the last: boxes, and landmarks
    that the fields miss by so much.
    """
    size = (9, 8, 10)[:ndim]
    generator = torch.Generator().manual_seed(2)
    items = []
    for miss, axis in [(2, 0), (3, 1), (1, ndim - 1)]:
        fixed = 1 + 4 * torch.rand(6, ndim, generator=generator)
        moving, ddf = fixed.clone(), torch.zeros(ndim, *size)
        moving[:, axis] -= 0.5
        ddf[axis] = miss - 0.5
        image = MetaTensor(torch.zeros(1, *size), affine=AFFINE, spatial_ndim=ndim)
        fixed_label = MetaTensor(box(size, 1, axis), affine=AFFINE, spatial_ndim=ndim)
        labels = {"warped_label": box(size, 1 + miss, axis), "fixed_label": fixed_label}
        items.append(dict(zip(TRE_KEYS, (ddf, fixed, moving, image), strict=True)) | labels)
    return [list_data_collate(items[:1]), list_data_collate(items[1:])]


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("form", [batch_of, decollate_batch])
def test_lengths_in_mm(ndim: int, form) -> None:
    outputs = [form(batch) for batch in shifted_pairs(ndim)]
    spacing = [2.0, 0.5, 0.5 if ndim == 2 else 3.0]
    truth = np.array([2, 3, 1]) * spacing
    labels = ["warped_label", "fixed_label"]
    value, details = run(MetricHandler(LabelHausdorffMetric([4, 5]), labels), outputs)
    np.testing.assert_allclose(details[:, 0], truth, rtol=1e-6)
    assert details.shape == (3, 2) and torch.isnan(details[:, 1]).all() and value == pytest.approx(np.mean(truth))
    value, details = run(MetricHandler(LabelHausdorffMetric([4], spacing=1), labels), outputs)
    np.testing.assert_allclose(details[:, 0], [2, 3, 1], rtol=1e-6)

    value, details = run(MetricHandler(TargetRegistrationErrorMetric(), TRE_KEYS), outputs)
    np.testing.assert_allclose(details, truth[:, None], rtol=1e-5)
    assert value == pytest.approx(np.mean(truth), rel=1e-5)
    value, details = run(MetricHandler(TargetRegistrationErrorMetric(spacing=1), TRE_KEYS[:3]), outputs)
    np.testing.assert_allclose(details[:, 0], [2, 3, 1], rtol=1e-5)
    value, _ = run(MetricHandler(TargetRegistrationErrorMetric(pair_percentile=70), TRE_KEYS), outputs)
    assert value == pytest.approx(np.percentile(truth, 70), rel=1e-5)
    # before registration
    value, details = run(MetricHandler(TargetRegistrationErrorMetric(), [None, *TRE_KEYS[1:]]), outputs)
    np.testing.assert_allclose(details[:, 0], 0.5 * np.array(spacing), rtol=1e-5)


def test_pairs_with_different_numbers_of_landmarks() -> None:
    generator = torch.Generator().manual_seed(3)
    points = [torch.rand(n, 2, generator=generator) * 3 for n in (4, 7)]
    pair = {"ddf": torch.zeros(2, 2, 4, 5), "fixed": points, "moving": [p + torch.tensor([3.0, 4.0]) for p in points]}
    pair["moving"][1] = points[1]
    items = [{key: value[i] for key, value in pair.items()} for i in range(2)]
    for output in (pair, items):
        handler = MetricHandler(TargetRegistrationErrorMetric(spacing=1), ["ddf", "fixed", "moving"])
        np.testing.assert_allclose(run(handler, [output])[1][:, 0], [5, 0], rtol=1e-5)


def test_landmarks_outside_are_refused_through_the_handler() -> None:
    fixed = torch.tensor([[[0.0, 0.0], [1.0, 1.0], [9.0, 0.0]]])
    output = {"ddf": torch.zeros(1, 2, 4, 5), "fixed": fixed, "moving": fixed + torch.tensor([0.0, 2.0])}
    keys = ["ddf", "fixed", "moving"]
    metric = TargetRegistrationErrorMetric(spacing=1, percentile=50, outside="clamp")
    assert run(MetricHandler(metric, keys), [output])[0] == pytest.approx(2)
    with pytest.raises(ValueError, match="1 of 3 points lie outside"):
        run(MetricHandler(TargetRegistrationErrorMetric(spacing=1), keys), [output])
