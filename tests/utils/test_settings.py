# SPDX-License-Identifier: Apache-2.0
"""Flags, and settings that the configuration does not have, on the command line of a bundle."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fire import parser
from monai.bundle import ConfigParser
from torch.utils.data import DataLoader

from monai_deq.utils import PairsFailedError, as_flag, refuse_other_settings, refuse_unknown_settings

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


class Refused:
    """A data set whose every item is refused by this package."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> bool:
        try:
            return as_flag("in a worker", "resume")
        except ValueError as e:
            raise RuntimeError("applying transform") from e


def refused(wrap: bool = False) -> None:
    try:
        try:
            {}["cause"]
        except KeyError:
            as_flag("perhaps", "resume")
    except ValueError as e:
        if wrap:
            raise RuntimeError("Failed to evaluate\nConfigExpression") from e
        raise


def in_other_hands() -> None:
    """Errors that are none of this package."""
    try:
        int("three")
    except ValueError as e:
        raise RuntimeError("Failed to evaluate") from e


def while_another_one_was_handled() -> None:
    try:
        {}["absent"]
    except KeyError:
        in_other_hands()


def in_a_circle() -> None:
    """As of a transform: the cause of what was caught is raised again."""
    try:
        in_other_hands()
    except RuntimeError as e:
        assert e.__cause__ is not None
        raise e.__cause__ from e.__cause__.__cause__


def of_a_configuration() -> None:
    content = {"flag": "$as_flag('perhaps', 'resume')", "imports": ["$from monai_deq.utils import as_flag"]}
    parser = ConfigParser({**content, "run": {"_target_": "torch.nn.ReLU", "inplace": "@flag"}})
    parser.get_parsed_content("run")


@pytest.mark.parametrize(
    ("fails", "reason"),
    [
        (refused, "resume must be true or false, got 'perhaps'."),
        (lambda: refused(wrap=True), "resume must be true or false, got 'perhaps'."),
        (of_a_configuration, "resume must be true or false, got 'perhaps'."),
        (lambda: list(DataLoader(Refused(), num_workers=1)), "resume must be true or false, got 'in a worker'."),
        (in_other_hands, "ValueError: invalid literal for int() with base 10: 'three'"),
        (while_another_one_was_handled, "ValueError: invalid literal for int() with base 10: 'three'"),
        (in_a_circle, "ValueError: invalid literal for int() with base 10: 'three'"),
        (lambda: {}["key"], "KeyError: 'key'"),
        (lambda: compile("a =", "here", "exec"), "SyntaxError: invalid syntax"),
    ],
)
def test_the_last_line_is_the_reason(
    fails: Callable[[], Any],
    reason: str,
    files: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    monkeypatch.setattr(sys, "argv", [PROGRAM, "run", "training", "--config_file", files])
    refuse_unknown_settings()
    refuse_unknown_settings()
    try:
        fails()
    except Exception:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):" and lines[-1] == f"Error: {reason}"
    assert sum(line.startswith("Error: ") for line in lines) == 1


def test_what_other_programs_and_the_user_end_with(files: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    seen = []
    monkeypatch.setattr(sys, "excepthook", earlier := lambda *args: seen.append(args))
    for argv in (["/usr/bin/pytest", "run"], [PROGRAM, "ckpt_export"]):
        monkeypatch.setattr(sys, "argv", argv)
        refuse_unknown_settings()
        refuse_unknown_settings([PROGRAM, "run", "training", "--config_file", files])
        assert sys.excepthook is earlier
    monkeypatch.setattr(sys, "argv", [PROGRAM, "run", "training", "--config_file", files, "--max_epoch", "3"])
    with pytest.raises(ValueError, match="has no setting max_epoch"):
        refuse_unknown_settings()
    # the hook that was there has the first word, and the only one of an interruption
    sys.excepthook(KeyboardInterrupt, interruption := KeyboardInterrupt(), None)
    assert seen == [(KeyboardInterrupt, interruption, None)] and capsys.readouterr().err == ""
    sys.excepthook(ValueError, ValueError("first\nsecond"), None)
    assert len(seen) == 2 and capsys.readouterr().err.count("\n") == 1


def test_pairs_that_failed_are_no_traceback(files: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    monkeypatch.setattr(sys, "argv", [PROGRAM, "run", "training", "--config_file", files])
    refuse_unknown_settings()
    try:
        try:
            raise PairsFailedError("2 of 3 pairs failed.")
        except PairsFailedError as e:
            raise RuntimeError("Failed to evaluate") from e
    except RuntimeError:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
    assert "Traceback" not in (said := capsys.readouterr().err) and said.startswith("Error: ") and said.count("\n") == 1


def test_other_settings_are_named() -> None:
    now = {"weights": "ab", "inferer": {"steps": 3, "finish": None}, "sizes": [1, 2]}
    refuse_other_settings(Path("a.json"), json.loads(json.dumps(now)), now)
    said = {"weights": "ab", "inferer": {"steps": 2, "finish": {"weight": 1.0}}, "sizes": [1, 2], "amp": True}
    with pytest.raises(ValueError, match=r"^a.json was made with other settings, inferer.steps 2 \(now 3\), ") as e:
        refuse_other_settings(Path("a.json"), said, now)
    assert all(word in str(e.value) for word in ("inferer.finish.weight 1.0 (now None)", "amp True (now None)"))
    with pytest.raises(ValueError, match="a.json does not say with what settings it was made: replace it"):
        refuse_other_settings(Path("a.json"), None, now)


@pytest.mark.parametrize(
    ("text", "read"),
    [("results#2", "'results'"), ("2024", "2024"), ("1e5", "100000.0"), ("a,b", r"\('a', 'b'\)"), ("0x10", "16")]
    + [("True", "True"), ("1_000", "1000")],
)
@pytest.mark.parametrize("name", ["output_dir", "bundle_root", "fixed", "moving_label", "pairs"])
def test_paths_that_would_arrive_as_something_else(text: str, read: str, name: str, files: str) -> None:
    with pytest.raises(ValueError, match=rf"--{name} .*reads it as {read}; .*two pairs of quotes.*or write \./"):
        refuse_unknown_settings([PROGRAM, "run", "training", "--config_file", files, f"--{name}", text])


def test_percent_begins_a_reference(files: str) -> None:
    with pytest.raises(ValueError, match=r"--output_dir %x: MONAI takes .* write \./%x"):
        refuse_unknown_settings([PROGRAM, "run", "training", "--config_file", files, "--output_dir", "%x"])


@pytest.mark.parametrize(
    "text", ["./results#2", "/a/b#2", "./2024", '"2024"', "'x,y'", "a b", "50%", "x.nii.gz", "007"]
)
def test_paths_that_arrive_as_they_are(text: str, files: str) -> None:
    # as Fire has it, which is what reads the command line
    assert parser.DefaultParseValue(text) == text.strip("'\"")
    config = str(json.loads(files.replace("'", '"'))[0])
    content = {**json.loads(Path(config).read_text()), "output_dir": ".", "training": ["$print(@output_dir)"]}
    Path(config).write_text(json.dumps(content))
    refuse_unknown_settings([PROGRAM, "run", "training", "--config_file", config, "--output_dir", text])
