# SPDX-License-Identifier: Apache-2.0
"""Flags, and settings that the configuration does not have, on the command line of a bundle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from monai_deq.utils import as_flag, refuse_unknown_settings

PROGRAM = "/somewhere/monai/bundle/__main__.py"


@pytest.fixture
def files(tmp_path: Path) -> str:
    content = {"max_epochs": 3, "update": {"a": 1}, "rest": {"b": "@weight"}, "weight": 1.0}
    content["trainer"] = {"epochs": "@max_epochs", "steps": "$2 * @max_steps", "update": "@update"}
    content["training"] = content["run"] = ["$@trainer.run()"]
    (tmp_path / "train.json").write_text(json.dumps(content))
    (tmp_path / "overlay.json").write_text(json.dumps({"max_steps": 3}))
    return str([str(tmp_path / "train.json"), str(tmp_path / "overlay.json")])


@pytest.mark.parametrize(
    "words",
    [
        ["--max_epochs", "3", "--max_steps=4", "--max-epochs", "5"],
        ["--update#a", "3", "--update::a", "3", "--_meta_#version", "2"],
        ["--logging_file", "none", "--run_id", "training"],
        ["--tracking", "mlflow", "--experiment_name", "first"],
        ["--my_update", "{'a': 2}", "--update", "@my_update"],
    ],
)
def test_known(words: list[str], files: str) -> None:
    refuse_unknown_settings([PROGRAM, "run", "training", "--config_file", files, *words])


@pytest.mark.parametrize(
    "words, message",
    [
        (["--max_epoch", "3"], r"has no setting max_epoch \(is it max_epochs\?\)\."),
        (["--max-step=3", "--qqq", "@max_steps"], r"has no setting max_step \(is it max_steps\?\), qqq\."),
        (["--updat#a", "3"], r"has no setting updat \(is it update\?\)"),
        (["--experiment_name", "first"], "has no setting experiment_name"),
    ],
)
def test_unknown(words: list[str], message: str, files: str) -> None:
    command = [PROGRAM, "run", "training", "--config_file", files, *words]
    with pytest.raises(ValueError, match=message):
        refuse_unknown_settings(command)
    # another program has words of its own
    refuse_unknown_settings(["/usr/bin/pytest", *command[1:]])
    refuse_unknown_settings([PROGRAM, "ckpt_export", *command[2:]])


def test_file_of_arguments(files: str, tmp_path: Path) -> None:
    arguments = tmp_path / "arguments.json"
    arguments.write_text(json.dumps({"config_file": json.loads(files.replace("'", '"')), "max_epochs": 3}))
    refuse_unknown_settings([PROGRAM, "run", "--args_file", str(arguments)])
    arguments.write_text(json.dumps({"config_file": str(tmp_path / "train.json"), "max_epoch": 3}))
    with pytest.raises(ValueError, match="has no setting max_epoch"):
        refuse_unknown_settings([PROGRAM, "run", "--args_file", str(arguments)])


@pytest.mark.parametrize(
    ("value", "flag"),
    [(True, True), (False, False), ("true", True), ("false", False), ("True", True), ("FALSE", False)],
)
def test_flags(value: Any, flag: bool) -> None:
    assert as_flag(value, "resume") is flag


@pytest.mark.parametrize("value", ["yes", "", "0", 0, 1, None, [], 1.0])
def test_anything_else_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="resume must be true or false, got"):
        as_flag(value, "resume")


@pytest.mark.parametrize("words", [["--rest#b", "3"], ["--weight=2"], ["--max_epochs", "3", "--rest", "{'b': 2}"]])
def test_settings_that_nothing_uses(words: list[str], files: str) -> None:
    command = [PROGRAM, "run", "training", "--config_file", files, *words]
    with pytest.raises(ValueError, match="has no use for (rest|weight): leave it out"):
        refuse_unknown_settings(command)
    # until something does
    refuse_unknown_settings([*command, "--update", "@rest"])
