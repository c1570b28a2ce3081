# SPDX-License-Identifier: Apache-2.0
"""TrainingCheckpoint and WeightsLoader on real, tiny trainings: resuming is as good as never having stopped."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ignite.engine import Engine, Events
from ignite.handlers import EMAHandler
from ignite.metrics import Metric
from monai.data import DataLoader
from monai.engines import SupervisedTrainer
from monai.handlers import LrScheduleHandler, ValidationHandler
from nets import Pull, deq_net

from monai_deq.data import PairDataset, RandomPairSampler
from monai_deq.engines import PreparePairBatch, RegistrationEvaluator
from monai_deq.handlers import (
    EpochMeanLoss,
    GradientClipping,
    MetricHandler,
    SamplerEpochSetter,
    TrainingCheckpoint,
    WeightsLoader,
)
from monai_deq.inferers import FixedPointInferer
from monai_deq.losses import RegistrationLoss, StatesLoss
from monai_deq.metrics import LabelDiceMetric
from monai_deq.networks import NetworkRecord, describe, load_network, read_record
from monai_deq.networks.blocks import RegistrationCNN, UNetUpdate
from monai_deq.networks.nets import DEQRegistrationNet, coarse_to_fine
from monai_deq.transforms import WarpByDDFd

SIZES = {2: (8, 6), 3: (4, 6, 4)}
ITERATIONS = 2  # an epoch


class ScriptedScore(Metric):
    """A validation score read from a list, by epoch."""

    def __init__(self, scores: Sequence[float]) -> None:
        self.scores = scores
        self.epoch = 0
        super().__init__()

    def reset(self) -> None: ...

    def update(self, output: Any) -> None: ...

    def compute(self) -> float:
        return self.scores[self.epoch - 1]

    def attach(self, engine: Engine, name: str) -> None:  # type: ignore[override]
        engine.add_event_handler(Events.EPOCH_STARTED, lambda e: setattr(self, "epoch", e.state.epoch))
        super().attach(engine, name)


def drop(module: torch.nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    return (F.dropout(args[0], 0.2, module.training),)


def make_network(ndim: int, channels: int = 4, **kwargs: Any) -> DEQRegistrationNet:
    backbone = RegistrationCNN(ndim, 2 + ndim, channels=(channels,), flow_std=0.1)
    # dropout draws from the global random state, which a resumed training must find as it was
    backbone.register_forward_pre_hook(drop)
    return deq_net(UNetUpdate(ndim, backbone), max_steps=2, num_states=1, **kwargs)


def make_subjects(ndim: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(5)
    images = torch.rand((4, 1, *SIZES[ndim]), generator=generator)
    return [{"subject": str(i), "image": image, "label": (image > 0.5).float()} for i, image in enumerate(images)]


class Training:
    """The training of the bundle, in small; ``losses`` and ``scores`` are what it went through."""

    def __init__(
        self,
        folder: Path,
        max_epochs: int = 4,
        ndim: int = 2,
        seed: int = 0,
        scores: Sequence[float] | None = None,
        pairs_per_epoch: int = 2 * ITERATIONS,
        channels: int = 4,
        interval: int = 1,
        validate: bool = True,
        amp: bool = False,
        decay_power: float | None = None,
        ema: bool = False,
        **kwargs: Any,
    ) -> None:
        torch.manual_seed(seed)
        self.network = kwargs.pop("network", None) or make_network(ndim, channels)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=0.01)
        scheduler: Any = torch.optim.lr_scheduler.StepLR(self.optimizer, 1, 0.7)
        if decay_power is not None:
            scheduler = torch.optim.lr_scheduler.PolynomialLR(self.optimizer, max_epochs, decay_power)
        subjects = make_subjects(ndim)
        sampler = RandomPairSampler(len(subjects), pairs_per_epoch, seed=3)
        metric = MetricHandler(LabelDiceMetric([1]), ["warped_label", "fixed_label", "moving_label"])
        average = EMAHandler(self.network, momentum=0.3) if ema else None
        self.validator = RegistrationEvaluator(
            device="cpu",
            val_data_loader=DataLoader(PairDataset(subjects, "cyclic"), batch_size=2),
            network=average.ema_model if average else self.network,
            inferer=FixedPointInferer(),
            prepare_batch=PreparePairBatch(),
            postprocessing=WarpByDDFd("moving_label", output_keys="warped_label", mode="nearest"),
            key_val_metric={"score": metric if scores is None else ScriptedScore(scores)},
        )
        self.checkpoint = TrainingCheckpoint(
            folder,
            self.network,
            {"optimizer": self.optimizer, "lr_scheduler": scheduler},
            self.validator if validate else None,
            averaged=average.ema_model if average else None,
            **kwargs,
        )
        self.trainer = SupervisedTrainer(
            device="cpu",
            max_epochs=max_epochs,
            train_data_loader=DataLoader(PairDataset(subjects, label_key=None), sampler=sampler, batch_size=2),
            network=self.network,
            optimizer=self.optimizer,
            loss_function=StatesLoss(RegistrationLoss(ndim)),
            prepare_batch=PreparePairBatch(),
            decollate=False,
            amp=amp,
            train_handlers=[
                SamplerEpochSetter(sampler),
                EpochMeanLoss(),
                GradientClipping(self.network, 1.0),
                LrScheduleHandler(scheduler, print_lr=False),
                *([ValidationHandler(interval, self.validator)] if validate else []),
                self.checkpoint,
            ],
        )
        if average:
            average.attach(self.trainer, event=Events.ITERATION_COMPLETED)
        self.averaged = average and average.ema_model
        self.losses: list[float] = []
        self.scores: list[tuple[int, float]] = []
        self.means: list[float] = []
        self.trainer.add_event_handler(
            Events.ITERATION_COMPLETED, lambda e: self.losses.append(e.state.output["loss"].item())
        )
        self.trainer.add_event_handler(
            Events.EPOCH_COMPLETED, lambda e: self.means.append(e.state.metrics["train_loss"])
        )
        self.validator.add_event_handler(
            Events.COMPLETED, lambda e: self.scores.append((e.state.epoch, e.state.metrics["score"]))
        )

    def run(self) -> Training:
        self.trainer.run()
        return self

    def break_down_at(self, iteration: int) -> Training:
        """Run until something fails in the middle of an epoch."""

        def fail(engine: Engine) -> None:
            raise ConnectionError("the node is gone")

        self.trainer.add_event_handler(Events.ITERATION_STARTED(once=iteration), fail)
        with pytest.raises(ConnectionError):
            self.trainer.run()
        return self


def load(path: Path) -> Any:
    return torch.load(path, weights_only=True)


def assert_same(a: Any, b: Any) -> None:
    """Two state dicts, down to the last bit."""
    assert a.keys() == b.keys()
    for key, value in a.items():
        if isinstance(value, dict):
            assert_same(value, b[key])
        elif isinstance(value, torch.Tensor):
            assert torch.equal(value, b[key]), key
        else:
            assert value == b[key], key


def best_of(folder: Path) -> tuple[int, float]:
    training = load(folder / "last.pt")["training"]
    return training["best_epoch"], training["best_metric"]


def files(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()} - {".lock"} if folder.is_dir() else set()


def test_same_seed_same_losses(tmp_path: Path) -> None:
    first, again, other = (
        Training(tmp_path / name, 2, seed=seed).run() for name, seed in [("a", 0), ("b", 0), ("c", 1)]
    )
    assert len(first.losses) == 2 * ITERATIONS
    assert first.losses == again.losses != other.losses
    assert first.scores == again.scores
    assert_same(load(tmp_path / "a" / "last.pt"), load(tmp_path / "b" / "last.pt"))
    assert first.means == pytest.approx([sum(first.losses[:2]) / 2, sum(first.losses[2:]) / 2])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Training, Path]]:
    """Trainings of four epochs that nothing has stopped."""
    folders = {ndim: tmp_path_factory.mktemp("whole") for ndim in (2, 3)}
    return {ndim: (Training(folder, 4, ndim).run(), folder) for ndim, folder in folders.items()}


@pytest.mark.parametrize(
    ("ndim", "how"),
    [
        (2, "clean stop"),
        (2, "break-down"),
        (3, "break-down"),
        (2, "break-down in the first iteration"),
        (2, "twice"),
    ],
)
def test_resuming_is_as_good_as_never_having_stopped(
    tmp_path: Path, whole: dict[int, tuple[Training, Path]], ndim: int, how: str
) -> None:
    expected, folder = whole[ndim]
    if how == "clean stop":
        Training(tmp_path, 2, ndim).run()
    elif how == "break-down in the first iteration":
        Training(tmp_path, 4, ndim).break_down_at(2 * ITERATIONS + 1)
    else:
        Training(tmp_path, 4, ndim).break_down_at(2 * ITERATIONS + 2)
    if how == "twice":
        Training(tmp_path, 4, ndim, seed=98, resume=True).break_down_at(3 * ITERATIONS + 2)
    # other initial weights: all that counts comes out of the checkpoint
    resumed = Training(tmp_path, 4, ndim, seed=99, resume=True).run()
    epochs = 1 if how == "twice" else 2
    assert len(resumed.losses) == epochs * ITERATIONS
    assert resumed.losses == expected.losses[-epochs * ITERATIONS :]
    assert resumed.scores == expected.scores[-epochs:]
    for name in ("last.pt", "model.pt"):
        assert_same(load(tmp_path / name), load(folder / name))
    assert (tmp_path / "model.json").read_bytes() == (folder / "model.json").read_bytes()
    assert resumed.trainer.state.iteration == 4 * ITERATIONS


def test_what_the_files_hold(whole: dict[int, tuple[Training, Path]]) -> None:
    training, folder = whole[2]
    assert files(folder) == {"last.pt", "model.pt", "model.json"}
    last = load(folder / "last.pt")
    assert set(last) == {"network", "averaged", "optimizer", "lr_scheduler", "training", "scaler"}
    assert last["averaged"] == last["scaler"] == {} and last["training"]["epoch"] == 4
    assert_same(last["network"], training.network.state_dict())
    best_epoch, best = best_of(folder)
    assert (best_epoch, pytest.approx(best)) == max(training.scores, key=lambda score: score[1])
    record = read_record(folder / "model.pt")
    assert record == NetworkRecord(
        describe(training.network), training={"training_pairs": best_epoch * 4, "epoch": best_epoch}
    )
    # the network of the record with the best weights scores what the best one did
    evaluator = training.validator
    evaluator.network = load_network(folder / "model.pt")
    evaluator.network.update.backbone.register_forward_pre_hook(drop)
    evaluator.network.solver = training.network.solver
    evaluator.run()
    assert evaluator.state.metrics["score"] == pytest.approx(best)


def test_resume_before_the_first_checkpoint_starts_from_the_beginning(tmp_path: Path) -> None:
    whole = Training(tmp_path / "whole", 2).run()
    Training(tmp_path / "part", 2).break_down_at(1)
    assert files(tmp_path / "part") == set()
    assert Training(tmp_path / "part", 2, resume=True).run().losses == whole.losses


def test_best_weights_survive_a_resume(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    scores = (0.5, 0.8, 0.7, 0.6, 0.9, 0.9)
    states: list[dict[str, torch.Tensor]] = []

    def run(max_epochs: int, **kwargs: Any) -> None:
        training = Training(tmp_path, max_epochs, scores=scores, record={"steps": 3}, **kwargs)
        training.trainer.add_event_handler(
            Events.EPOCH_COMPLETED,
            lambda e: states.append({k: v.clone() for k, v in training.network.state_dict().items()}),
        )
        training.run()

    def best() -> tuple[int, float]:
        assert files(tmp_path) == {"last.pt", "model.pt", "model.json"}
        epoch, metric = best_of(tmp_path)
        assert_same(load(tmp_path / "model.pt"), states[epoch - 1])
        record = read_record(tmp_path / "model.pt")
        assert record.steps == 3 and record.training == {"training_pairs": epoch * 4, "epoch": epoch}
        assert_same(load(tmp_path / "last.pt")["network"], states[-1])
        return epoch, metric

    run(2)
    assert best() == (2, 0.8)
    # both epochs are worse than the best before the interruption
    run(4, resume=True)
    assert best() == (2, 0.8)
    run(6, resume=True)
    assert best() == (5, 0.9)
    caplog.set_level(logging.WARNING, "monai_deq")
    run(6, resume=True)
    assert best() == (5, 0.9) and "nothing left to train" in caplog.text


def test_best_weights_that_were_moved_away_are_counted_anew(tmp_path: Path) -> None:
    scores = (0.9, 0.3, 0.4)
    Training(tmp_path, 1, scores=scores).run()
    (tmp_path / "model.pt").unlink()
    Training(tmp_path, 2, scores=scores, resume=True).run()
    assert best_of(tmp_path)[1] == 0.3 and (tmp_path / "model.pt").is_file()


def test_validation_every_second_epoch(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    scores = (9.0, 0.5, 9.0, 0.4)
    training = Training(tmp_path, 1, scores=scores, interval=2).run()
    assert files(tmp_path) == {"last.pt"} and training.scores == []
    assert "model.pt was not written, as no epoch was validated" in caplog.text
    caplog.clear()
    Training(tmp_path, 4, scores=scores, interval=2, resume=True).run()
    assert "was not written" not in caplog.text
    assert best_of(tmp_path)[0] == 2 and read_record(tmp_path / "model.pt").training["epoch"] == 2


def test_without_a_validator_the_last_epoch_is_the_best(tmp_path: Path) -> None:
    training = Training(tmp_path, 2, validate=False).run()
    assert_same(load(tmp_path / "model.pt"), training.network.state_dict())
    assert read_record(tmp_path / "model.pt").training == {"training_pairs": 8, "epoch": 2}
    resumed = Training(tmp_path, 3, validate=False, seed=9, resume=True).run()
    assert len(resumed.losses) == ITERATIONS and read_record(tmp_path / "model.pt").training["epoch"] == 3


@pytest.mark.parametrize("settings", [{}, {"overwrite": True}, {"resume": True}])
def test_a_folder_that_cannot_be_written_to(tmp_path: Path, settings: dict[str, bool]) -> None:
    (tmp_path / "models").write_text("precious")
    training = Training(tmp_path / "models", 1, **settings)
    with pytest.raises(FileExistsError, match="cannot write to the folder .*models is there and is no folder"):
        training.run()
    assert training.losses == [] and (tmp_path / "models").read_text() == "precious"


@pytest.mark.parametrize("name", ["last.pt", "model.pt"])
def test_existing_checkpoint_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("precious")
    training = Training(tmp_path, 1, overwrite=False)
    with pytest.raises(FileExistsError, match=rf"{name}.*--overwrite true") as error:
        training.run()
    assert ("--resume true" in str(error.value)) == (name == "last.pt")
    assert training.losses == [] and files(tmp_path) == {name} and (tmp_path / name).read_text() == "precious"
    assert len(Training(tmp_path, 1, overwrite=True).run().losses) == ITERATIONS
    assert_same(load(tmp_path / "last.pt")["network"], load(tmp_path / "model.pt"))


def test_resume_without_a_last_checkpoint_does_not_touch_finished_weights(tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_text("precious")
    with pytest.raises(FileExistsError, match=r"model.pt.*no last.pt beside it to resume from"):
        Training(tmp_path, 1, resume=True).run()
    assert (tmp_path / "model.pt").read_text() == "precious"


def test_overwrite_starts_from_the_beginning(tmp_path: Path) -> None:
    first = Training(tmp_path, 2, scores=(0.1, 0.9)).run()
    again = Training(tmp_path, 1, scores=(0.2,), overwrite=True).run()
    assert again.losses == first.losses[:ITERATIONS]
    assert best_of(tmp_path)[1] == 0.2 and read_record(tmp_path / "model.pt").training["epoch"] == 1


def test_pairs_are_counted_up_to_the_weights_that_are_kept(tmp_path: Path) -> None:
    def run(folder: str, *args: Any, **kwargs: Any) -> int:
        Training(tmp_path / folder, *args, **kwargs).run()
        return read_record(tmp_path / folder / "model.pt").training["training_pairs"]

    # two batches of two pairs an epoch; the second of three epochs is the best
    assert run("a", 3, scores=(0.1, 0.9, 0.2)) == 2 * 4
    weights = tmp_path / "a" / "model.pt"
    assert run("b", 1, scores=(0.1, 0.2, 0.3), weights=weights) == 8 + 4
    assert run("c", 1, scores=(0.1,), weights=tmp_path / "a" / "last.pt") == 3 * 4 + 4
    # a resumed training knows what it started from
    assert run("b", 2, scores=(0.1, 0.2, 0.3), resume=True) == 8 + 2 * 4
    # nothing is known of weights without a record
    weights.with_suffix(".json").unlink()
    assert run("d", 1, scores=(0.1,), weights=weights) == 4
    # those of version 0.1.0 say it in theirs
    weights.with_suffix(".json").write_text('{"max_steps": 2, "training_pairs": 100}')
    assert run("e", 1, scores=(0.1,), weights=weights) == 100 + 4


def test_pairs_of_all_processes_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("monai_deq.handlers.checkpoints.process_count", lambda: 3)
    Training(tmp_path, 1).run()
    assert read_record(tmp_path / "model.pt").training["training_pairs"] == 3 * 4


def test_start_from_weights(tmp_path: Path) -> None:
    source = Training(tmp_path / "a", 1, seed=4).run()
    for name in ("model.pt", "last.pt"):
        training = Training(tmp_path / name, 1, seed=5, weights=tmp_path / "a" / name)
        training.trainer.add_event_handler(
            Events.EPOCH_STARTED,
            lambda e: assert_same(e.network.state_dict(), source.network.state_dict()),  # type: ignore[attr-defined]
        )
        training.run()
        assert training.trainer.state.epoch == 1
    # a resumed training goes on from its own
    resumed = Training(tmp_path / "last.pt", 1, weights=tmp_path / "a" / "model.pt", resume=True).run()
    assert_same(resumed.network.state_dict(), load(tmp_path / "last.pt" / "last.pt")["network"])
    with pytest.raises(FileNotFoundError, match="nothing.pt"):
        Training(tmp_path / "b", 1, weights=tmp_path / "nothing.pt").run()


def fail_in_call(function: Callable[..., Any], number: int) -> Callable[..., Any]:
    calls = []

    def failing(obj: Any, file: Any, **kwargs: Any) -> None:
        calls.append(file)
        if len(calls) == number:
            file.write(b"half of a check")
            raise OSError("no space left on device")
        function(obj, file, **kwargs)

    return failing


@pytest.mark.parametrize("number", [1, 2])
def test_files_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    scores = (0.1, 0.2, 0.3)
    whole = Training(tmp_path / "whole", 3, scores=scores).run()
    folder = tmp_path / "part"
    Training(folder, 1, scores=scores).run()
    last = load(folder / "last.pt")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", fail_in_call(torch.save, number))
        with pytest.raises(OSError, match="no space left"):
            Training(folder, 3, scores=scores, resume=True).run()
    assert files(folder) == {"last.pt", "model.pt", "model.json"}
    assert_same(load(folder / "last.pt"), last)
    load(folder / "model.pt")
    resumed = Training(folder, 3, scores=scores, resume=True).run()
    assert resumed.losses == whole.losses[ITERATIONS:]
    assert_same(load(folder / "model.pt"), load(tmp_path / "whole" / "model.pt"))


class Killed(BaseException):
    """Nothing but the test catches it: as little is cleaned up as after a kill."""


@pytest.mark.parametrize("number", [*range(1, 7)])
def test_a_kill_between_two_files_can_be_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    scores = (0.1, 0.2)
    whole = Training(tmp_path / "whole", 2, scores=scores).run()
    folder, replaced = tmp_path / "part", []
    replace_whole = os.replace

    def killed(source: Any, target: Any) -> None:  # of model.pt, its record, last.pt, and the names of the first two
        replaced.append(target)
        if len(replaced) == number:
            raise Killed
        replace_whole(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(Killed):
            Training(folder, 2, scores=scores).run()
    # as a requeue does, whatever is there
    done = len(scores) if (folder / "last.pt").is_file() else 0
    resumed = Training(folder, 2, scores=scores, resume=True).run()
    assert resumed.losses == whole.losses[ITERATIONS * min(done, 1) :]
    for name in ("last.pt", "model.pt"):
        assert_same(load(folder / name), load(tmp_path / "whole" / name))
    assert (folder / "model.json").read_text() == (tmp_path / "whole" / "model.json").read_text()
    assert files(folder) == {"last.pt", "model.pt", "model.json"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("iteration", [1, ITERATIONS + 1, ITERATIONS])
@pytest.mark.parametrize("validate", [True, False])
def test_a_signal_in_the_middle_of_an_epoch(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, number: signal.Signals, iteration: int, validate: bool
) -> None:
    scores = (0.1, 0.3, 0.2) if validate else None
    whole = Training(tmp_path / "whole", 3, scores=scores, validate=validate).run()
    folder, before = tmp_path / "part", signal.getsignal(number)
    part = Training(folder, 3, scores=scores, validate=validate)
    part.trainer.add_event_handler(Events.ITERATION_COMPLETED(once=iteration), lambda: os.kill(os.getpid(), number))
    with pytest.raises(SystemExit) as end:
        part.run()
    assert end.value.code == 128 + number and signal.getsignal(number) is before
    assert f"stopped by {number.name}" in caplog.text and "--resume true" in caplog.text
    assert part.losses == whole.losses[:iteration] and not (folder / ".lock").exists()
    resumed = Training(folder, 3, scores=scores, validate=validate, resume=True).run()
    assert resumed.losses == whole.losses[iteration:]
    ours, theirs = load(folder / "last.pt"), load(tmp_path / "whole" / "last.pt")
    if not validate:  # NaN
        del ours["training"]["best_metric"], theirs["training"]["best_metric"]
    assert_same(ours, theirs)
    assert_same(load(folder / "model.pt"), load(tmp_path / "whole" / "model.pt"))
    assert (folder / "model.json").read_text() == (tmp_path / "whole" / "model.json").read_text()


def test_overwriting_leaves_nothing_to_resume_by_mistake(tmp_path: Path) -> None:
    Training(tmp_path, 1).run()
    training = Training(tmp_path, 1, overwrite=True)
    training.checkpoint.started(training.trainer)
    assert files(tmp_path) == {"model.pt", "model.json"}


def test_one_training_a_folder(tmp_path: Path) -> None:
    program = (
        "import sys, fcntl; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); f.write('process 7 on h'); "
    )
    program += "f.flush(); print('locked', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", program, str(tmp_path / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"locked\n"
        with pytest.raises(RuntimeError, match=rf"another training works in the folder {tmp_path}: process 7 on h"):
            Training(tmp_path, 1).run()
        other.kill()
    Training(tmp_path, 1).run()
    assert {p.name for p in tmp_path.iterdir()} == {"last.pt", "model.pt", "model.json"}


def test_resume_with_other_settings_is_refused(tmp_path: Path) -> None:
    Training(tmp_path, 1).run()
    before = load(tmp_path / "last.pt")
    training = Training(tmp_path, 2, seed=1, pairs_per_epoch=8, resume=True)
    weights = {k: v.clone() for k, v in training.network.state_dict().items()}
    with pytest.raises(ValueError, match=r"last.pt was trained with 2 iterations.*this run has 4.*pairs_per_epoch"):
        training.run()
    assert_same(training.network.state_dict(), weights)
    for other in ({"ndim": 3}, {"channels": 6}):
        with pytest.raises(ValueError, match=r"last.pt is of another architecture than DEQRegistrationNet"):
            Training(tmp_path, 2, resume=True, **other).run()
    assert_same(load(tmp_path / "last.pt"), before)


def test_resume_with_other_numbers_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    record = {"training": {"smoothness_weight": 0.1}, "preprocessing": {"window": (0, 1)}, "spatial_size": (8, 6)}
    Training(tmp_path, 1, record=record).run()
    Training(tmp_path, 2, record=record, resume=True).run()
    assert "other settings" not in caplog.text
    other = {**record, "training": {"smoothness_weight": 0.2}, "steps": 96}
    Training(tmp_path, 3, record=other, network=make_network(2, relaxation=0.5), resume=True).run()
    words = "begun with other settings: network.rest.relaxation 1.0 (now 0.5), steps 48 (now 96), "
    assert words + "training.smoothness_weight 0.1 (now 0.2)." in caplog.text


def test_resume_at_the_end_of_the_schedule_is_refused(tmp_path: Path) -> None:
    Training(tmp_path, 1).run()
    checkpoint = load(tmp_path / "last.pt")
    checkpoint["optimizer"]["param_groups"][0]["lr"] = 0.0  # as of PolynomialLR after its last epoch
    torch.save(checkpoint, tmp_path / "last.pt")
    with pytest.raises(ValueError, match=r"its schedule has ended at a learning rate of 0\. .* --weights"):
        Training(tmp_path, 2, resume=True).run()
    assert not Training(tmp_path, 1, resume=True).run().losses


@pytest.mark.parametrize("max_epochs", [3, 6])
def test_resume_in_the_middle_of_a_schedule_keeps_its_length(tmp_path: Path, max_epochs: int) -> None:
    Training(tmp_path, 4, decay_power=0.9).break_down_at(2 * ITERATIONS + 1)
    before = load(tmp_path / "last.pt")
    with pytest.raises(ValueError, match=rf"lr_scheduler has total_iters 4, this run {max_epochs}\. .*max_epochs"):
        Training(tmp_path, max_epochs, decay_power=0.9, resume=True).run()
    assert_same(load(tmp_path / "last.pt"), before)
    resumed = Training(tmp_path, 4, decay_power=0.9, resume=True)
    rates: list[float] = []
    resumed.trainer.add_event_handler(
        Events.EPOCH_STARTED, lambda e: rates.append(resumed.optimizer.param_groups[0]["lr"])
    )
    resumed.run()
    assert rates == pytest.approx([0.01 * 0.5**0.9, 0.01 * 0.25**0.9])


def test_resume_for_longer_where_the_learning_rate_does_not_decay(tmp_path: Path) -> None:
    Training(tmp_path, 2, decay_power=0.0).run()
    resumed = Training(tmp_path, 3, decay_power=0.0, resume=True).run()
    assert len(resumed.losses) == ITERATIONS and resumed.optimizer.param_groups[0]["lr"] == 0.01


def test_damaged_or_foreign_checkpoint_is_refused(tmp_path: Path) -> None:
    Training(tmp_path, 1).run()
    last = tmp_path / "last.pt"
    checkpoint = load(last)
    for absent in ("network", "averaged", "optimizer", "lr_scheduler", "training", "scaler"):
        torch.save({k: v for k, v in checkpoint.items() if k != absent}, last)
        with pytest.raises(ValueError, match=rf"last.pt cannot be resumed from: it has no \['{absent}'\]"):
            Training(tmp_path, 2, resume=True).run()
    for name, content in (("training", None), ("optimizer", 3), ("lr_scheduler", "banana"), ("network", [])):
        torch.save({**checkpoint, name: content}, last)
        with pytest.raises(ValueError, match=r"last.pt (cannot be resumed from: a part|is of another arch)"):
            Training(tmp_path, 2, resume=True).run()
    last.write_bytes(last.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"last.pt is not a readable checkpoint"):
        Training(tmp_path, 2, resume=True).run()


def test_gradient_scaler_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def use(**kwargs: Any) -> None:
        """The trainer makes its scaler when it starts; give it one that works on a CPU."""
        monkeypatch.setattr(torch.cuda.amp, "GradScaler", lambda: torch.amp.GradScaler("cpu", **kwargs))

    use(init_scale=512.0, growth_interval=ITERATIONS + 1)
    whole = Training(tmp_path / "whole", 2, amp=True).run()
    assert whole.trainer.scaler.get_scale() == 1024.0  # once doubled, in the second epoch
    Training(tmp_path / "part", 1, amp=True).run()
    use(init_scale=2.0)
    resumed = Training(tmp_path / "part", 2, amp=True, resume=True).run()
    assert resumed.trainer.scaler.get_scale() == 1024.0 and resumed.losses == whole.losses[ITERATIONS:]
    # trained on a GPU, resumed without one
    use(enabled=False)
    Training(tmp_path / "part", 3, amp=True, resume=True).run()
    Training(tmp_path / "part", 4, resume=True).run()


@pytest.mark.parametrize("validate", [True, False])
def test_running_mean_of_the_weights(tmp_path: Path, validate: bool) -> None:
    whole = Training(tmp_path / "whole", 2, ema=True, validate=validate).run()
    last, best = load(tmp_path / "whole" / "last.pt"), load(tmp_path / "whole" / "model.pt")
    assert_same(last["averaged"], whole.averaged.state_dict())
    assert not torch.equal(*(next(iter(state.values())) for state in (last["averaged"], last["network"])))
    if not validate:
        assert_same(best, last["averaged"])
    Training(tmp_path / "part", 1, ema=True, validate=validate).run()
    resumed = Training(tmp_path / "part", 2, seed=7, ema=True, validate=validate, resume=True).run()
    assert resumed.losses == whole.losses[ITERATIONS:] and resumed.scores == whole.scores[1:]
    assert_same(load(tmp_path / "part" / "last.pt")["averaged"], last["averaged"])
    assert_same(load(tmp_path / "part" / "model.pt"), best)


def test_running_mean_that_starts_later(tmp_path: Path) -> None:
    Training(tmp_path / "resumed", 1, validate=False).run()
    state = load(tmp_path / "resumed" / "last.pt")["network"]
    torch.save(state, tmp_path / "weights.pt")
    for name, epoch, arguments in (("resumed", 2, {"resume": True}), ("anew", 1, {"weights": tmp_path / "weights.pt"})):
        training = Training(tmp_path / name, 2, seed=7, ema=True, validate=False, **arguments)
        training.trainer.add_event_handler(
            Events.EPOCH_STARTED(once=epoch), lambda e, mean=training.averaged: assert_same(mean.state_dict(), state)
        )
        training.run()


def test_bad_arguments(tmp_path: Path) -> None:
    network = make_network(2)
    with pytest.raises(ValueError, match="exclude each other"):
        TrainingCheckpoint(tmp_path, network, resume=True, overwrite=True)
    for name in ("network", "averaged", "scaler", "training"):
        with pytest.raises(ValueError, match=rf"objects must not be called \['{name}'\]"):
            TrainingCheckpoint(tmp_path, network, {name: torch.optim.SGD(network.parameters())})
    with pytest.raises(TypeError, match="JSON knows no function"):
        TrainingCheckpoint(tmp_path, network, record={"training": {"size": make_network}})
    with pytest.raises(TypeError, match="unexpected keyword argument 'epochs'"):
        TrainingCheckpoint(tmp_path, network, record={"epochs": 3})


class Own(torch.nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function


@pytest.mark.parametrize(
    ("update", "words"), [(Pull(), r"the record names '.*Pull'"), (Own(drop), "JSON knows no function")]
)
def test_a_network_of_ones_own_has_no_description(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, update: torch.nn.Module, words: str
) -> None:
    checkpoint = TrainingCheckpoint(tmp_path, deq_net(update), record={"method": "own"})
    assert checkpoint.record == NetworkRecord(None, "own")
    assert caplog.records[-1].levelname == "WARNING"
    message = caplog.records[-1].getMessage()
    assert re.match("the record of the weights will not have their network: " + words, message), message


def test_coarser_networks_that_nothing_has_trained_are_refused(tmp_path: Path) -> None:
    def network() -> DEQRegistrationNet:
        return coarse_to_fine(make_network(2), 2, 3)

    with pytest.raises(ValueError, match="coarser_levels needs the coarser networks trained: give --coarse_weights"):
        Training(tmp_path, 1, network=network()).run()
    assert files(tmp_path) == set()
    half = Training(tmp_path / "half", 1).run()
    coarse = tmp_path / "half" / "model.pt"
    finest = coarse_to_fine(make_network(2), 2, 3, weights=coarse)
    training = Training(tmp_path / "full", 1, network=finest, coarse_weights=coarse).run()
    for name, value in half.network.update.state_dict().items():
        assert torch.equal(training.network.coarse.update.state_dict()[name], value)
    loaded = load_network(tmp_path / "full" / "model.pt")
    assert_same(loaded.state_dict(), load(tmp_path / "full" / "model.pt"))
    assert loaded.coarse.solver.max_steps == 3
    # it goes on without them being named again, and others begin with the weights of all
    Training(tmp_path / "full", 2, network=network(), resume=True).run()
    weights = tmp_path / "full" / "model.pt"
    again = Training(tmp_path / "again", 1, network=network(), weights=weights).run()
    assert_same(again.network.coarse.state_dict(), training.network.coarse.state_dict())
    # where both are named each gives what it is for
    other = Training(tmp_path / "other", 1, seed=8).run()
    finest = coarse_to_fine(make_network(2), 2, 3, weights=tmp_path / "other" / "model.pt")
    both = {"weights": weights, "coarse_weights": tmp_path / "other" / "model.pt"}
    mixed = Training(tmp_path / "mixed", 0, network=finest, **both)
    mixed.checkpoint.started(mixed.trainer)
    assert_same(mixed.network.coarse.update.state_dict(), other.network.update.state_dict())
    expected = {k.removeprefix("update."): v for k, v in load(weights).items() if k.startswith("update.")}
    assert_same(mixed.network.update.state_dict(), expected)


def test_weights_loader(tmp_path: Path) -> None:
    source, target = make_network(2), make_network(2)
    torch.save(source.state_dict(), tmp_path / "model.pt")
    engine = Engine(lambda engine, batch: None)
    WeightsLoader(target, tmp_path / "model.pt").attach(engine)
    with pytest.raises(AssertionError):
        assert_same(target.state_dict(), source.state_dict())
    engine.run([0])
    assert_same(target.state_dict(), source.state_dict())
    for network, path, error, message in [
        (make_network(3), "model.pt", ValueError, r"model.pt is of another architecture"),
        (target, "absent.pt", FileNotFoundError, r"absent.pt"),
    ]:
        engine = Engine(lambda engine, batch: None)
        WeightsLoader(network, str(tmp_path / path)).attach(engine)
        with pytest.raises(error, match=message):
            engine.run([0])


def test_record_is_read_back(tmp_path: Path) -> None:
    record = {
        "method": "own",
        "spatial_size": torch.Size([8, 6]),
        "steps": 5,
        "preprocessing": {"window": (0.0, 1.0)},
        "training": {"smoothness_weight": 0.1, "nothing": None},
    }
    Training(tmp_path, 1, record=record).run()
    assert read_record(tmp_path / "model.pt") == NetworkRecord(
        describe(make_network(2)),
        "own",
        [8, 6],
        5,
        {"window": [0.0, 1.0]},
        {"smoothness_weight": 0.1, "nothing": None, "training_pairs": 4, "epoch": 1},
    )
    # of the last epoch too
    assert read_record(tmp_path / "last.pt") == read_record(tmp_path / "model.pt")


def test_processes_that_see_different_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("monai_deq.handlers.checkpoints.gather_items", lambda items: [*items, not items[0]])
    with pytest.raises(FileNotFoundError, match=r"last\.pt is seen by some of the processes alone: name a --ckpt_dir"):
        Training(tmp_path, 1).run()


def test_other_processes_write_nothing_of_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("monai_deq.handlers.checkpoints.process_rank", lambda: 1)
    Training(tmp_path, 1).run()
    assert not (tmp_path / "model.json").exists()
