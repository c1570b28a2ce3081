# SPDX-License-Identifier: Apache-2.0
"""Experiment tracking by MONAI's ``--tracking mlflow``, whose settings name the parts of a configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Events
from monai.bundle.utils import DEFAULT_HANDLERS_ID, DEFAULT_MLFLOW_SETTINGS
from shell import as_before, configs, parse, workflow

TRAIN = configs("oasis", "train", "slices.json")
TINY: dict[str, Any] = {
    "max_epochs": 2,
    "pairs_per_epoch": 2,
    "max_steps": 2,
    "val_steps": 2,
    "batch_size": 1,
    "split_sizes": [2, 2, 3],
}


@pytest.mark.parametrize("bundle", ["oasis", "nlst"])
def test_the_parts_have_the_names_that_monai_looks_for(bundle: str) -> None:
    for name, parts in {
        "train": ("trainer", "validator"),
        "evaluate": ("evaluator",),
        "inference": ("evaluator",),
    }.items():
        parser = parse(configs(bundle, name))
        for part in parts:
            ids = DEFAULT_HANDLERS_ID[part]
            assert isinstance(parser.get(ids["id"]), dict)
            # of a part without a list of handlers MONAI sets the argument itself
            listed = parser.get(ids["handlers"])
            assert isinstance(listed, list) or (listed is None and "val_handlers" not in parser.get(ids["id"]))


def test_the_loss_is_where_monai_looks_for_it(brain_cohort: Path, tmp_path: Path) -> None:
    parser = parse(TRAIN, dataset_dir=brain_cohort, bundle_root=tmp_path, **TINY)
    parser["loss_of"] = DEFAULT_MLFLOW_SETTINGS["configs"]["trainer"]["output_transform"]
    seen: list[torch.Tensor] = []
    trainer, loss_of = parser.get_parsed_content("train#trainer"), parser.get_parsed_content("loss_of")
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: seen.append(loss_of(engine.state.output)))
    trainer.run()
    losses = [loss.item() for loss in seen]
    assert len(losses) == 4 and sum(losses[2:]) / 2 == pytest.approx(trainer.state.metrics["train_loss"])


def test_mlflow(brain_cohort: Path, tmp_path: Path) -> None:
    pytest.importorskip("mlflow", reason='needs pip install "monai_deq[mlflow]"')
    pytest.importorskip("sqlalchemy", reason="MLflow keeps its runs in SQLite")
    from mlflow import MlflowClient

    with as_before():
        settings = {"dataset_dir": brain_cohort, "bundle_root": tmp_path, **TINY}
        tracked = workflow(TRAIN, "train", run_id="training", tracking="mlflow", **settings)
        tracked.initialize()
        tracked.run()
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'eval' / 'mlruns.db'}")
    experiment = client.get_experiment_by_name("monai_experiment")
    (run,) = client.search_runs([experiment.experiment_id])
    assert {"train_loss", "val_dice"} <= set(run.data.metrics)
    # that of each iteration and the mean of each epoch
    assert len(client.get_metric_history(run.info.run_id, "train_loss")) == 4 + 2
