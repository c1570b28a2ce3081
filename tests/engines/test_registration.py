# SPDX-License-Identifier: Apache-2.0
"""RegistrationEvaluator and PreparePairBatch with MONAI's data loader, trainer, transforms and metric handlers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Events
from monai.data import DataLoader, Dataset, MetaTensor
from monai.engines import SupervisedTrainer
from monai.engines.utils import IterationEvents
from monai.handlers import from_engine
from monai.transforms import Compose, Lambdad

from monai_deq.data import StatePool
from monai_deq.engines import PreparePairBatch, PreparePooledPairBatch, RegistrationEvaluator
from monai_deq.handlers import FoldedVoxels, LabelDice, LabelHausdorff, StatePoolUpdater
from monai_deq.inferers import FixedPointInferer
from monai_deq.losses import KeypointSupervisedLoss, MaskedSimilarityLoss, RegistrationLoss, StatesLoss
from monai_deq.networks.blocks import RegistrationUNet, UNetUpdate
from monai_deq.networks.nets import DEQRegistrationNet
from monai_deq.solvers import random_smooth_ddf
from monai_deq.transforms import ResampleDDFd, WarpByDDFd

SHIFTS = (1.0, 3.0, 2.0)  # of the pairs, along the first axis
SIZES = {2: (9, 6), 3: (9, 4, 5)}


class ShiftByBrightness(torch.nn.Module):
    """Halves the way to a shift along the first axis by ten times the largest value of the fixed image."""

    def __init__(self) -> None:
        super().__init__()
        self.share = torch.nn.Parameter(torch.tensor(0.5))

    def forward(self, moving: torch.Tensor, fixed: torch.Tensor, ddf: torch.Tensor) -> torch.Tensor:
        target = torch.zeros_like(ddf)
        target[:, 0] = 10 * fixed.flatten(1).amax(1).view(-1, *[1] * (fixed.ndim - 2))
        return self.share * (target - ddf)


def affine(i: int) -> np.ndarray:
    """Of a coronal slice, another for each pair."""
    return np.array([[1.0 + i, 0, 0, 3], [0, 0, -3.0, 7], [0, 0.5, 0, i], [0, 0, 0, 1.0]])


def make_items(ndim: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    items = []
    for i, shift in enumerate(SHIFTS):
        fixed = torch.zeros(1, *SIZES[ndim])
        fixed[0, 0] = shift / 10
        label = torch.zeros(1, *SIZES[ndim])
        label[0, 2:4] = 1
        moving_label = label.roll(int(shift), dims=1)
        meta = {"affine": affine(i), "filename_or_obj": f"fixed{i}.nii.gz"}
        items.append(
            {
                "fixed": MetaTensor(fixed, meta=dict(meta), spatial_ndim=ndim),
                "moving": MetaTensor(torch.rand(1, *SIZES[ndim], generator=generator), affine=torch.eye(4)),
                "fixed_label": MetaTensor(label, meta=dict(meta), spatial_ndim=ndim),
                "moving_label": MetaTensor(moving_label, affine=torch.eye(4)),
                "fixed_subject": f"f{i}",
                "moving_subject": f"m{i}",
            }
        )
    return items


def make_evaluator(ndim: int, batch_size: int = 2, max_steps: int = 6, **kwargs: Any) -> RegistrationEvaluator:
    network = DEQRegistrationNet(ShiftByBrightness(), num_states=0, tolerance=0.05)
    return RegistrationEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(Dataset(make_items(ndim)), batch_size=batch_size),
        network=network,
        inferer=FixedPointInferer(max_steps=max_steps),
        prepare_batch=PreparePairBatch(),
        **kwargs,
    )


def run(evaluator: RegistrationEvaluator) -> list[dict[str, Any]]:
    """What comes out, pair by pair."""
    outputs: list[dict[str, Any]] = []
    evaluator.add_event_handler(Events.ITERATION_COMPLETED, lambda e: outputs.extend(e.state.output))
    evaluator.run()
    return outputs


@pytest.mark.parametrize("batch_size", [1, 2, 3])
@pytest.mark.parametrize("ndim", [2, 3])
def test_flat_output_of_every_pair(ndim: int, batch_size: int) -> None:
    items = make_items(ndim)
    outputs = run(make_evaluator(ndim, batch_size))
    solved = {"warped", "ddf", "steps", "evaluations", "residual", "relative_residual", "converged", "reason"}
    assert len(outputs) == 3
    # 0.5^k * shift <= 0.05: k = 5, 6, 6 steps; the second needs 0.5^6 * 3 = 0.047, so all converge in 6
    for i, (output, item) in enumerate(zip(outputs, items, strict=True)):
        assert set(output) == set(item) | solved
        steps = next(k for k in range(1, 9) if 0.5**k * SHIFTS[i] <= 0.05)
        assert (output["steps"], output["converged"], output["reason"]) == (steps, True, "tolerance")
        assert output["residual"] == pytest.approx(0.5**steps * SHIFTS[i], rel=1e-5)
        assert (output["fixed_subject"], output["moving_subject"]) == (f"f{i}", f"m{i}")
        for key in ("fixed", "moving", "fixed_label", "moving_label"):
            torch.testing.assert_close(output[key].as_tensor(), item[key].as_tensor())
            np.testing.assert_allclose(output[key].affine, item[key].affine)
        assert output["fixed"].meta["filename_or_obj"] == f"fixed{i}.nii.gz"
        assert not isinstance(output["ddf"], MetaTensor) and output["ddf"].shape == (ndim, *SIZES[ndim])
        torch.testing.assert_close(output["ddf"][0], torch.full(SIZES[ndim], SHIFTS[i] * (1 - 0.5**steps)))


def test_reason_belongs_to_the_pair() -> None:
    outputs = run(make_evaluator(2, 3, max_steps=5))
    assert [o["reason"] for o in outputs] == ["tolerance", "step limit", "step limit"]
    assert [o["converged"] for o in outputs] == [True, False, False]
    assert [o["steps"] for o in outputs] == [5, 5, 5]


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("ndim", [2, 3])
def test_postprocessing_and_metrics(ndim: int, batch_size: int) -> None:
    """The known shift brings the labels together; the spacing of each pair's own fixed image counts."""
    hausdorff = {"labels": [1], "output_transform": from_engine(["moving_label", "fixed_label"])}
    evaluator = make_evaluator(
        ndim,
        batch_size,
        max_steps=20,
        postprocessing=Compose(
            [
                ResampleDDFd("fixed_label"),
                WarpByDDFd("moving_label", output_keys="warped_label", mode="nearest"),
                Lambdad("reason", str.upper),
            ]
        ),
        key_val_metric={"dice": LabelDice([1], output_transform=from_engine(["warped_label", "fixed_label"]))},
        additional_metrics={
            "dice_before": LabelDice([1], output_transform=from_engine(["moving_label", "fixed_label"])),
            "hd_before": LabelHausdorff(**hausdorff),  # type: ignore[arg-type]
            "folded": FoldedVoxels(output_transform=from_engine("ddf")),
        },
    )
    outputs = run(evaluator)
    for i, (output, item) in enumerate(zip(outputs, make_items(ndim), strict=True)):
        torch.testing.assert_close(output["warped_label"].as_tensor(), item["fixed_label"].as_tensor())
        torch.testing.assert_close(output["moving_label"].as_tensor(), item["moving_label"].as_tensor())
        for key in ("ddf", "warped_label"):
            np.testing.assert_allclose(output[key].affine, affine(i))
        assert output["reason"] == "TOLERANCE"
    assert evaluator.state.metrics["dice"] == 1 and evaluator.state.metrics["folded"] == 0
    # slabs of two rows, one, three and two rows apart; rows of 1, 2 and 3 mm
    assert evaluator.state.metrics["dice_before"] == pytest.approx(0.5 / 3)
    assert evaluator.state.metrics["hd_before"] == pytest.approx((1 * 1 + 3 * 2 + 2 * 3) / 3)
    details = evaluator.state.metric_details["hd_before"]  # type: ignore[attr-defined]
    assert details.flatten().tolist() == pytest.approx([1, 6, 6])


def test_mode_gradients_and_events() -> None:
    evaluator = make_evaluator(2)
    network = evaluator.network.train()
    seen: list[tuple[bool, bool]] = []
    network.update.register_forward_pre_hook(lambda m, _: seen.append((m.training, torch.is_grad_enabled())))
    events: list[str] = []
    for event in (IterationEvents.FORWARD_COMPLETED, IterationEvents.MODEL_COMPLETED):
        evaluator.add_event_handler(event, lambda e, name=event.name: events.append(name))
    evaluator.run()
    assert set(seen) == {(False, False)} and network.training
    assert events == ["FORWARD_COMPLETED", "MODEL_COMPLETED"] * 2


def test_mixed_precision_keeps_the_field_in_single_precision() -> None:
    torch.manual_seed(0)
    backbone = RegistrationUNet(2, 4, None, (4, 4), (4,), (4,), flow_std=0.05)
    seen: list[torch.dtype] = []
    backbone.register_forward_hook(lambda *args: seen.append(args[2].dtype))
    evaluator = RegistrationEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(Dataset(make_items(2)), batch_size=2),
        network=DEQRegistrationNet(UNetUpdate(2, backbone), num_states=0),
        inferer=FixedPointInferer(max_steps=2),
        prepare_batch=PreparePairBatch(),
        amp=True,
    )
    outputs = run(evaluator)
    assert set(seen) == {torch.bfloat16}
    assert all(o["ddf"].dtype == o["warped"].dtype == torch.float32 for o in outputs)


def test_without_decollation_the_batch_stays_one() -> None:
    evaluator = make_evaluator(2, 3, decollate=False)
    batches: list[Any] = []
    evaluator.add_event_handler(Events.ITERATION_COMPLETED, lambda e: batches.append(e.state.output))
    evaluator.run()
    assert batches[0]["ddf"].shape == (3, 2, *SIZES[2]) and batches[0]["steps"].tolist() == [5, 6, 6]
    assert batches[0]["fixed_subject"] == ["f0", "f1", "f2"] and batches[0]["fixed"].affine.shape == (3, 4, 4)


def test_the_batch_itself_is_not_changed() -> None:
    evaluator = make_evaluator(2, 2)
    keys: list[set[str]] = []
    evaluator.add_event_handler(Events.ITERATION_COMPLETED, lambda e: keys.extend(set(b) for b in e.state.batch))
    evaluator.run()
    assert keys == [set(make_items(2)[0])] * 3


def test_prepare_batch() -> None:
    batch = next(iter(DataLoader(Dataset(make_items(3)), batch_size=2)))
    moving, target, args, kwargs = PreparePairBatch()(batch, "cpu", dtype=torch.float64)
    (fixed,) = args
    assert kwargs == {} and target.keys() == {"moving", "fixed"}
    assert target["moving"] is moving and target["fixed"] is fixed
    for tensor, key in ((moving, "moving"), (fixed, "fixed")):
        assert type(tensor) is torch.Tensor and tensor.dtype == torch.float64
        torch.testing.assert_close(tensor, batch[key].as_tensor().double())
    swapped, _, (other,), _ = PreparePairBatch("fixed", "moving")(batch)
    torch.testing.assert_close(swapped, batch["fixed"].as_tensor())
    torch.testing.assert_close(other, batch["moving"].as_tensor())
    start = torch.randn(2, 3, *moving.shape[2:])
    _, _, (_, ddf), _ = PreparePairBatch()({**batch, "initial_ddf": MetaTensor(start)}, dtype=torch.float64)
    assert type(ddf) is torch.Tensor and torch.equal(ddf, start.double())


@pytest.mark.parametrize("prepare", [PreparePairBatch, lambda **kwargs: PreparePooledPairBatch(StatePool(2), **kwargs)])
def test_target_has_what_else_the_loss_wants(prepare: Any) -> None:
    batch = next(iter(DataLoader(Dataset(make_items(3)), batch_size=2)))
    points = [MetaTensor(torch.rand(4, 3)), torch.rand(7, 3)]
    batch |= {"points": points, "slot": torch.arange(2), "ticket": torch.arange(2)}
    moving, target, *_ = prepare(target_keys=("fixed_label", "points"))(batch, "cpu", dtype=torch.float64)
    assert target.keys() == {"moving", "fixed", "fixed_label", "points"} and target["moving"] is moving
    assert type(target["fixed_label"]) is torch.Tensor
    torch.testing.assert_close(target["fixed_label"], batch["fixed_label"].as_tensor().double())
    for prepared, given in zip(target["points"], points, strict=True):
        assert type(prepared) is torch.Tensor and torch.equal(prepared, torch.as_tensor(given).double())
    with pytest.raises(KeyError, match=r"target_keys: the batch has no \['lung'\]"):
        prepare(target_keys=("lung",))(batch)


@pytest.mark.parametrize("ndim", [2, 3])
def test_training_inside_a_mask_with_keypoints(ndim: int) -> None:
    """The loss of the trainer is that of its parts, computed beside it."""
    items = make_items(ndim)
    for i, item in enumerate(items):
        item["points"] = torch.rand(5, ndim, generator=torch.Generator().manual_seed(i)) * 3
    network = DEQRegistrationNet(ShiftByBrightness(), max_steps=3, num_states=0, phantom_steps=1)
    registration = RegistrationLoss(ndim, 0.1, similarity=MaskedSimilarityLoss(ndim))
    trainer = SupervisedTrainer(
        device="cpu",
        max_epochs=1,
        train_data_loader=DataLoader(Dataset(items), batch_size=len(items)),
        network=network,
        optimizer=torch.optim.SGD(network.parameters(), lr=0.0),
        loss_function=KeypointSupervisedLoss(
            StatesLoss(registration, mask_key="fixed_label"), 0.2, None, "points", "points"
        ),
        prepare_batch=PreparePairBatch(target_keys=("fixed_label", "points")),
        decollate=False,
    )
    trainer.run()
    batch = next(iter(DataLoader(Dataset(items), batch_size=len(items))))
    batch = {k: torch.as_tensor(batch[k]) for k in ("moving", "fixed", "fixed_label", "points")}
    warped, ddf, _ = network.train()(batch["moving"], batch["fixed"])
    expected = registration(warped, batch["fixed"], ddf, batch["fixed_label"])
    expected = expected + 0.2 * ddf[:, 0, 0].flatten(1)[:, 0].square().mean()  # the same displacement everywhere
    assert trainer.state.output["loss"].item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("ndim", [2, 3])
def test_training_with_a_pool_goes_on_from_where_pairs_stand(ndim: int) -> None:
    images = [{key: item[key] for key in ("moving", "fixed")} for item in make_items(ndim)]
    items = [{**item, "slot": i, "ticket": i} for i, item in enumerate(images)]
    pool = StatePool(len(items))
    starts = []

    class Shift(torch.nn.Module):
        """Moves each field by a trainable amount."""

        def __init__(self) -> None:
            super().__init__()
            self.amount = torch.nn.Parameter(torch.tensor(0.25))

        def forward(self, moving: torch.Tensor, fixed: torch.Tensor, ddf: torch.Tensor) -> torch.Tensor:
            return self.amount + torch.zeros_like(ddf)

    network = DEQRegistrationNet(Shift(), max_steps=2, num_states=0, phantom_steps=1)
    # new pairs start as the network does by itself
    network.register_forward_pre_hook(lambda _, args: starts.append(args[2].mean().item() if len(args) > 2 else None))
    trainer = SupervisedTrainer(
        device="cpu",
        max_epochs=2,
        train_data_loader=DataLoader(Dataset(items), batch_size=len(items)),
        network=network,
        optimizer=torch.optim.SGD(network.parameters(), lr=0.0),
        loss_function=StatesLoss(RegistrationLoss(ndim)),
        prepare_batch=PreparePooledPairBatch(pool),
        decollate=False,
    )
    StatePoolUpdater(pool).attach(trainer)
    trainer.run()
    # two steps and a phantom step in each iteration
    assert starts == [None, pytest.approx(0.75)]
    kept = pool.get(range(len(items)), range(len(items)), torch.zeros(len(items), 1, *items[0]["fixed"].shape[1:]))
    np.testing.assert_allclose(kept, 1.5, atol=1e-6)
    with pytest.raises(KeyError, match="a pooled batch needs"):
        PreparePooledPairBatch(pool)(next(iter(DataLoader(Dataset(make_items(ndim)), batch_size=1))))


@pytest.mark.parametrize("ndim", [2, 3])
def test_new_pairs_may_start_anywhere_and_run_for_any_number_of_steps(ndim: int) -> None:
    size = (24, 20, 16)[:ndim]
    count = 60
    images = torch.zeros(count, 1, *size)
    batch = {"moving": images, "fixed": images, "slot": torch.arange(count), "ticket": torch.arange(count)}
    pool = StatePool(count)
    pool.put([0, 1], [0, 1], torch.full((2, ndim, *size), 0.5))
    prepare = PreparePooledPairBatch(pool, random_share=0.5, random_rms=2.0, random_steps=(3, 5))
    _, _, (_, ddf), settings = prepare(batch)
    # what has been met goes on from where it stood
    torch.testing.assert_close(ddf[:2], torch.full((2, ndim, *size), 0.5))
    rms = ddf[2:].square().sum(dim=1).flatten(1).mean(dim=1).sqrt()
    assert rms.max() < 2 and 0.25 < float((rms > 0).float().mean()) < 0.75
    assert 0.5 < float(rms[rms > 0].mean()) < 1.5 and len(rms.unique()) > 10
    # the start of a pair is its own: a resumed training makes the same
    torch.testing.assert_close(prepare(batch)[2][1], ddf)
    assert {prepare(batch)[3]["max_steps"] for _ in range(40)} == {3, 4, 5} and set(settings) == {"max_steps"}
    assert len(PreparePooledPairBatch(StatePool(count))(batch)[2]) == 1


@pytest.mark.parametrize("ndim", [2, 3])
def test_random_starts_depend_on_the_seed(ndim: int) -> None:
    shape, tickets = (4, 1, *(24, 20, 16)[:ndim]), [0, 1, 7, 2**20]
    batch = {key: torch.zeros(shape) for key in ("moving", "fixed")}
    batch |= {"slot": torch.arange(4), "ticket": torch.tensor(tickets)}

    def starts(**kwargs: int) -> torch.Tensor:
        return PreparePooledPairBatch(StatePool(4), random_share=1.0, random_rms=2.0, **kwargs)(batch)[2][1]

    # those of seed 0 are seeded by the ticket itself
    lengths = [float(torch.rand(2, generator=torch.Generator().manual_seed(t))[1]) for t in tickets]
    expected = [random_smooth_ddf((1, ndim, *shape[2:]), 2 * n, seed=t) for n, t in zip(lengths, tickets, strict=True)]
    assert torch.equal(starts(), torch.cat(expected)) and torch.equal(starts(seed=0), starts())
    fields = torch.cat([starts(seed=seed) for seed in (0, 1, 2, 2**31)])
    rms = fields.square().sum(dim=1).flatten(1).mean(dim=1).sqrt()
    assert len(rms.unique()) == len(rms) and torch.equal(starts(seed=1), starts(seed=1))


@pytest.mark.parametrize("ndim", [2, 3])
def test_random_starts_are_smoothed_on_the_device_of_the_images(ndim: int, smoothed_on: list[str]) -> None:
    batch = {key: torch.zeros(2, 1, *(24, 20, 16)[:ndim]) for key in ("moving", "fixed")}
    batch |= {"slot": torch.arange(2), "ticket": torch.arange(2)}
    _, _, (_, ddf), _ = PreparePooledPairBatch(StatePool(2), random_share=1.0)(batch, "meta")
    assert ddf.device.type == "meta" and smoothed_on == ["meta", "meta"]


@pytest.mark.parametrize("ndim", [2, 3])
def test_new_pairs_among_others_start_from_the_coarse_solution(ndim: int) -> None:
    class Coarse(torch.nn.Module):
        def coarse_solution(self, moving: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
            return (10 * fixed + moving).expand(-1, ndim, *fixed.shape[2:])

    size = (6, 5, 4)[:ndim]
    fixed = torch.arange(4.0).view(4, 1, *[1] * ndim).expand(4, 1, *size)
    batch = {"moving": fixed + 1, "fixed": fixed, "slot": torch.arange(4), "ticket": torch.arange(4)}
    pool = StatePool(4)
    pool.put([0, 2], [0, 2], torch.full((2, ndim, *size), 0.5))
    expected = torch.tensor([0.5, 12, 0.5, 34]).view(4, 1, *[1] * ndim).expand(4, ndim, *size)
    torch.testing.assert_close(PreparePooledPairBatch(pool, network=Coarse())(batch)[2][1], expected)
    # a network without coarser ones, and none at all
    for network in (DEQRegistrationNet(ShiftByBrightness(), num_states=0), None):
        ddf = PreparePooledPairBatch(pool, network=network)(batch)[2][1]
        assert float(ddf[1::2].abs().max()) == 0 and float(ddf[::2].min()) == 0.5
    # all of them new: the network finds its start itself
    assert len(PreparePooledPairBatch(StatePool(4), network=Coarse())(batch)[2]) == 1


@pytest.mark.parametrize("ndim", [2, 3])
def test_what_a_proximal_term_pulls_to_is_kept_with_the_pair(ndim: int) -> None:
    class Coarse(torch.nn.Module):
        proximal_weight, coarse, solved = 0.1, True, 0

        def coarse_solution(self, moving: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
            self.solved += len(fixed)
            return (2 * fixed - moving + 1.5).expand(-1, ndim, *fixed.shape[2:])

    size = (6, 5, 4)[:ndim]
    fixed = torch.arange(4.0).view(4, 1, *[1] * ndim).expand(4, 1, *size)
    batch = {"moving": fixed + 1, "fixed": fixed, "slot": torch.arange(4), "ticket": torch.arange(4)}
    pool = StatePool(4)
    pool.put([0, 2], [0, 2], torch.full((2, ndim, *size), 0.25))
    prepare = PreparePooledPairBatch(pool, network=Coarse(), random_steps=(3, 3))
    centers = torch.tensor([0.5, 1.5, 2.5, 3.5]).view(4, 1, *[1] * ndim).expand(4, ndim, *size)
    starts = torch.tensor([0.25, 1.5, 0.25, 3.5]).view(4, 1, *[1] * ndim).expand(4, ndim, *size)
    for _ in range(2):  # the second time nothing is solved
        moving, target, (_, ddf), settings = prepare(batch)
        torch.testing.assert_close(ddf, starts)
        torch.testing.assert_close(settings["proximal_center"], centers)
        torch.testing.assert_close(target["proximal_center"], centers)
        assert settings["max_steps"] == 3 and prepare.coarse_solution.__self__.solved == 4
    # another pair in a slot: solved for anew, and that pair alone
    prepare({**batch, "ticket": torch.tensor([0, 9, 2, 3])})
    assert prepare.coarse_solution.__self__.solved == 5
    # random starts begin elsewhere and are pulled to the same
    _, _, (_, ddf), settings = PreparePooledPairBatch(StatePool(4), network=Coarse(), random_share=1.0)(batch)
    assert float(ddf.abs().max()) < 3.4
    torch.testing.assert_close(settings["proximal_center"], centers)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"random_share": 1.5}, r"random_share must be in \[0, 1\], got 1.5"),
        ({"random_rms": -1.0}, "random_rms must not be negative and random_smoothness above 0, got -1.0 and 8.0"),
        ({"random_steps": (5, 3)}, r"random_steps must be the smallest and the largest number of steps, got \(5, 3\)"),
        ({"random_steps": (3,)}, "random_steps must be"),
    ],
)
def test_pooled_batches_refuse(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        PreparePooledPairBatch(StatePool(2), **options)


def test_random_steps_leave_room_for_the_intermediate_states() -> None:
    network = DEQRegistrationNet(ShiftByBrightness(), max_steps=5, num_states=3)
    images = torch.rand(2, 1, 7, 6)
    for low in (1, 3):
        with pytest.raises(ValueError, match=rf"random_steps must be above the 3 .*num_states.*got \({low}, 9\)"):
            PreparePooledPairBatch(StatePool(2), random_steps=(low, 9), network=network)
        with pytest.raises(ValueError):  # which is what such a number comes to
            network(images, images, max_steps=low)
    prepare = PreparePooledPairBatch(StatePool(2), random_steps=(4, 4), network=network)
    moving, _, args, settings = prepare(
        {"moving": images, "fixed": images, "slot": torch.arange(2), "ticket": torch.arange(2)}
    )
    assert len(network(moving, *args, **settings)[2]) == 3


@pytest.mark.parametrize("ndim", [2, 3])
def test_output_of_a_trainer(ndim: int) -> None:
    torch.manual_seed(0)
    backbone = RegistrationUNet(ndim, 2 + ndim, None, (4, 4), (4,), (4,), flow_std=0.05)
    network = DEQRegistrationNet(UNetUpdate(ndim, backbone), max_steps=3, num_states=1)
    loss = StatesLoss(RegistrationLoss(ndim))
    outputs: list[dict[str, Any]] = []
    trainer = SupervisedTrainer(
        device="cpu",
        max_epochs=1,
        train_data_loader=DataLoader(Dataset(make_items(ndim)[:2]), batch_size=2),
        network=network,
        optimizer=torch.optim.SGD(network.parameters(), lr=0.0),
        loss_function=loss,
        prepare_batch=PreparePairBatch(),
        decollate=False,
    )
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda e: outputs.append(e.state.output))
    trainer.run()
    (output,) = outputs
    items = make_items(ndim)[:2]
    moving, fixed = (torch.stack([item[key].as_tensor() for item in items]) for key in ("moving", "fixed"))
    torch.testing.assert_close(output["image"], moving)
    torch.testing.assert_close(output["label"]["fixed"], fixed)
    warped, ddf, states = output["pred"]
    assert warped.shape == moving.shape and ddf.shape == (2, ndim, *SIZES[ndim]) and len(states) == 1
    # the learning rate is zero: the same network gives the same loss
    expected = loss(network.train()(moving, fixed), {"moving": moving, "fixed": fixed})
    assert output["loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert any(parameter.grad.abs().max() > 0 for parameter in network.parameters())
