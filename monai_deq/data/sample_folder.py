# SPDX-License-Identifier: Apache-2.0
"""Folders of synthetic cohorts: written whole or not at all, and known again."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["is_sample", "write_sample_folder"]


def write_sample_folder(output_dir: str | Path, parameters: dict[str, Any], write: Callable[[Path], None]) -> Path:
    """
    Write the folder of a synthetic cohort under a temporary name and move it into place when it is whole.

    Args:
        output_dir: folder to write; its parent is made where needed.
        parameters: all that the cohort depends on, as JSON keeps it; goes into ``sample.json``.
        write: writes the files of the cohort into the folder that it is given.

    Returns:
        ``output_dir``; where it holds this very cohort already it is left untouched.

    Raises:
        FileExistsError: When ``output_dir`` holds anything else.
    """
    output = Path(output_dir).expanduser()
    content = {"generator": "monai_deq", **parameters}
    if _holds(output, content):
        return output
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.parent / f".{output.name}.{uuid.uuid4().hex}"
    temporary.mkdir()
    try:
        write(temporary)
        (temporary / "sample.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        try:
            os.replace(temporary, output)
        except OSError:
            # another process may have written it meanwhile
            if not _holds(output, content):
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return output


def _holds(output: Path, content: dict[str, Any]) -> bool:
    """Whether a folder holds this cohort; refuses one that holds something else."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    if is_sample(output):
        found = json.loads((output / "sample.json").read_text(encoding="utf-8"))
        if found == content:
            return True
        raise FileExistsError(
            f"{output} holds a sample cohort of other parameters: {found}, wanted {content}. Choose another output_dir "
            "or remove the folder."
        )
    raise FileExistsError(f"{output} exists and holds no sample cohort; choose another output_dir.")


def is_sample(path: str | Path) -> bool:
    """Whether a folder is a synthetic cohort of this package; results on it can be marked so."""
    try:
        content = json.loads((Path(path).expanduser() / "sample.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("generator") == "monai_deq"
