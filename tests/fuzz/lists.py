# SPDX-License-Identifier: Apache-2.0
"""Damaged lists of pairs, points, records and summaries."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Mapping
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from monai_deq.apps import RegistrationSettings, register_pairs
from monai_deq.data import find_learn2reg, read_pair_list
from monai_deq.evaluation import write_evaluation_report
from monai_deq.networks import describe, load_network
from monai_deq.transforms import load_keypoints, read_world_points

from .damages import FOREIGN, WRONG, Rng, choose, cut, drop, flip, get, places, put, write
from .judging import Case, Kind, same
from .originals import SLICE, lung_task, originals, summary

_KEYS = ("fixed", "moving", "fixed_label", "moving_label", "fixed_mask")
_COLUMNS = (*_KEYS, "fixed_keypoints", "moving_keypoints", "initial_transform", "initial_ddf", "name")
#: JSON that Python's own reader gives up on
_DEEP = "[" * 100_000


def _files(folder: Path, count: int) -> list[Path]:
    names = ("scan one.nii.gz", "scän2.nii.gz", "c.nii.gz", "d,e.nii.gz", "f.mha", "g'h.nii")
    return [write(folder, name, b"") for name in names[:count]]


# -- lists of pairs


def _pairs(rng: Rng, folder: Path) -> list[dict[str, str]]:
    """Pairs of files that exist, whose names differ."""
    files = [path.name for path in _files(folder, 6)]
    order = [files[i] for i in rng.permutation(6)]
    pairs = [{"fixed": order[2 * i], "moving": order[2 * i + 1]} for i in range(int(rng.integers(1, 4)))]
    for pair in pairs:
        pair["moving_label"] = choose(rng, files)
    return pairs


def _items(pairs: list[dict[str, str]], folder: Path) -> list[dict[str, str]]:
    """The files of each pair."""
    files = [{key: str(folder / name) for key, name in pair.items() if key != "name" and name} for pair in pairs]
    return [{**f, **({"name": p["name"]} if p.get("name") else {})} for f, p in zip(files, pairs, strict=True)]


def _read_list(path: Path) -> list[dict[str, Any]]:
    subjects = ("fixed_subject", "moving_subject")
    return [{k: v for k, v in item.items() if k not in subjects} for item in read_pair_list(path)]


def _text(rows: list[list[str]], **kwargs: Any) -> str:
    file = io.StringIO()
    csv.writer(file, **{"lineterminator": "\n", **kwargs}).writerows(rows)
    return file.getvalue()


def pairs_csv(rng: Rng, folder: Path) -> Case:
    """A list as CSV, in many ways of writing it that are right and that are not."""
    pairs = _pairs(rng, folder)
    columns = ["fixed", "moving", "moving_label"]
    rows = [columns, *([pair[c] for c in columns] for pair in pairs)]
    row, column = int(rng.integers(1, len(rows))), int(rng.integers(3))
    legal: dict[str, Any] = {
        "plain": lambda: _text(rows),
        "quoted": lambda: _text(rows, quoting=csv.QUOTE_ALL),
        "crlf": lambda: _text(rows, lineterminator="\r\n"),
        "bom": lambda: "\ufeff" + _text(rows),
        "blank lines": lambda: _text(rows).replace("\n", "\n\n"),
        "turned": lambda: _text([r[::-1] for r in rows]),
        "spaces": lambda: _text(rows).replace("fixed,moving,", "fixed , moving, "),
        "absolute": lambda: _text([columns, *([str(folder / f) for f in r] for r in rows[1:])]),
        "empty column": lambda: _text([[*rows[0], "fixed_mask"], *([*r, ""] for r in rows[1:])]),
        "no newline": lambda: _text(rows).rstrip("\n"),
    }
    twice = [*rows, rows[row]]
    without = [[c for i, c in enumerate(r) if i != column] for r in rows]
    typo = str(choose(rng, ("Fixed", "fixd", "moving label", "", "banana", "fixed.1", "image")))
    wrong: dict[str, Any] = {
        "no column": (lambda: _text(without)) if column < 2 else (lambda: _text([[typo, *rows[0][1:]], *rows[1:]])),
        "other column": lambda: _text([[*rows[0][:column], typo, *rows[0][column + 1 :]], *rows[1:]]),
        "column twice": lambda: _text([[*rows[0], rows[0][column]], *([*r, r[column]] for r in rows[1:])]),
        "a cell more": lambda: _text([r if i != row else [*r, "c.nii.gz"] for i, r in enumerate(rows)]),
        "a cell more each": lambda: _text([r if i == 0 else [*r, "c.nii.gz"] for i, r in enumerate(rows)]),
        "cells less": lambda: _text([r if i != row else r[:1] for i, r in enumerate(rows)]),
        "absent file": lambda: _text(rows).replace(rows[row][column], "absent.nii.gz"),
        "no file": lambda: _text([r if i != row else ["", *r[1:]] for i, r in enumerate(rows)]),
        "pair twice": lambda: _text(twice),
        "open quote": lambda: _text(rows).rstrip("\n") + ',"c.nii.gz',
        "quote": lambda: _text(rows) + '"',
        "semicolons": lambda: _text(rows, delimiter=";"),
        "tabs": lambda: _text(rows, delimiter="\t"),
        "header alone": lambda: _text(rows[:1]),
        "no header": lambda: _text(rows[1:]),
        "nothing": lambda: "",
        "lines": lambda: "\n\n\n",
        "null": lambda: _text(rows).replace("fixed,", "fixed\0,", 1),
        "null in a file": lambda: _text(rows).replace("scan", "sc\0an").replace("c.nii.gz", "c\0.nii.gz") + "\0",
        "json": lambda: json.dumps(pairs),
        "folder for a name": lambda: _text([[*rows[0], "name"], *([*r, "a/b"] for r in rows[1:])]),
        "dots for a name": lambda: _text([[*rows[0], "name"], *([*r, ".."] for r in rows[1:])]),
        "long": lambda: _text([r if i != row else ["x" * 300, *r[1:]] for i, r in enumerate(rows)]),
    }
    coded = {"utf-16": "utf-16", "latin-1": "latin-1"}
    way = choose(rng, [*legal, *legal, *wrong, *coded])
    content: str = {**legal, **wrong}.get(way, lambda: _text(rows))()
    data = content.encode(coded.get(way, "utf-8"))
    right = same(_items(pairs, folder)) if way in legal or (way == "latin-1" and "ä" not in content) else None
    path = write(folder, "pairs.csv", data)
    return Case(f"{way}, row {row}, column {column}", lambda: _read_list(path), [path], right, way in legal)


def pairs_csv_bytes(rng: Rng, folder: Path) -> Case:
    """Bytes of a list as CSV changed: what Python's own reader finds in it, or refused."""
    pairs = _pairs(rng, folder)
    columns = ["fixed", "moving", "moving_label"]
    content = _text([columns, *([pair[c] for c in columns] for pair in pairs)]).encode()
    damaged, what = flip(content, rng) if rng.random() < 0.8 else cut(content, rng)
    path = write(folder, "pairs.csv", damaged)

    def right(got: Any) -> bool:
        rows = [r for r in csv.reader(io.StringIO(damaged.decode("utf-8-sig"), newline="")) if r]
        cells = [[cell.strip() for cell in r] for r in rows]
        assert all(len(r) == len(cells[0]) for r in cells)
        return bool(same(_items([dict(zip(cells[0], r, strict=True)) for r in cells[1:]], folder))(got))

    return Case(what, lambda: _read_list(path), [path], right)


def _is_pair(entry: Any, folder: Path) -> bool:
    """Whether an entry of a list names files that are there."""
    if not isinstance(entry, dict) or not {"fixed", "moving"} <= set(entry) <= set(_COLUMNS):
        return False
    files = [v for k, v in entry.items() if k != "name" and v is not None]
    name = entry.get("name")
    fine = name is None or (isinstance(name, str) and name not in ("", ".", "..") and "/" not in name)
    return fine and all(isinstance(f, str) and f and (folder / f).is_file() for f in files) and len(files) > 1


def pairs_json(rng: Rng, folder: Path) -> Case:
    pairs: Any = _pairs(rng, folder)
    if rng.random() < 0.3:
        pairs[0]["name"] = "a_name"
    what, content = _damaged_json(rng, pairs)
    path = write(folder, "pairs.json", content)

    def right(got: Any) -> bool:
        entries = json.loads(content.decode("utf-8-sig"))
        return bool(entries and all(_is_pair(e, folder) for e in entries) and same(_items(entries, folder))(got))

    return Case(what, lambda: _read_list(path), [path], right)


def _damaged_json(rng: Rng, document: Any) -> tuple[str, bytes]:
    """A document of which a value is gone or another, or whose text is damaged."""
    text = json.dumps(document, indent=1)
    way = choose(rng, ("value",) * 5 + ("gone",) * 2 + ("bit",) * 2 + ("cut", "foreign", "deep", "utf-16", "bom"))
    if way == "value":
        place, value = choose(rng, list(places(document))), choose(rng, WRONG)
        return f"{place} = {value!r}", json.dumps(put(document, place, value)).encode()
    if way == "gone":
        place = choose(rng, [p for p in places(document) if p])
        return f"without {place}", json.dumps(drop(document, place)).encode()
    if way == "bit":
        content, what = flip(text.encode(), rng)
        return what, content
    if way == "cut":
        content, what = cut(text.encode(), rng)
        return what, content
    if way == "foreign":
        name = choose(rng, FOREIGN)
        return f"{name} in its place", FOREIGN[name]
    if way == "deep":
        return "nested without an end", _DEEP.encode()
    return way, text.encode("utf-16" if way == "utf-16" else "utf-8-sig")


# -- points


def keypoints(rng: Rng, folder: Path) -> Case:
    """Points of a slice: numbers that are none, of another count, in another order of signs."""
    rows = [[f"{v:.3f}" for v in rng.uniform(0, 11, 2)] for _ in range(int(rng.integers(1, 6)))]
    row, column = int(rng.integers(len(rows))), int(rng.integers(2))
    wrong: dict[str, Any] = {
        word: word for word in ("nan", "inf", "-inf", "", "banana", "1.2.3", "1 2", "0x10", "1e999")
    }
    legal = {word: word for word in ("-0", "1e1", " 3.5 ", "+2", "007")}
    ways = (
        "plain",
        "bits",
        "header",
        "more",
        "less",
        "semicolon",
        "empty",
        "blank",
        "comment",
        "foreign",
        "crlf",
        "bom",
    )
    way = choose(rng, [*wrong, *legal, *ways])
    right: Any = None
    if way in wrong or way in legal:
        rows[row][column] = way
    if way == "more":
        rows[row].append("1")
    if way == "less":
        rows[row].pop()
    text = "\n".join((";" if way == "semicolon" else ",").join(r) for r in rows) + "\n"
    if way in (*legal, "plain", "crlf", "blank", "bom"):
        right = same(torch.tensor([[float(cell) for cell in r] for r in rows], dtype=torch.float32))
    prefix = {"header": "x,y\n", "blank": "\n\n", "comment": "banana\n"}.get(way, "")
    content = (prefix + text.replace("\n", "\r\n" if way == "crlf" else "\n")).encode()
    content = b"" if way == "empty" else content
    if way == "foreign":
        content = FOREIGN[choose(rng, FOREIGN)]
    if way == "bits":
        content, _ = flip(content, rng)
        right = _points_of(content)
    path = write(folder, "points.csv", content)
    read = lambda: load_keypoints(path, 2, np.eye(4) if rng.random() < 0.5 else None)  # noqa: E731
    return Case(f"{way}, row {row}, column {column}", read, [path], right)


def _points_of(content: bytes) -> Any:
    """The numbers of a text that is legal, by Python; without what is behind #, which NumPy takes for a comment."""
    try:
        lines = [line.split("#")[0] for line in content.decode().splitlines()]
        points = [[float(cell) for cell in line.split(",")] for line in lines if line.strip()]
        return same(torch.tensor(points, dtype=torch.float32).reshape(-1, 2))
    except (ValueError, RuntimeError):
        return None


def world_points(rng: Rng, folder: Path) -> Case:
    """Points in mm with a header, as ANTs and Slicer write them."""
    slicer = bool(rng.integers(2))
    rows = [[f"{v:.3f}" for v in rng.uniform(-50, 50, 3)] for _ in range(int(rng.integers(1, 5)))]
    row, column = int(rng.integers(len(rows))), int(rng.integers(3))
    way = choose(rng, ("plain", "ras", "nan", "inf", "banana", "", "less", "no rows", "utf-16"))
    if way in ("nan", "inf", "banana", ""):
        rows[row][column] = way
    if way == "less":
        rows[row] = rows[row][:2]
    system = "RAS" if way == "ras" else "LPS"
    lines = [",".join(["0", *r] if slicer else r) for r in rows]
    head = ["# Markups fiducial file version = 4.11", f"# CoordinateSystem = {system}"] if slicer else ["x,y,z"]
    lines = head + ([] if way == "no rows" else lines)
    path = write(
        folder, f"p.{'fcsv' if slicer else 'csv'}", "\n".join(lines).encode("utf-16" if way == "utf-16" else "utf-8")
    )
    right = None
    if way in ("plain", "ras"):
        ras = np.array(rows, dtype=float) * ([1, 1, 1] if way == "ras" and slicer else [-1, -1, 1])
        right = same(torch.from_numpy(ras), close=1e-12)
    return Case(f"{path.suffix} {way}, row {row}", lambda: read_world_points(path), [path], right)


# -- records of networks, of results, of evaluations, of data sets


def record(rng: Rng, folder: Path) -> Case:
    """``model.json`` beside weights: other arguments are those of the network, or refused."""
    for name in ("model.pt", "model.json"):
        shutil.copy(originals() / name, folder)
    document = json.loads((folder / "model.json").read_text())
    place = choose(rng, list(places(document)))
    before = get(document, place)
    value = choose(rng, WRONG)
    if isinstance(before, int) and not isinstance(before, bool) and rng.random() < 0.5:
        value = before + int(rng.integers(1, 3))
    what, content = f"{place} = {value!r}", json.dumps(put(document, place, value)).encode()
    if rng.random() < 0.3:
        what, content = _damaged_json(rng, document)
        place = ()
    path = write(folder, "model.json", content)

    def run() -> Any:
        network = load_network(folder / "model.pt")
        pair = torch.rand(2, 1, 1, *SLICE, generator=torch.Generator().manual_seed(0))
        warped, ddf = network(*pair)
        assert torch.isfinite(ddf).all() and warped.shape == pair[0].shape
        return describe(network)

    def right(got: Any) -> bool:
        # whatever it says that is not refused is what the network has, or what nothing reads
        said = json.loads(content)
        if not isinstance(said.get("network"), dict):
            return False
        want = {k: v for k, v in said["network"].items() if v is not None}
        want["solver"] = {**want.get("solver", {}), "max_steps": said.get("steps", 48)}
        return _contains(got, want)

    return Case(what, run, [path, folder / "model.pt"], right)


def _contains(got: Any, want: Any) -> bool:
    """Whether all that is wanted is there."""
    if isinstance(want, Mapping):
        return isinstance(got, Mapping) and all(k in got and _contains(got[k], v) for k, v in want.items())
    return bool(want is None or got == want)  # what is None has its default


def used_record(rng: Rng, folder: Path) -> Case:
    """A record whose other parts are wrong, in a registration with the weights."""
    for name in ("model.pt", "model.json"):
        shutil.copy(originals() / name, folder)
    document = json.loads((folder / "model.json").read_text())
    sizes = ([8, 8], [16, 12], None)
    key = choose(rng, ("spatial_size", "steps", "preprocessing", "spatial_size"))
    legal = {
        "spatial_size": sizes,
        "steps": (1, 3, 7),
        "preprocessing": ({}, {"window": [0.0, 100.0]}, {"window": None}),
    }
    value = choose(rng, legal[key]) if rng.random() < 0.3 else choose(rng, WRONG)
    if key == "preprocessing" and rng.random() < 0.5:
        value = {
            choose(rng, ("window", "orientation")): choose(
                rng, (*WRONG, [1, 0], [0, 0], ["a", "b"], "RAS", "RA", "RL", "XYZ")
            )
        }
    path = write(folder, "model.json", json.dumps({**document, key: value}).encode())
    fine = any(type(value) is type(v) and value == v for v in legal[key])
    none: Any = ({"orientation": None}, {"window": None}, {"orientation": "RA"}, {"a": 1})
    fine = fine or (key == "preprocessing" and value in none)
    pair = {"fixed": originals() / "fixed.nii.gz", "moving": originals() / "moving.nii.gz"}

    def run() -> Any:
        settings = RegistrationSettings(weights=folder / "model.pt")
        return len(register_pairs([pair], folder / "out", settings))

    right = (lambda got: got == 1) if fine else None
    return Case(f"{key} = {value!r}", run, [path, folder / "model.pt"], right, made=["out/*"])


def result_record(rng: Rng, folder: Path) -> Case:
    """The record of a result that is there, when registering goes on: done, done again, or refused."""
    pair = {"fixed": originals() / "fixed.nii.gz", "moving": originals() / "moving.nii.gz"}
    settings = RegistrationSettings(steps=[1])
    if not _RESULT:
        with redirect_stdout(io.StringIO()):
            register_pairs([pair], folder / "first", settings)
        _RESULT.update({p.name: p.read_bytes() for p in (folder / "first").iterdir()})
    out = folder / "out"
    out.mkdir()
    for name, content in _RESULT.items():
        write(out, name, content)
    path = out / "moving_to_fixed_record.json"
    document = json.loads(_RESULT[path.name])
    kept = {k: v for k, v in document.items() if k != "settings"}
    way = choose(rng, ("settings", "whole", "text", "file gone"))
    right: Any = None
    what: str = way
    if way == "settings":
        what, content = _damaged_json(rng, document["settings"])
        try:
            said = json.loads(content)
            path.write_text(json.dumps({**kept, "settings": said}))
            right = same([]) if said == document["settings"] else None
        except (ValueError, RecursionError):
            path.write_bytes(content)
    elif way == "text":
        what, content = _damaged_json(rng, document)
        path.write_bytes(content)
        with suppress(ValueError, LookupError, TypeError, RecursionError):
            right = same([]) if json.loads(content.decode())["settings"] == document["settings"] else None
    elif way == "file gone":
        gone = choose(rng, sorted(_RESULT))
        (out / gone).unlink()
        what = f"{gone} is gone"
    else:
        right = same([])
    if way == "file gone":
        right = lambda got: all((out / n).read_bytes() == c for n, c in _RESULT.items() if "record" not in n)  # noqa: E731
    return Case(what, lambda: register_pairs([pair], out, settings, resume=True), [path], right, made=["out/*"])


_RESULT: dict[str, bytes] = {}


def learn2reg(rng: Rng, folder: Path) -> Case:
    """The lists of a data set: the pairs that they name, or refused."""
    task = folder / "task"
    shutil.copytree(lung_task(), task)
    path = task / "NLST_dataset.json"
    what, content = _damaged_json(rng, json.loads(path.read_text()))
    path.write_bytes(content)

    def right(got: Any) -> bool:
        document = json.loads(content)
        lists = [document.get(k, []) for k in ("training_paired_images", "registration_val", "registration_test")]
        named = [(e["fixed"], e["moving"]) for entries in lists for e in entries]
        held = {image for entries in lists[1:] for e in entries for image in (e["fixed"], e["moving"])}
        kept = [p for p in named[: len(lists[0])] if not held & {*p}] + named[len(lists[0]) :]
        return bool(kept and got == [tuple(str(task / image) for image in p) for p in dict.fromkeys(kept)])

    def run() -> Any:
        return [(pair["fixed"], pair["moving"]) for pair in find_learn2reg(task).pairs]

    return Case(what, run, [path], right)


def evaluation(rng: Rng, folder: Path) -> Case:
    """The summary of an evaluation, reported: a page, or refused."""
    what, content = _damaged_json(rng, summary())
    path = write(folder, "a_summary.json", content)

    def run() -> str:
        write_evaluation_report(folder / "r.html", path)
        return (folder / "r.html").read_text()

    def right(got: str) -> bool:
        return isinstance(json.loads(content), dict) and got.endswith("</html>\n") and "Evaluation of" in got

    return Case(what, run, [path], right, made=["r.html"])


KINDS: dict[str, tuple[Kind, float]] = {
    "list of pairs, CSV": (pairs_csv, 12),
    "list of pairs, bytes of CSV": (pairs_csv_bytes, 6),
    "list of pairs, JSON": (pairs_json, 12),
    "landmarks in voxels": (keypoints, 8),
    "landmarks in mm": (world_points, 4),
    "record of a network": (record, 8),
    "record of a network, used": (used_record, 4),
    "record of a result, resumed": (result_record, 6),
    "lists of Learn2Reg": (learn2reg, 8),
    "summary of an evaluation": (evaluation, 2),
}
