# SPDX-License-Identifier: Apache-2.0
"""
Every block of README, CONTRIBUTING, docs and the bundles' pages does what it says.

The pages are pasted one after another into one folder that has ``bundles`` in it, as a reader of all of them would do.

- ``python`` blocks are executed, those of a page in order in one namespace.
- ``bash`` blocks are run by bash with recorders in place of their commands, which gives the commands as they are after
  expansion of loops, functions and variables. ``python -m monai.bundle run``, ``monai-deq``, ``python -c``, ``cp`` and
  ``mkdir`` are then run, in this process, with what takes long made short (``shortened``): one epoch of two pairs of
  a tiny cohort, which lies where the pages have ``DATA``, ``NLST``, ``LUNG`` or the name of a scan.
- ``pip``, ``pytest``, ``sphinx-build`` and ``torchrun`` are checked only. Another command fails.
- ``json`` blocks are parsed. A block of any other kind fails.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import logging
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import metadata
from pathlib import Path
from typing import Any

import monai.bundle
import pytest
import torch
from fire.parser import DefaultParseValue
from markdown_it import MarkdownIt
from monai.bundle import ConfigParser

import monai_deq.data
from monai_deq.data import PUBLIC_DATASETS, write_sample_cohort, write_sample_lung_cohort

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    page.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/**/*.md", "bundles/*/docs/*.md")
    for page in ROOT.glob(pattern)
)
#: pages that go on with what others have trained
AFTER = {
    "docs/results/rest_slices.md": ("docs/results/slices.md",),
    "docs/results/speed.md": ("docs/results/rest_slices.md", "docs/results/rest_volumes.md"),
    "docs/results/gpu.md": ("docs/results/rest_slices.md",),
}
#: commands that a block may have, each replaced by a recorder
COMMANDS = ("cp", "mkdir", "monai-deq", "pip", "pytest", "python", "sphinx-build", "torchrun")
#: directives of MyST that are no code
DIRECTIVES = ("{eval-rst}", "{include}", "{math}", "{toctree}")
#: what takes long, and the most that is taken of it
MOST = {"batch_size": 2, "max_epochs": 1, "pairs_per_epoch": 2, "solver_steps": 2}
#: the same in the training of equilibrium networks; others have few steps, and some refuse these settings
MOST_STEPS = {"max_steps": 4, "network_def#max_steps": 2, "rest#pool_slots": 2, "val_steps": 2}
UNROLLED = ("voxelmorph", "unrolling", "gradirn", "riir")
SPLIT = "[3,2,2]"
DEQ = {"method": "deqreg_pool", "solver_steps": 2, "coarse_tolerance": 1.0}
#: options of ``monai-deq`` that make it short
SHORT = {
    "compare": {"--methods": "affine,gradirn,deqreg", "--cost-rounds": "0"},
    "converge": {"--max-steps": "4", "--table-steps": "2"},
    "memory": {
        "--steps": "4",
        "--unrolled-steps": "1",
        "--rounds": "0",
        "--cases": json.dumps({"one": {"method": "voxelmorph", "steps": "one"}, "deq": {"method": "deqreg12"}}),
    },
    "scaling": {"--sizes": "8x8x8", "--rounds": "1", "--cases": json.dumps({"one": {"method": "voxelmorph"}})},
    "speed": {"--rounds": "1", "--cases": json.dumps({"riir": {"method": "riir"}, "deq": DEQ})},
}


@dataclass(frozen=True)
class Block:
    """A fenced block, and where it is."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def page_blocks(page: str, *languages: str) -> list[Block]:
    blocks = []
    for token in MarkdownIt().parse((ROOT / page).read_text(encoding="utf-8")):
        line = token.map[0] + 2 if token.map else 0
        assert token.type != "code_block", f"{page}:{line - 1}: an indented block does not name its language."
        if token.type == "fence" and not token.info.startswith(DIRECTIVES):
            blocks.append(Block(page, line, token.info.strip(), token.content))
    return [block for block in blocks if not languages or block.language in languages]


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


def options_of(words: Sequence[str]) -> dict[str, str]:
    """``--key value ...``; each is given once."""
    options: dict[str, str] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        assert word.startswith("--"), f"{word}: expected an option"
        assert word not in options, f"{word} is given twice"
        assert rest and not rest[0].startswith("--"), f"{word} has no value"
        options[word] = rest.pop(0)
    return options


def config_of(files: str) -> tuple[list[str], dict[str, Any]]:
    """The files that ``--config_file`` names, and what they say together."""
    names = ast.literal_eval(files) if files.startswith("[") else [files]
    for name in names:
        assert (ROOT / name).is_file(), f"there is no {name}"
    return names, ConfigParser.load_config_files([str(ROOT / name) for name in names])


def small(size: str) -> str:
    """A tiny size of images in place of another, as many numbers as it has."""
    return "[" + ",".join(str(max(8, n // 10)) for n in ast.literal_eval(size)) + "]"


def shortened_bundle(words: Sequence[str]) -> list[str]:
    """``run ID --key value ...`` with what takes long made short."""
    run_id, options = words[1], options_of(words[2:])
    names, config = config_of(options["--config_file"])
    overlay = Path(names[-1]).stem
    trained = overlay not in ("affine", "elastix", "energy")
    one_pair = "--fixed" in options or "--pairs" in options
    by_features = run_id == "training" and any(name.endswith("energy_features.json") for name in names)
    if by_features:
        options |= {"--steps": "[2,1]", "--train#handlers#1#interval": "1"}
    steps = MOST_STEPS if run_id == "training" and overlay not in UNROLLED and not by_features else {}
    for key, most in {**MOST, **steps}.items():
        if key.split("#")[0] in config:
            options[f"--{key}"] = str(min(most, int(options.get(f"--{key}", most))))
    if trained and overlay != "energy_features" and "coarse_tolerance" in config:
        options["--coarse_tolerance"] = "1.0"
    if "'spectral_iterations': 40" in options.get("--certificate", ""):
        options["--certificate"] = options["--certificate"].replace("40", "4")
    if "--train#handlers#1#interval" in options:
        options["--train#handlers#1#interval"] = "1"
    if options.get("--resume") == "true" and run_id == "training":
        options["--max_epochs"] = "2"
    if overlay == "elastix":
        options["--network_def#iterations"] = "2"
    if "--spatial_size" in options:
        options["--spatial_size"] = small(options["--spatial_size"])
    elif trained and not any(name.endswith("slices.json") for name in names):
        options["--spatial_size"] = "[8,8,8]"
    if "oasis" in names[0] and not one_pair and "--split_lists" not in options:
        options["--split_sizes"] = options.get("--split_sizes", SPLIT) if "--ckpt_path" in options else SPLIT
    if not one_pair:
        options.setdefault("--dataset_dir", "DATA" if "oasis" in names[0] else "NLST")
    return ["run", run_id, *(word for pair in options.items() for word in pair)]


def shortened_own(words: Sequence[str]) -> list[str]:
    """``COMMAND --option value ... --set key=value`` likewise; what is no option stays as it is."""
    command, rest, flags, options, settings = words[0], list(words[1:]), [], {}, {}
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or not rest or rest[0].startswith("--"):
            flags.append(word)
        elif word == "--set":
            key, equals, value = rest.pop(0).partition("=")
            assert equals and key not in settings, f"--set {key}: expected each setting once, as key=value"
            settings[key] = small(value) if key == "spatial_size" else value
        else:
            assert word not in options, f"{word} is given twice"
            options[word] = rest.pop(0)
    for name, value in SHORT.get(command, {}).items():
        if name != "--methods" or name not in options:
            options[name] = value
    if command == "converge" and "," in options.get("--methods", ""):
        methods = options["--methods"].split(",")
        options["--methods"] = f"{methods[0]},{methods[-1]}"
    if "--spatial-size" in options:
        options["--spatial-size"] = ",".join("8" for _ in options["--spatial-size"].split(","))
    oasis = "oasis" in options.get("--bundle-dir", "")
    if command in ("compare", "converge", "speed") and oasis and "split_lists" not in settings:
        settings["split_sizes"] = SPLIT
    # in one order, so that what has become the same is known
    given = [word for option in sorted(options.items()) for word in option]
    return [command, *flags, *given, *(w for k, v in sorted(settings.items()) for w in ("--set", f"{k}={v}"))]


def small_cohort(output_dir: str, num_subjects: int = 7, *_: Any, seed: int = 0) -> Path:
    """``write_sample_cohort`` with tiny images, whatever is asked for."""
    return write_sample_cohort(output_dir, min(num_subjects, 7), (12, 10, 14), (20, 24), seed=seed)


def as_data(cohort: Path, folder: Path, names: Sequence[str] = ()) -> None:
    """A synthetic cohort that is not known as one, with the names of subjects that the pages have."""
    shutil.copytree(cohort, folder)
    (folder / "sample.json").unlink()
    if names:
        subjects = sorted(path for path in folder.iterdir() if path.is_dir())
        for subject, name in zip(subjects, names, strict=True):
            subject.rename(folder / f"OASIS_OAS1_{name}_MR1")
        (folder / "subjects.txt").write_text("".join(f"OASIS_OAS1_{name}_MR1\n" for name in names))


def archive_for(name: str, folder: Path, output_dir: Path) -> None:
    """The archive of a public data set, as somebody who took it with a browser has it."""
    output_dir.mkdir(exist_ok=True)
    archive = output_dir / Path(PUBLIC_DATASETS[name].url or "").name
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive, "w") as packed:
            for path in sorted((folder / "NLST").rglob("*")):
                packed.write(path, path.relative_to(folder))
    else:
        with tarfile.open(archive, "w") as packed:
            packed.add(folder / "DATA", ".")


@dataclass
class Workplace:
    """The folder of the pages, and the pages that have been run in it."""

    folder: Path
    pages: set[str] = field(default_factory=set)
    measured: set[str] = field(default_factory=set)

    def run_page(self, page: str) -> None:
        if page in self.pages:
            return
        self.pages.add(page)
        for other in AFTER.get(page, ()):
            self.run_page(other)
        namespace: dict[str, Any] = {"__name__": "__main__"}
        for block in page_blocks(page, "python", "bash"):
            if block.language == "python":
                # lines of a traceback are those of the page
                exec(compile("\n" * (block.line - 1) + block.text, page, "exec"), namespace)
                continue
            commands = recorded_commands(block, self.folder)
            assert commands, f"{block}: no command"
            for command in commands:
                try:
                    self.run(command)
                except (Exception, SystemExit) as e:
                    raise AssertionError(f"{block}: {' '.join(command)}: {e!r}") from e

    def run(self, command: Sequence[str]) -> None:
        name, *words = command
        if name in ("cp", "mkdir"):
            subprocess.run([name, *words], check=True)
        elif name == "python" and words[0] == "-c":
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(monai_deq.data, "write_sample_cohort", small_cohort)
                exec(compile(words[1], "python -c", "exec"), {})
        elif name == "python" and any(word.endswith("methods/elastix.json']") for word in words):
            config_of(words[words.index("--config_file") + 1])  # loading ITK takes long: tests/bundles runs it
        elif name == "python" and words[:3] == ["-m", "monai.bundle", "run"]:
            with pytest.MonkeyPatch.context() as patch:
                short = shortened_bundle(words[2:])
                patch.setattr(sys, "excepthook", sys.excepthook)  # which the run changes
                patch.setattr(sys, "argv", [str(Path(monai.bundle.__file__).with_name("__main__.py")), *short])
                settings = {key.removeprefix("--"): value for key, value in options_of(short[2:]).items()}
                # as Fire does it, which spends longer on the stack of pytest than the run takes
                monai.bundle.run(short[1], **{key: DefaultParseValue(value) for key, value in settings.items()})
        elif name == "monai-deq":
            self.run_own(words)
        else:
            check_command(command)

    def run_own(self, words: Sequence[str]) -> None:
        from typer.testing import CliRunner

        from monai_deq.cli import app

        if words[0] == "download":
            name, output_dir = (words[words.index(option) + 1] for option in ("--name", "--output-dir"))
            archive_for(name, self.folder, Path(output_dir))
        short = shortened_own(words)
        if words[0] in ("memory", "scaling"):
            settings = [
                word.partition("=")[0] for before, word in zip(words, words[1:], strict=False) if before == "--set"
            ]
            measured = " ".join([words[0], words[words.index("--bundle-dir") + 1], *settings])
            if measured in self.measured:
                return  # with all sizes tiny, several pages ask for the same
            self.measured.add(measured)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(monai_deq.data, "write_sample_cohort", small_cohort)
            result = CliRunner().invoke(app, short)
        assert result.exit_code == 0, result.output[-2000:] + repr(result.exception)


def check_command(command: Sequence[str]) -> None:
    """What is not run: the files, extras and settings that it names are there."""
    name, *words = command
    if name == "pip":
        assert words[0] == "install"
        extras = set(metadata("monai_deq").get_all("Provides-Extra") or ())
        for word in words[1:]:
            package, bracket, names = word.rstrip("]").partition("[")
            if bracket and package in (".", "monai_deq"):
                assert set(names.split(",")) <= extras, f"no extra {names}"
    elif name == "torchrun":
        launcher, module = words[: words.index("-m")], words[words.index("-m") + 1 :]
        assert all(word.startswith("--nproc_per_node=") for word in launcher), f"torchrun {launcher}: not known"
        assert module[:2] == ["monai.bundle", "run"]
        options = options_of(module[3:])
        _, config = config_of(options.pop("--config_file"))
        for key in (module[2], *(option.removeprefix("--") for option in options)):
            assert key in config, f"{key} is no entry of the configuration"
    elif name == "sphinx-build":
        assert (ROOT / words[-2] / "conf.py").is_file()
    else:
        assert name == "pytest", f"{' '.join(command)} is not known"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workplace]:
    folder = tmp_path_factory.mktemp("pages")
    shutil.copytree(ROOT / "bundles", folder / "bundles", ignore=shutil.ignore_patterns("eval", "output"))
    as_data(
        small_cohort(str(folder / "cohort")), folder / "DATA", ("0001", "0002", "0003", "0004", "0005", "0133", "0244")
    )
    lungs = write_sample_lung_cohort(folder / "lungs", num_pairs=(2, 1, 1), spatial_size=(20, 16, 24))
    for name in ("NLST", "LUNG"):
        as_data(lungs, folder / name)
    for scan, subject in (("a", "0001"), ("b", "0002")):
        shutil.copy(folder / "DATA" / f"OASIS_OAS1_{subject}_MR1" / "aligned_norm.nii.gz", folder / f"{scan}.nii.gz")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MONAI_DATA_DIRECTORY", str(folder / "cache"))
        for name, dataset in PUBLIC_DATASETS.items():
            patch.setitem(PUBLIC_DATASETS, name, dataclasses.replace(dataset, checksum=None))
        yield Workplace(folder)


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """What commands change in a process is put back afterwards."""
    root = logging.getLogger()
    handlers, level, random = root.handlers[:], root.level, torch.get_rng_state()
    torch.manual_seed(0)
    yield
    root.handlers[:], root.level = handlers, level
    torch.set_rng_state(random)


@pytest.mark.parametrize("page", [page for page in PAGES if page_blocks(page)])
def test_every_block_is_of_a_kind_that_is_executed_or_checked(page: str) -> None:
    for block in page_blocks(page):
        assert block.language in ("python", "bash", "json"), f"{block}: no test for {block.language or 'no language'!r}"
        if block.language == "json":
            json.loads(block.text)


def test_blocks_are_found() -> None:
    assert len(page_blocks("README.md", "bash")) == 3 and page_blocks("README.md", "python")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.count("<!-- main command -->\n```bash") == text.count("<!-- test command -->\n```bash") == 1
    assert {other for others in AFTER.values() for other in others} | set(AFTER) <= set(PAGES)


@pytest.mark.parametrize("page", [page for page in PAGES if page_blocks(page, "python", "bash")])
def test_page_runs(page: str, workplace: Workplace) -> None:
    workplace.run_page(page)


def test_picture_is_drawn(tmp_path: Path) -> None:
    script = runpy.run_path(str(ROOT / "docs" / "figures" / "readme_figure.py"))
    script["draw"](tmp_path / "readme.png")
    assert 20_000 < (tmp_path / "readme.png").stat().st_size < 300_000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("python -m monai.bundle run training --config_file bundles/oasis/trian.json", "there is no"),
        ("python -m monai.bundle run training --config_file bundles/oasis/train.json --max_step 3", "max_step"),
        ("python -m monai.bundle run trainig --config_file bundles/oasis/train.json", "refuse_unknown_settings"),
        ("monai-deq compared --bundle-dir bundles/oasis", "compared"),
        ("monai-deq compare --bundle-dir bundles/oasis", "results-dir"),
        ("monai-deq memory --bundle-dir bundles/oasis --output-dir wrong --set step=3", "step"),
        ("torchrun --nproc=2 -m monai.bundle run training --config_file bundles/oasis/train.json", "not known"),
        ("torchrun --nproc_per_node=2 -m monai.bundle run training --config_file bundles/oasis/trian.json", "there is"),
        ('pip install "monai_deq[elastics]"', "no extra"),
        ("cp docs/absent results", "cp"),
        ("python -m pytest", "not known"),
        ("curl example.org", "command not found"),
    ],
)
def test_a_wrong_command_is_found(text: str, message: str, workplace: Workplace) -> None:
    with pytest.raises((Exception, SystemExit)) as caught:
        for command in recorded_commands(Block("page", 1, "bash", text), workplace.folder):
            workplace.run(command)
    causes: list[BaseException | None] = [caught.value]
    while causes[-1]:
        causes.append(causes[-1].__cause__)
    assert any(message in str(cause) for cause in causes), caught.value
