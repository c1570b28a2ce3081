# SPDX-License-Identifier: Apache-2.0
"""Command lines of ``monai-deq`` and of bundles with values that are absurd, and with some that are not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

from shell import BUNDLES, configs, run_bundle

from .damages import FOREIGN, Rng, choose, spoil, write
from .judging import Case, Kind, command, ended
from .originals import lung_task, originals, summary

_OUT = ("out/*", "out.*", "out/**/*", "two/*/*", "two/*", "out")


def _file(name: str) -> Callable[[Path], str]:
    return lambda folder: str(originals() / name)


def _text(value: str) -> Callable[[Path], str]:
    return lambda folder: value


def _of(*values: str) -> tuple[Callable[[Path], str], ...]:
    return tuple(map(_text, values))


def _bad_file(content: bytes, name: str) -> Callable[[Path], str]:
    return lambda folder: str(write(folder, name, content))


#: what no file name is, or names no file that is there
_ABSENT = _of(
    "absent.nii.gz", "", "/", "a/b/c.nii.gz", "~absent/x", "x" * 300, "a\nb.nii.gz", "🧠.nii.gz", "--", "%train"
)
_NO_SCAN = (*_ABSENT, *(_bad_file(content, "bad.nii.gz") for content in FOREIGN.values()), _file("points.csv"))
_NO_TRANSFORM = (*_ABSENT, *(_bad_file(content, "bad.h5") for content in FOREIGN.values()), _file("fixed.nii.gz"))
_NO_LIST = (
    *_ABSENT,
    *(_bad_file(content, "bad.csv") for content in FOREIGN.values()),
    _bad_file(b"[" * 9999, "a.json"),
)
_NO_JSON = (
    *_ABSENT,
    *(_bad_file(content, "bad.json") for content in FOREIGN.values()),
    _bad_file(b"{" * 9999, "a.json"),
)
_NO_NUMBERS = _of("six", "1.5", "0", "-3", "6,-1", "6;5", "6,x", "nan", "1e9", "[6]", "6 5")
_NO_FOLDER = (_file("fixed.nii.gz"), _text("/proc/nothing"), _text("x" * 300))
_SET = _of("split", "=3", "", "=", " ", "a")

#: of each command what it needs, and further options: values that are right, and wrong ones
_COMMANDS: dict[str, dict[str, tuple[Any, Any]]] = {
    "register": {
        "fixed": (_of(""), _NO_SCAN),
        "moving": (_of(""), _NO_SCAN),
        "--output-dir": (_of("out"), _NO_FOLDER),
        "--fixed-label": ((_file("label.nii.gz"),), _NO_SCAN),
        "--moving-label": ((_file("moving_label.nii.gz"),), _NO_SCAN),
        "--fixed-mask": ((_file("label.nii.gz"),), _NO_SCAN),
        "--fixed-points": ((_file("points.csv"),), (*_ABSENT, _file("fixed.nii.gz"))),
        "--initial-transform": ((_file("field.mha"), _file("affine.tfm")), _NO_TRANSFORM),
        "--affine": (_of("rigid", "affine"), _of("", "rigd", "none", "Rigid", "1")),
        "--preset": (_of("brain"), _of("", "brains", "None", "lungs", "%lung")),
        "--weights": ((_file("model.pt"),), (*_ABSENT, _file("fixed.nii.gz"))),
        "--steps": (_of("2", "2,1", "", " 1 "), _NO_NUMBERS),
        "--tolerance": (_of("0.1", "0", "1e9"), _of("-1", "nan", "x", "", "-inf", "1,2")),
        "--device": (_of("cpu"), _of("gpu", "cuda:99", "banana", "", "-1")),
        "--transform-format": (_of(".mha", ".nrrd", ".h5", ".nii"), _of("", ".x", "mhax", ".tfm", "/", ".png")),
        "--pairs": (None, _NO_LIST),
        "--on-error": (_of("stop", "skip"), _of("", "go", "Skip")),
    },
    "apply": {
        "moving": (_of(""), _NO_SCAN[:-1]),  # points go into .csv
        "--transform": ((_file("field.nii.gz"),), _NO_TRANSFORM),
        "--output": (_of("out.nii.gz", "out.nii"), _of("out.png", "", "out", "x" * 300)),
        "--reference": ((_file("volume.nii.gz"),), _NO_SCAN),
    },
    "invert": {
        "--transform": ((_file("field.nii.gz"), _file("field.h5")), _NO_TRANSFORM),
        "--output": (_of("out.nii.gz", "out.mha", "out.h5"), _of("out.png", "", "out", "out.tfm", "x" * 300)),
        "--reference": ((_file("volume.nii.gz"),), _NO_SCAN),
    },
    "check": {
        "data": (_of(""), (*_NO_LIST, _text("."))),
        "--spatial-dims": (_of("2"), _of("4", "0", "-2", "x", "2.5", "")),
        "--workers": (_of("1"), _of("0", "-1", "x", "1.5", "")),
        "--json": (_of("out.json"), (_file("fixed.nii.gz"),)),
        "--split-sizes": (None, _of("x", "1,x", "1.5")),
    },
    "sample": {"--output-dir": (None, _NO_FOLDER), "--subjects": (None, _of("0", "1", "1000", "-1", "x", "2.5", ""))},
    "compare": {
        "--bundle-dir": (None, _of("absent", "", ".", "x" * 300)),
        "--results-dir": (_of("absent"), ()),
        "--methods": (None, _of("banana", "deqreg,banana", "../deqreg", "%x")),
        "--set": (None, _SET),
        "--cost-rounds": (None, _of("-1", "x", "1.5")),
        "--metrics": (None, _of("banana", "dice,banana")),
        "--reference": (None, _of("banana")),
        "--overlays": (None, _of("banana.json", "/")),
    },
    "converge": {
        "--bundle-dir": (None, _of("absent", "", ".")),
        "--results-dir": (_of("absent"), ()),
        "--methods": (
            None,
            _of(
                "banana",
            ),
        ),
        "--set": (None, _SET),
        "--max-steps": (None, _of("0", "-1", "x", "")),
        "--table-steps": (None, _of("x", "1.5", "a,b")),
        "--random-start-rms": (None, _of("-1", "x", "nan")),
    },
    "report": {
        "summary": (_of(""), _NO_JSON),
        "--output": (_of("out.html"), _of("out.pdf", "", "out", "x" * 300)),
        "--reference": (None, _NO_JSON),
    },
    "memory": {
        "--bundle-dir": (None, _of("absent", "", ".")),
        "--output-dir": (_of("out"), ()),
        "--spatial-size": (None, _of("x", "0,8,8", "-1", "8", "8,8.5,8", "")),
        "--steps": (None, _of("x", "0", "-1", "1.5")),
        "--unrolled-steps": (None, _of("x", "0", "-1")),
        "--rounds": (None, _of("-1", "x")),
        "--cases": (None, (*_of("{", "[]", "3", "banana", "{'a': 3}"), *_NO_JSON)),
        "--set": (None, _SET),
    },
    "scaling": {
        "--bundle-dir": (None, _of("absent", "", ".")),
        "--output-dir": (_of("out"), ()),
        "--sizes": (None, _of("x", "8x8xx", "axb", "0x0x0", "-8x8x8")),
        "--rounds": (None, _of("0", "-1", "x")),
        "--cases": (None, (*_of("{", "[]", "3"), *_NO_JSON)),
        "--set": (None, _SET),
    },
    "speed": {
        "--bundle-dir": (None, _of("absent", "", ".")),
        "--results-dir": (_of("absent"), ()),
        "--output-dir": (_of("out"), ()),
        "--rounds": (None, _of("0", "-1", "x")),
        "--cases": (None, (*_of("{", "[]", "3"), *_NO_JSON)),
        "--set": (None, _SET),
    },
    "download": {
        "--name": (None, _of("", "oasis", "../neurite-oasis", "neurite-oasis ", "*")),
        "--output-dir": (_of("out"), ()),
        "--url": (None, _of("ftp://x/y.zip", "file:///etc/passwd", "banana", "http://", "https:///x.zip")),
        "--checksum": (None, _of("md5:12", "banana", "sha256:zz", "md5:" + "g" * 32)),
    },
    "zoo": {
        "--bundle-dir": (None, _of("absent", "", ".")),
        "--weights": (None, (*_ABSENT, _file("fixed.nii.gz"))),
        "--output-dir": (_of("out"), _NO_FOLDER),
        "--name": (None, _of("", "a/b", "..")),
        "--weights-url": (
            None,
            _of(
                "banana",
            ),
        ),
    },
}
#: for the commands of a bundle what is right in the place of None above
_NEEDED: dict[str, Callable[[Path], str]] = {
    "--bundle-dir": lambda folder: str(BUNDLES / "oasis"),
    "--weights": _file("model.pt"),
    "--name": _text("neurite-oasis"),
    "--methods": _text("deqreg"),
}


def _words(name: str, rng: Rng, folder: Path) -> tuple[list[str], list[str], str]:
    """Words of a command of which one is wrong, or none; with what an error has to name, and the wrong option."""
    options = _COMMANDS[name]
    wrong_ones = [option for option, (_, wrong) in options.items() if wrong]
    bad = choose(rng, wrong_ones) if any(right is None for right, _ in options.values()) or rng.random() < 0.75 else ""
    words, named = [name], [bad]
    chosen: dict[str, str] = {}
    for option, (right, wrong) in options.items():
        if option == bad:
            chosen[option] = choose(rng, wrong)(folder)
        elif option.startswith("--output") or option in ("--results-dir",):
            chosen[option] = choose(rng, right or _of("two"))(folder)
        elif option in ("--bundle-dir",) or (name, option) in (("download", "--name"), ("zoo", "--weights")):
            chosen[option] = _NEEDED[option](folder)
        elif option == "--transform" or (right and option.startswith("--") and rng.random() < 0.15):
            chosen[option] = choose(rng, right)(folder)
    if name == "register":
        _fit(chosen, bad, rng)
    if name == "report":
        content = json.dumps(summary()).encode()
        chosen.setdefault("summary", str(write(folder, "a_summary.json", content)))
    if name == "zoo":
        words.append("--overlays=slices.json")
    if name == "check":
        content = f"fixed,moving\n{originals() / 'fixed.nii.gz'},{originals() / 'moving.nii.gz'}\n".encode()
        chosen.setdefault("data", str(write(folder, "good.csv", content)))
        chosen.setdefault("--spatial-dims", "2")
    if name == "apply":
        chosen.setdefault("moving", str(originals() / "volume.nii.gz"))
    places = [option for option in chosen if not option.startswith("--")]
    for option, value in chosen.items():
        words += [f"{option}={value}"] if option.startswith("--") else []
    words += ["--", *(chosen[place] for place in places)] if places else []
    if bad:
        value = chosen[bad]
        named += [bad.removeprefix("--"), bad.removeprefix("--").replace("-", "_"), repr(value), value or "''"]
        path = Path(value)
        # of an empty one the working directory
        here = ("'.'", ". is not there", ". is no", "got .", "at .:", "train.json is not there")
        named += [path.name, path.stem, " ".join(value.split())] if value else here
    return words, [n for n in named if n], bad


def _fit(chosen: dict[str, str], bad: str, rng: Rng) -> None:
    """Options of register that go together."""
    if "--pairs" in chosen:
        for option in [o for o in chosen if o.endswith(("label", "points", "mask", "transform")) and "--" in o]:
            del chosen[option]
        return
    chosen.setdefault("fixed", str(originals() / "fixed.nii.gz"))
    chosen.setdefault("moving", str(originals() / "moving.nii.gz"))
    if bad != "--steps":
        chosen["--steps"] = "2"
    if bad != "--initial-transform":
        chosen.pop("--initial-transform", None)  # those at hand are of volumes
    if "--fixed-points" in chosen and bad != "--fixed-points":
        chosen["--moving-points"] = str(originals() / "moving_points.csv")


def _kind_of(name: str) -> Kind:
    def kind(rng: Rng, folder: Path) -> Case:
        words, named, bad = _words(name, rng, folder)
        os.chdir(folder)
        right = _did(name, words, named if bad else [])
        return Case(f"{bad or 'right'}: {' '.join(words)}", lambda: command(*words), named, right, not bad, _OUT)

    return kind


def _did(name: str, words: list[str], named: list[str]) -> Callable[[Any], bool] | None:
    """Whether a command has done what it says, by the files it wrote; of a wrong one what is bad is named, if any."""
    if named:  # the only pair may fail and be skipped
        skipped = "--on-error=skip" in words
        return (lambda got: got["code"] == 1 and any(n in got["out"] for n in named)) if skipped else None
    outputs = [word.partition("=")[2] for word in words if word.startswith("--output")]

    def check(got: dict[str, Any]) -> bool:
        if got["code"] not in ((0, 1) if name == "check" else (0,)):
            return False
        if name == "register":
            return len(list(Path(outputs[0]).glob("*_record.json"))) == 1
        return name == "check" or Path(outputs[0]).stat().st_size > 100

    return check


def words_of_nothing(rng: Rng, folder: Path) -> Case:
    """Words that are no command, no option, or too few."""
    name = choose(rng, _COMMANDS)
    junk = (
        "",
        "-",
        "--",
        "-x",
        "--banana",
        "--output-dir",
        "-o",
        "--help=3",
        "--=",
        "🧠",
        "%x",
        "@y",
        "\0",
        "a" * 300,
    )
    words = [choose(rng, (name, name, "banana", "", "--debug", name.upper()))]
    words += [choose(rng, junk) for _ in range(int(rng.integers(1, 4)))]
    os.chdir(folder)
    names = ("Error", "expected", "Missing", "No such", "no such", "embedded null", *(w for w in words if w))
    return Case(" ".join(words)[:200], lambda: command(*words), names, lambda got: got["code"] == 0)


def many_scans(rng: Rng, folder: Path) -> Case:
    """Several moving scans, one of which is damaged, registered with --on-error skip: the others are there."""
    good = [shutil.copy(originals() / "moving.nii.gz", folder / f"m{i}.nii.gz") for i in range(2)]
    content, what = spoil((originals() / "moving.nii.gz").read_bytes(), rng)
    bad = write(folder, "bad.nii.gz", content)
    os.chdir(folder)
    words = ["register", str(originals() / "fixed.nii.gz"), *map(str, (good[0], bad, good[1]))]
    words += ["--steps", "1", "--output-dir", "out", "--on-error", "skip"]

    def right(got: dict[str, Any]) -> bool:
        done = {p.name for p in (folder / "out").glob("*_record.json")}
        said = "1 of 3 pairs failed" in got["out"] and str(bad) in got["out"]
        return got["code"] == 1 and done == {"m0_to_fixed_record.json", "m1_to_fixed_record.json"} and said

    return Case(what, lambda: command(*words), [bad], right, strict=True, made=_OUT)


# -- bundles

_WRONG_SETTINGS: dict[str, tuple[Any, ...]] = {
    "max_steps": (0, -1, "banana", 1.5),
    "tolerance": (-1, "x", "nan"),
    "spatial_size": ("[8]", "[8,8,8]", "banana", "[0,0]", "[-8,8]"),
    "spatial_dims": (4, 1, "two"),
    "split_sizes": ("[1,2]", "[-1,1,1]", "[9999,1,1]", "banana"),
    "dataset_dir": ("absent", "/dev/null"),
    "solver": ("banana", 3),
    "ckpt_path": ("absent.pt", "/dev/null", "."),
    "overwrite": ("perhaps", 3),
    "batch_size": (0, -1, "x"),
    "device": ("banana", "cuda:99"),
    "output_dir": ("/proc/nothing", "/dev/null/x"),
    "banana": (1,),
    "label_set": ("banana",),
    "autocast_dtype": ("banana", 16),
    "certificate": ("perhaps",),
}


@cache
def _cohort() -> Path:
    from monai_deq.data import write_sample_cohort

    return write_sample_cohort(originals() / "cohort", 3, (18, 16, 21), (32, 37))


def bundle_setting(rng: Rng, folder: Path) -> Case:
    """A setting of a bundle's evaluation or inference that is wrong; the error's last line names it."""
    which = choose(rng, ("evaluate", "inference"))
    files = configs("oasis", which, "slices.json")
    name = choose(rng, _WRONG_SETTINGS)
    value = choose(rng, _WRONG_SETTINGS[name])
    given: dict[str, Any] = {"dataset_dir": _cohort(), "split_sizes": "[0,0,3]", "bundle_root": folder / "root"}
    given |= {"ckpt_path": BUNDLES / "oasis" / "models" / "slices" / "model.pt", "output_dir": folder / "out"}
    given[name] = value

    def run() -> Any:
        result = run_bundle("evaluating" if which == "evaluate" else "inference", files, folder, **given)
        if result.returncode == 0:
            return result.stdout
        line = result.stderr.rstrip("\n").rsplit("\n", 1)[-1]
        assert line.startswith("Error: "), result.stderr[-800:]
        raise ValueError(line)

    named = [name, str(value), name.removesuffix("_path").removesuffix("_dir"), name.removeprefix("split_")]
    return Case(f"{which}: {name} = {value!r}", run, named, made=("root/*", "root/**/*"))


# -- in processes of their own


def in_a_process(rng: Rng, folder: Path) -> Case:
    """As :py:func:`_kind_of` in an interpreter of its own, with what libraries write on stderr."""
    name = choose(rng, ("register", "apply", "invert", "check"))
    words, named, bad = _words(name, rng, folder)
    words = [word for word in words if "\0" not in word]

    def run() -> Any:
        code = "from monai_deq.cli import main; main()"
        line = [sys.executable, "-W", "ignore", "-c", code, *words]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, timeout=50)
        return ended(done.returncode, done.stdout, done.stderr)

    os.chdir(folder)
    right = _did(name, words, named if bad else [])
    return Case(f"{bad or 'right'}: {' '.join(words)}", run, named, right, not bad, _OUT)


def data_set(rng: Rng, folder: Path) -> Case:
    """``check`` of a data set with damaged files: each of them is found."""
    task = folder / "task"
    shutil.copytree(lung_task(), task)
    os.chdir(folder)
    files = sorted(p for p in task.rglob("*.nii.gz"))
    content = choose(rng, FOREIGN)
    for file in files:
        file.write_bytes(FOREIGN[content])
    gone = choose(rng, files)
    gone.unlink()

    def right(got: dict[str, Any]) -> bool:
        found = json.loads(Path("out.json").read_text())["findings"]
        of = {finding["file"] for finding in found if finding["severity"] == "error"}
        return got["code"] == 1 and {str(f) for f in files if "images" in str(f)} <= of

    with redirect_stderr(StringIO()):
        words = ["check", str(task), "--json", "out.json", "--workers", "1"]
    return Case(f"{content}, {gone.name} is gone", lambda: command(*words), [task], right, made=_OUT)


KINDS: dict[str, tuple[Kind, float]] = {
    **{
        f"monai-deq {name}": (_kind_of(name), share)
        for name, share in {
            **{"register": 10, "apply": 7, "invert": 5, "check": 4, "sample": 1, "compare": 3, "converge": 2},
            **{"report": 3, "memory": 3, "scaling": 2, "speed": 2, "download": 2, "zoo": 2},
        }.items()
    },
    "monai-deq, no such words": (words_of_nothing, 4),
    "monai-deq register --on-error skip": (many_scans, 2),
    "monai-deq check of a data set": (data_set, 1),
    "monai-deq in a process of its own": (in_a_process, 0.2),
    "setting of a bundle": (bundle_setting, 1),
}
