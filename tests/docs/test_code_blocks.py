# SPDX-License-Identifier: Apache-2.0
"""
Every code block of README, CONTRIBUTING, docs and the bundles' pages does what it says.

- ``python`` blocks are executed, those of a page in order in one namespace, in an empty folder that has ``bundles`` and
  the trained weights and the raw scores of ``docs/equilibrium`` in it.
- ``bash`` blocks are run by bash with recorders in place of their commands, which gives the commands as they are after
  expansion of loops, functions and variables. Each command is checked: modules, subcommands, options, configuration
  files, entries of these that are overridden, types of the new values, files of this repository. A command that is not
  known here fails.
- The commands of ``bash`` blocks below a line ``<!-- executed -->`` are executed then, with the ``python`` blocks.
- ``json`` blocks are parsed.

README's ``main command`` and ``test command`` are whole runs: the bundles' tests make the first with tiny settings, and
``.ci/run`` makes the second.

A block of any other kind fails.
"""

from __future__ import annotations

import inspect
import json
import logging
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import metadata
from pathlib import Path
from typing import Any

import fire
import monai.bundle
import pytest
import torch
from fire.parser import DefaultParseValue
from markdown_it import MarkdownIt
from monai.bundle import ConfigParser

from monai_deq.data import PUBLIC_DATASETS
from monai_deq.evaluation import METRIC_COLUMNS

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    page.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/**/*.md", "bundles/*/docs/*.md")
    for page in ROOT.glob(pattern)
)
#: commands that a block may have, each replaced by a recorder
COMMANDS = ("cp", "pip", "python", "sphinx-build", "torchrun")
#: directives of MyST that are no code
DIRECTIVES = ("{eval-rst}", "{include}", "{math}", "{toctree}")
#: configuration of a bundle that the overrides of ``python -m monai_deq.evaluation`` go to
OVERRIDDEN = {
    "compare": "evaluate.json",
    "converge": "evaluate.json",
    "memory": "train.json",
    "scaling": "evaluate.json",
    "speed": "evaluate.json",
}


@dataclass(frozen=True)
class Block:
    """A fenced block, where it is, and the comment in front of it."""

    page: str
    line: int
    language: str
    text: str
    comment: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: str, text: str) -> list[Block]:
    blocks, comment = [], ""
    for token in MarkdownIt().parse(text):
        line = token.map[0] + 2 if token.map else 0
        if token.type == "code_block":
            raise AssertionError(f"{page}:{line - 1}: an indented block does not name its language.")
        if token.type == "fence" and not token.info.startswith(DIRECTIVES):
            blocks.append(Block(page, line, token.info.strip(), token.content, comment))
        comment = token.content.strip() if token.type == "html_block" else ""
    return blocks


def page_blocks(page: str, *languages: str) -> list[Block]:
    found = blocks_of(page, (ROOT / page).read_text(encoding="utf-8"))
    return [block for block in found if not languages or block.language in languages]


def has(*languages: str) -> list[str]:
    return [page for page in PAGES if page_blocks(page, *languages)]


def repository_copy(folder: Path) -> None:
    """What the commands find in a clone of the repository, to read and to write beside."""
    shutil.copytree(ROOT / "bundles", folder / "bundles", ignore=shutil.ignore_patterns("models", "eval", "output"))
    for name in ("raw", "trained"):
        shutil.copytree(ROOT / "docs" / "equilibrium" / name, folder / "docs" / "equilibrium" / name)


def recorded_commands(block: Block, folder: Path) -> list[list[str]]:
    """The commands of a bash block as bash expands them, in order, none of them run."""
    stubs, calls = folder / "recorders", folder / "calls"
    stubs.mkdir(exist_ok=True)
    calls.write_bytes(b"")
    bash = shutil.which("bash")
    assert bash
    for name in COMMANDS:
        (stubs / name).write_text(f'#!{bash}\nprintf "%s\\0" $(($# + 1)) {name} "$@" >> "$CALLS"\n')
        (stubs / name).chmod(0o755)
    result = subprocess.run(
        [bash, "-euo", "pipefail", "-c", block.text],
        cwd=folder,
        env={"PATH": str(stubs), "CALLS": str(calls)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, f"{block}: {result.stderr} The test knows the commands {', '.join(COMMANDS)}."
    words = calls.read_bytes().decode().split("\0")[:-1]
    commands = []
    while words:
        n = int(words.pop(0))
        commands.append(words[:n])
        del words[:n]
    return commands


def arguments(words: Sequence[str]) -> tuple[list[Any], dict[str, Any]]:
    """Positional and named arguments as Fire takes them."""
    positional, named, rest = [], {}, list(words)
    while rest:
        word = rest.pop(0)
        if word.startswith("--"):
            key, equals, value = word[2:].partition("=")
            if not equals:
                value = rest.pop(0) if rest and not rest[0].startswith("--") else "True"
            key = key.replace("-", "_")
            assert key not in named, f"--{key} is given twice"
            named[key] = DefaultParseValue(value)
        else:
            assert not word.startswith("-"), f"{word}: options have two dashes"
            positional.append(DefaultParseValue(word))
    return positional, named


def as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def check_overrides(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> None:
    """Each override is an entry of the configuration, with a value of the kind that stands there."""
    for key, value in overrides.items():
        entry: Any = config
        for part in key.replace("::", "#").split("#"):
            known = entry if isinstance(entry, Mapping) else {str(i): e for i, e in enumerate(as_list(entry))}
            assert part in known, f"--{key} is no entry of the configuration"
            entry = known[part]
        if isinstance(value, str) and value.startswith(("$", "@")):
            continue
        if isinstance(entry, bool):
            assert isinstance(value, bool) or value in ("true", "false"), f"--{key} is a switch, got {value!r}"
        elif isinstance(entry, (int, float)):
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            assert number, f"--{key} is a number, got {value!r}"


def load_config(files: Any) -> dict[str, Any]:
    paths = [ROOT / str(file) for file in as_list(files)]
    for path in paths:
        assert path.is_file(), f"there is no {path.relative_to(ROOT)}"
    return ConfigParser.load_config_files([str(path) for path in paths])


def check_monai_bundle(words: Sequence[str]) -> None:
    command = getattr(monai.bundle, words[0], None)
    assert callable(command), f"python -m monai.bundle has no {words[0]}"
    positional, named = arguments(words[1:])
    signature = inspect.signature(command)
    signature.bind(*positional, **named)
    own = {k: v for k, v in named.items() if k in signature.parameters}
    config = load_config(own["config_file"])
    names = [*positional[:1], *(own[k] for k in ("run_id", "net_id") if k in own)]
    assert names, "which entry of the configuration is meant?"
    assert all(str(name) in config for name in names), f"the configuration has no {names}"
    check_overrides(config, {k: v for k, v in named.items() if k not in own})


def commands_of(module: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Callable[..., Any]]:
    """What ``python -m module`` gives to Fire."""
    given: list[dict[str, Callable[..., Any]]] = []
    with monkeypatch.context() as patch:
        patch.setattr(fire, "Fire", lambda commands, **_: given.append(commands))
        patch.setattr(logging, "basicConfig", lambda **_: None)
        runpy.run_module(module, run_name="__main__")
    return given[0]


def check_own_command(module: str, words: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    commands = commands_of(module, monkeypatch)
    assert words[0] in commands, f"python -m {module} has no {words[0]}, but {', '.join(commands)}"
    positional, named = arguments(words[1:])
    signature = inspect.signature(commands[words[0]])
    bound = signature.bind(*positional, **named).arguments
    if module == "monai_deq.data":
        assert bound["name"] in PUBLIC_DATASETS
        return
    bundle, overlays = Path(bound["bundle_dir"]), as_list(bound.get("overlays", []))
    for overlay in overlays:
        assert (ROOT / bundle / overlay).is_file() or (ROOT / overlay).is_file(), f"there is no overlay {overlay}"
    for method in as_list(bound.get("methods", [])):
        assert (ROOT / bundle / "methods" / f"{method}.json").is_file(), f"there is no method {method}"
    assert set(as_list(bound.get("metrics", []))) <= set(METRIC_COLUMNS)
    if module == "monai_deq.evaluation":
        files = [bundle / OVERRIDDEN[words[0]], *(bundle / overlay for overlay in overlays)]
        check_overrides(load_config(files), bound.get("overrides", {}))


def extras() -> set[str]:
    return set(metadata("monai_deq").get_all("Provides-Extra") or ())


def check_command(command: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    name, *words = command
    for word in words:
        if word.startswith(("bundles/", "docs/")):
            assert (ROOT / word).exists(), f"there is no {word} in the repository"
    if name == "pip":
        assert words[0] == "install"
        for word in words[1:]:
            package, bracket, names = word.rstrip("]").partition("[")
            if bracket and package in (".", "monai_deq"):
                assert set(names.split(",")) <= extras(), f"no extra {names}"
    elif name == "torchrun":
        options = words[: words.index("-m")]
        assert all(word.startswith("--nproc_per_node=") for word in options), f"torchrun {' '.join(options)}: not known"
        check_command(["python", *words[len(options) :]], monkeypatch)
    elif name == "sphinx-build":
        assert (ROOT / words[-2] / "conf.py").is_file()
    elif name == "python":
        if words[0] == "-c":
            compile(words[1], "python -c", "exec")
            return
        assert words[0] == "-m", f"python {words[0]}: only modules are known"
        module = words[1]
        if module == "monai.bundle":
            check_monai_bundle(words[2:])
        elif module.startswith("monai_deq."):
            check_own_command(module, words[2:], monkeypatch)
        else:
            assert module == "pytest", f"python -m {module} is not known"
    else:
        assert name == "cp"


@pytest.mark.parametrize("page", has())
def test_every_block_is_of_a_kind_that_is_executed_or_checked(page: str) -> None:
    for block in page_blocks(page):
        assert block.language in ("python", "bash", "json"), f"{block}: no test for {block.language or 'no language'!r}"
        marks = ("", "<!-- executed -->", "<!-- main command -->", "<!-- test command -->")
        assert block.comment in marks, f"{block}: unknown mark {block.comment}"
        if block.comment in marks[2:]:
            assert page == "README.md", f"{block}: commands that others run are README's"
        if block.comment == "<!-- executed -->":
            assert block.language == "bash", f"{block}: only bash blocks need the mark"
        if block.language == "json":
            json.loads(block.text)


def test_blocks_are_found() -> None:
    assert {"README.md", "bundles/oasis/docs/README.md"} <= set(has("bash"))
    assert {"README.md", "docs/tutorials/own_update.md"} <= set(has("python"))
    marks = [block.comment for block in page_blocks("README.md", "bash")]
    assert marks.count("<!-- main command -->") == marks.count("<!-- test command -->") == 1


@pytest.mark.parametrize("page", has("bash"))
def test_commands_exist_with_their_options(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for block in page_blocks(page, "bash"):
        commands = recorded_commands(block, tmp_path)
        assert commands, f"{block}: no command"
        for command in {tuple(command): None for command in commands}:
            try:
                check_command(command, monkeypatch)
            except (AssertionError, TypeError) as e:
                raise AssertionError(f"{block}: {' '.join(command)}: {e}") from e


@pytest.fixture
def own_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder, and what commands change in a process put back afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MONAI_DATA_DIRECTORY", str(tmp_path / "cache"))
    repository_copy(tmp_path)
    root = logging.getLogger()
    handlers, level, random = root.handlers[:], root.level, torch.get_rng_state()
    torch.manual_seed(0)
    yield tmp_path
    root.handlers[:], root.level = handlers, level
    torch.set_rng_state(random)


def executed(page: str) -> list[Block]:
    blocks = page_blocks(page, "python", "bash")
    return [b for b in blocks if b.language == "python" or b.comment == "<!-- executed -->"]


@pytest.mark.parametrize("page", [page for page in PAGES if executed(page)])
def test_blocks_run(page: str, own_process: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in executed(page):
        if block.language == "python":
            # lines of a traceback are those of the page
            exec(compile("\n" * (block.line - 1) + block.text, page, "exec"), namespace)
            continue
        for name, *words in recorded_commands(block, own_process):
            if name == "cp":
                subprocess.run(["cp", *words], check=True)
                continue
            assert (name, words[0]) == ("python", "-m"), f"{block}: {name} is not executed by this test"
            monkeypatch.setattr(sys, "argv", words[1:])
            try:
                runpy.run_module(words[1], run_name="__main__", alter_sys=True)
            except SystemExit as e:
                assert not e.code, f"{block}: {e}"
    assert os.getcwd() == str(own_process)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("python -m monai.bundle run training --config_file bundles/oasis/trian.json", "there is no"),
        ("python -m monai.bundle run trainig --config_file bundles/oasis/train.json", "has no"),
        ("python -m monai.bundle run training --config_file bundles/oasis/train.json --max_step 3", "no entry"),
        ("python -m monai.bundle run training --config_file bundles/oasis/train.json --phantom_steps many", "a number"),
        ("python -m monai.bundle run training --config_file bundles/oasis/train.json --amp 3", "a switch"),
        ("python -m monai_deq.evaluation compared --bundle_dir bundles/oasis --results_dir r", "has no compared"),
        ("python -m monai_deq.evaluation compare --bundle_dir bundles/oasis", "results_dir"),
        ("python -m monai_deq.evaluation memory --bundle_dir bundles/oasis --output_dir o --step 3", "no entry"),
        ("python -m monai_deq.data download neurite-oasis --output_dir d --accept", "accept"),
        ("python -m monai_deq.bundle zoo --bundle_dir bundles/oasis --weights w.pt --output_dir z --x 1", "x"),
        ("torchrun --nproc=2 -m monai.bundle run training --config_file bundles/oasis/train.json", "not known"),
        ("torchrun --nproc_per_node=2 -m monai.bundle run training --config_file bundles/oasis/trian.json", "no "),
        ('pip install "monai_deq[elastics]"', "no extra"),
        ("cp docs/absent results", "there is no"),
        ("curl example.org", "command not found"),
    ],
)
def test_a_wrong_command_is_found(text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises((AssertionError, TypeError), match=message):
        for command in recorded_commands(Block("page", 1, "bash", text, ""), tmp_path):
            check_command(command, monkeypatch)
