# SPDX-License-Identifier: Apache-2.0
"""Experiment tracking by MONAI's ``--tracking mlflow``, whose settings name the parts of a configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Events
from monai.bundle import ConfigParser, ConfigWorkflow
from monai.bundle.utils import DEFAULT_HANDLERS_ID, DEFAULT_MLFLOW_SETTINGS

from monai_deq.data import write_sample_cohort

BUNDLES = Path(__file__).resolve().parents[2] / "bundles"


def settings(tmp_path: Path) -> dict[str, Any]:
    cohort = write_sample_cohort(tmp_path / "cohort", 5, (16, 16, 16), (16, 20))
    sizes = {"max_epochs": 2, "pairs_per_epoch": 2, "max_steps": 2, "val_steps": 2, "batch_size": 1}
    return {"dataset_dir": str(cohort), "bundle_root": str(tmp_path), "split_sizes": [2, 2, 1], **sizes}


@pytest.mark.parametrize("bundle", ["oasis", "nlst"])
def test_the_parts_have_the_names_that_monai_looks_for(bundle: str) -> None:
    for name, parts in {
        "train": ("trainer", "validator"),
        "evaluate": ("evaluator",),
        "inference": ("evaluator",),
    }.items():
        parser = ConfigParser()
        parser.read_config(str(BUNDLES / bundle / f"{name}.json"))
        for part in parts:
            ids = DEFAULT_HANDLERS_ID[part]
            assert isinstance(parser.get(ids["id"]), dict) and isinstance(parser.get(ids["handlers"]), list)


def test_the_loss_is_where_monai_looks_for_it(tmp_path: Path) -> None:
    parser = ConfigParser()
    parser.read_config([str(BUNDLES / "oasis" / name) for name in ("train.json", "slices.json")])
    parser.update(settings(tmp_path))
    parser["loss_of"] = DEFAULT_MLFLOW_SETTINGS["configs"]["trainer"]["output_transform"]
    seen: list[torch.Tensor] = []
    trainer, loss_of = parser.get_parsed_content("train#trainer"), parser.get_parsed_content("loss_of")
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: seen.append(loss_of(engine.state.output)))
    trainer.run()
    losses = [loss.item() for loss in seen]
    assert len(losses) == 4 and sum(losses[2:]) / 2 == pytest.approx(trainer.state.metrics["train_loss"])


def test_mlflow(tmp_path: Path) -> None:
    pytest.importorskip("mlflow", reason='needs pip install "monai_deq[mlflow]"')
    pytest.importorskip("sqlalchemy", reason="MLflow keeps its runs in SQLite")
    from mlflow import MlflowClient

    workflow = ConfigWorkflow(
        config_file=[str(BUNDLES / "oasis" / name) for name in ("train.json", "slices.json")],
        workflow_type="train",
        run_id="training",
        tracking="mlflow",
        logging_file=False,
        **settings(tmp_path),
    )
    workflow.initialize()
    workflow.run()
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'eval' / 'mlruns.db'}")
    experiment = client.get_experiment_by_name("monai_experiment")
    (run,) = client.search_runs([experiment.experiment_id])
    assert {"train_loss", "val_dice"} <= set(run.data.metrics)
    # that of each iteration and the mean of each epoch
    assert len(client.get_metric_history(run.info.run_id, "train_loss")) == 4 + 2
