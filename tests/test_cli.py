# SPDX-License-Identifier: Apache-2.0
"""The command line: what the functions behind it are given, and what comes of errors."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import monai_deq.bundle
import monai_deq.data
import monai_deq.evaluation
from monai_deq.cli import app, main
from monai_deq.evaluation import ITERATED_METHODS, METHODS, METRICS

COMMANDS = ("compare", "converge", "memory", "scaling", "speed", "download", "zoo")


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Arguments of the function that a command calls, by name."""
    arguments: dict[str, Any] = {}

    def replace(module: Any, name: str) -> None:
        signature = inspect.signature(getattr(module, name))

        def record(*args: Any, **kwargs: Any) -> None:
            bound = signature.bind(*args, **kwargs)
            arguments.update(bound.arguments)

        monkeypatch.setattr(module, name, record)

    for name in (
        *("compare", "converge", "measure_memory", "measure_scaling", "measure_speed", "write_evaluation_report"),
    ):
        replace(monai_deq.evaluation, name)
    replace(monai_deq.data, "download_dataset")
    replace(monai_deq.bundle, "write_zoo_package")
    return arguments


def run(*words: str) -> None:
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command: str) -> None:
    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0 and f"Example: monai-deq {command} --" in result.output
    assert "--output-dir" in result.output and "--overwrite" in result.output


def test_commands_are_listed() -> None:
    output = CliRunner().invoke(app, ["--help"]).output
    assert all(f"  {command}  " in output for command in (*COMMANDS, "report"))


def test_report(given: dict[str, Any]) -> None:
    output = CliRunner().invoke(app, ["report", "--help"]).output
    assert "Example: monai-deq report eval/evaluation_summary.json -o" in output and "--overwrite" in output
    run("report", "a_summary.json", "-o", "r.html")
    expected = {"path": Path("r.html"), "summary_json": Path("a_summary.json"), "reference_json": None}
    assert given == {**expected, "overwrite": False}
    run("report", "a_summary.json", "--output", "r.html", "--reference", "b_summary.json", "--overwrite")
    assert given == {**expected, "reference_json": Path("b_summary.json"), "overwrite": True}


def test_compare(given: dict[str, Any]) -> None:
    run("compare", "--bundle-dir", "bundles/oasis", "--results-dir", "r")
    assert (given["methods"], given["metrics"], given["reference"]) == (METHODS, METRICS, "deqreg")
    assert given["overlays"] == [] and given["overrides"] == {} and given["overwrite"] is False
    words = ["--methods", "affine, deqreg", "--overlays", "slices.json", "--cost-rounds", "0", "--overwrite"]
    words += [
        "--set",
        "dataset_dir=a=b",
        "--set",
        "split_sizes=[2, 1, 2]",
        "--set",
        "amp=true",
        "--set",
        "label_set=all",
    ]
    words += ["--set", "split_lists={'test': [('a', 'b')]}", "--set", "cache_dir=null"]
    run("compare", "--bundle-dir", "bundles/oasis", "--results-dir", "r", *words)
    assert given["methods"] == ["affine", "deqreg"] and given["overlays"] == ["slices.json"]
    assert given["cost_rounds"] == 0 and given["overwrite"] is True
    assert given["overrides"] == {
        "dataset_dir": "a=b",
        "split_sizes": [2, 1, 2],
        "amp": True,
        "label_set": "all",
        "split_lists": {"test": [("a", "b")]},
        "cache_dir": None,
    }


def test_converge(given: dict[str, Any]) -> None:
    run("converge", "--bundle-dir", "b", "--results-dir", "r", "--table-steps", "24,48", "--set", "split=test")
    assert given["methods"] == ITERATED_METHODS and given["table_steps"] == [24, 48]
    assert given["overrides"] == {"split": "test"} and given["max_steps"] == 96


def test_benchmarks(given: dict[str, Any], tmp_path: Path) -> None:
    run("memory", "--bundle-dir", "b", "--output-dir", "o", "--spatial-size", "16,24", "--steps", "6,48")
    assert given["spatial_size"] == [16, 24] and given["steps"] == [6, 48] and given["unrolled_steps"] == [1, 3, 6, 12]
    run(
        "scaling",
        "--bundle-dir",
        "b",
        "--output-dir",
        "o",
        "--sizes",
        "16x24,32x48",
        "--cases",
        "{'a': {'method': 'x'}}",
    )
    assert given["sizes"] == [[16, 24], [32, 48]] and given["cases"] == {"a": {"method": "x"}}
    (tmp_path / "cases.json").write_text(json.dumps({"b": {"method": "y"}}))
    words = ["--cases", str(tmp_path / "cases.json"), "--rounds", "2", "--overlays", "slices.json"]
    run("speed", "--bundle-dir", "b", "--results-dir", "r", "--output-dir", "o", *words)
    assert given["cases"] == {"b": {"method": "y"}} and given["rounds"] == 2 and given["overlays"] == ["slices.json"]


def test_download_and_zoo(given: dict[str, Any]) -> None:
    run("download", "--name", "neurite-oasis", "--output-dir", "data", "--accept-terms")
    assert given["name"] == "neurite-oasis" and given["accept_terms"] is True and given["url"] is None
    run("zoo", "--bundle-dir", "b", "--weights", "model.pt", "--output-dir", "zoo", "--name", "mine")
    assert given["weights"] == Path("model.pt") and given["name"] == "mine" and given["overlays"] == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compare", "--bundle-dir", "b", "--results-dir", "r", "--set", "split"], "ValueError: --set: expected name="),
        (
            ["memory", "--bundle-dir", "b", "--output-dir", "o", "--steps", "six"],
            "ValueError: --steps: expected whole numbers",
        ),
        (["scaling", "--bundle-dir", "b", "--output-dir", "o", "--cases", "absent.json"], "FileNotFoundError: "),
        (
            ["speed", "--bundle-dir", "b", "--results-dir", "r", "--output-dir", "o", "--cases", "{]"],
            "ValueError: --cases",
        ),
        (
            ["scaling", "--bundle-dir", "b", "--output-dir", "o", "--sizes", "8x8xx"],
            "ValueError: --sizes: expected sizes such as 64x64x64, got '8x8xx'",
        ),
        (["memory", "--bundle-dir", "b", "--output-dir", "o"], "FileNotFoundError: bundle_dir 'b' is no bundle"),
        (["compare", "--bundle-dir", "b", "--results-dir", "r"], "FileNotFoundError: bundle_dir 'b' is no bundle"),
        (["apply", "~nobody-there/a.nii", "-t", "t.tfm", "-o", "b.nii"], "the file 't.tfm' does not exist"),
        (["check", "~nobody-there/a.csv"], "list of pairs '~nobody-there/a.csv' does not exist"),
        (["download", "--name", "nothing", "--output-dir", "o"], "ValueError: Unknown data set 'nothing'"),
        (["compare", "--bundle-dir", "b"], "Missing option '--results-dir'"),
        (["report", "absent.json", "-o", "r.html"], "FileNotFoundError: absent.json is not there. Run the evaluation"),
        (["report", "absent.json", "-o", "r.pdf"], "ValueError: path: expected a name that ends in .html"),
        (["report", "absent.json"], "Missing option '-o'"),
    ],
)
def test_an_error_is_one_line(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["monai-deq", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert len(error.strip().splitlines()) == 1 or "Usage" in error
