# SPDX-License-Identifier: Apache-2.0
"""Bundles run as their users run them, from the shell."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def run_bundle(
    run_id: str, config_file: object, folder: Path, launcher: Sequence[str] = (), **overrides: object
) -> subprocess.CompletedProcess:
    """``python -m monai.bundle run`` in a folder, on one thread; ``launcher`` are words of Python before it."""
    command = [sys.executable, "-W", "ignore", *launcher, "-m", "monai.bundle", "run", run_id]
    command += ["--config_file", str(config_file)]
    for key, value in overrides.items():
        command += [f"--{key}", str(value)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)


def output_of(result: subprocess.CompletedProcess) -> str:
    """What a command printed that ended well."""
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-6000:]
    return result.stdout
