# SPDX-License-Identifier: Apache-2.0
"""What holds for the whole package: names that MONAI finds, imports one way, nothing private of others, short calls."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from inspect import isclass, isfunction, ismodule
from pathlib import Path
from pydoc import locate

import pytest

import monai_deq

ROOT = Path(monai_deq.__file__).parent

#: from the ground up: a package imports from floors below its own; ``cli`` is a module
FLOORS = [
    ["utils"],
    ["solvers"],
    ["networks"],
    ["certificates", "data", "losses", "metrics"],
    ["visualize"],
    ["baselines", "inferers", "transforms"],
    ["handlers"],
    ["engines"],
    ["apps", "bundle", "evaluation"],
    ["cli"],
]
#: the same inside ``networks``
NETWORKS_FLOORS = [["blocks", "checkpoints", "compilation"], ["nets"], ["records"]]

#: whose names with an underscore are not ours to use
FOREIGN = ("ignite", "monai", "torch", "torchdeq")
#: where there is no public way: module, what it uses of theirs
FENCED: set[tuple[str, str]] = set()

MOST_ARGUMENTS = 10


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(file): file for file in sorted(ROOT.rglob("*.py"))}
TREES = {name: ast.parse(file.read_text(encoding="utf-8")) for name, file in FILES.items()}
PACKAGES = [name for name, file in FILES.items() if file.name == "__init__.py"]


def imported(name: str) -> Iterator[tuple[str, str]]:
    """What a module imports, also inside functions and for types alone: full names, and how they are called there."""
    package = name if name in PACKAGES else name.rpartition(".")[0]
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            for item in node.names:
                # "import torch.nn" binds torch
                yield item.name, item.asname or ""
                if not item.asname:
                    yield item.name.split(".")[0], item.name.split(".")[0]
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            start = ".".join([*base, *([node.module] if node.module else [])])
            for item in node.names:
                yield f"{start}.{item.name}", item.asname or item.name


def modules_behind(name: str) -> set[str]:
    """Modules of the package that a module imports; a name in a module stands for the module."""
    found = set()
    for full, _ in imported(name):
        owner = full if full in FILES else full.rpartition(".")[0]
        if owner in FILES:
            found.add(owner)
    return found - {"monai_deq"}


def floor_of(name: str, floors: list[list[str]]) -> int:
    return next(i for i, names in enumerate(floors) if name in names)


def fully_dotted(node: ast.expr) -> list[str]:
    """``["torch", "_C", "x"]`` of ``torch._C.x``, nothing of what does not begin with a name."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return [node.id, *reversed(parts)] if isinstance(node, ast.Name) else []


def is_private(part: str) -> bool:
    return part.startswith("_") and not part.startswith("__")


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_modules_are_found_by_their_names(name: str) -> None:
    # as MONAI finds a _target_
    module = locate(name)
    assert ismodule(module) and module.__name__ == name
    own = [key for key, value in vars(module).items() if isfunction(value) or isclass(value)]
    assert name.rpartition(".")[2] not in own
    assert set(getattr(module, "__all__", ())) <= set(dir(module)) | set(getattr(monai_deq, "__all__", ()))


@pytest.mark.parametrize("package", PACKAGES)
def test_public_names_are_found_by_their_names(package: str) -> None:
    module = importlib.import_module(package)
    assert len(set(module.__all__)) == len(module.__all__)
    for name in module.__all__:
        found = locate(f"{package}.{name}")
        assert found is getattr(module, name), f"{package}.{name} is {found!r}"
        assert ismodule(found) == (f"{package}.{name}" in PACKAGES), f"{package}.{name}"


# --- imports ----------------------------------------------------------------------------------------------------------


def test_imports_are_without_circles() -> None:
    try:
        TopologicalSorter({name: modules_behind(name) for name in FILES}).prepare()
    except CycleError as e:
        pytest.fail(f"imports in a circle: {' <- '.join(e.args[1])}")


def test_imports_go_one_way() -> None:
    wrong = []
    for name in FILES:
        _, *own = name.split(".")
        for other in modules_behind(name):
            _, *theirs = other.split(".")
            if not own:
                wrong.append(f"{name} imports {other}: a package is imported when it is asked for")
            elif own[0] != theirs[0]:
                if floor_of(own[0], FLOORS) <= floor_of(theirs[0], FLOORS):
                    wrong.append(f"{name} imports {other}")
            elif own[0] == "networks" and len(own) > 1:
                # own package from inside it, or a floor that is not below
                if len(theirs) == 1:
                    wrong.append(f"{name} imports {other}")
                elif own[1] != theirs[1]:
                    floors = [floor_of(part, NETWORKS_FLOORS) for part in (own[1], theirs[1])]
                    if floors[0] <= floors[1]:
                        wrong.append(f"{name} imports {other}")
    assert not wrong, "\n".join(wrong)


def test_every_package_has_a_floor() -> None:
    names = {name.split(".")[1] for name in FILES if "." in name}
    assert sorted(name for floor in FLOORS for name in floor) == sorted(names)
    inner = {name.split(".")[2] for name in FILES if name.startswith("monai_deq.networks.")}
    assert sorted(name for floor in NETWORKS_FLOORS for name in floor) == sorted(inner)


# --- private names ----------------------------------------------------------------------------------------------------


def test_nothing_private_of_others_is_used() -> None:
    used = set()
    for name, tree in TREES.items():
        bound = {}
        for full, called in imported(name):
            if full.split(".")[0] in FOREIGN:
                bound[called] = full
                if any(map(is_private, full.split("."))):
                    used.add((name, full))
        for node in ast.walk(tree):
            first, *rest = (fully_dotted(node) if isinstance(node, ast.Attribute) else []) or [""]
            if first in bound and any(map(is_private, rest)):
                used.add((name, ".".join([bound[first], *rest])))
    # of a chain the whole alone
    used = {(name, full) for name, full in used if not any(n == name and f.startswith(full + ".") for n, f in used)}
    assert used == FENCED


# --- signatures -------------------------------------------------------------------------------------------------------


def fields_of_dataclass(node: ast.ClassDef) -> int:
    decorators = [d.func if isinstance(d, ast.Call) else d for d in node.decorator_list]
    is_dataclass = any(isinstance(d, ast.Name) and d.id == "dataclass" for d in decorators)
    return sum(isinstance(part, ast.AnnAssign) for part in node.body) if is_dataclass else 0


def test_calls_are_short() -> None:
    long = set()
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            count = 0
            # the arguments of a command are its options
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and name != "monai_deq.cli":
                arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                count = len([a for a in arguments if a.arg not in ("self", "cls")])
            elif isinstance(node, ast.ClassDef):
                count = fields_of_dataclass(node)
            if count > MOST_ARGUMENTS:
                long.add((f"{name}.{node.name}", count))
    assert not long
